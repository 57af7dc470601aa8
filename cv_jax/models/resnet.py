"""ResNet-18 and ResNet-50 (He et al., https://arxiv.org/abs/1512.03385).

The ImageNet stem and the blocks are torchvision's: the stride of a bottleneck is on its 3x3
convolution ("v1.5"), paddings are symmetric. The CIFAR stem is one 3x3 convolution, without a pool.
Convolutions start as N(0, 2 / fan_out); every normalisation starts as the identity. With
`zero_scale` the last scale of each block starts as 0, so that a block starts as its shortcut
(Goyal et al., https://arxiv.org/abs/1706.02677, section 5.1).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cv_jax.models import layers
from cv_jax.models.layers import (
    batch_norm,
    global_avg_pool,
    head,
    max_pool,
    normal_fan_out,
    ones,
    zeros,
)

STEMS = ("cifar", "imagenet")


class ResNet(nn.Module):
    """A ResNet. Comments give the shapes of ResNet-50 on 32x32 images with the CIFAR stem."""

    depths: tuple[int, ...]  # blocks of each group
    bottleneck: bool
    stem: str
    num_classes: int
    dtype: jnp.dtype
    width: int = 64  # channels of the stem and the first group
    zero_scale: bool = False  # whether the last scale of each block starts as 0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        x, features = x.astype(self.dtype), {}
        if self.stem == "imagenet":
            x = nn.relu(batch_norm(conv(x, self.width, 7, 2, "stem"), train, name="stem_norm"))
            features["stem_conv"] = x  # twice the height and width of the next map
            x = max_pool(x, 3, strides=2, padding=1)
        else:
            x = nn.relu(batch_norm(conv(x, self.width, 3, 1, "stem"), train, name="stem_norm"))
        features["stem"] = x  # b 32 32 64
        block = BottleneckBlock if self.bottleneck else BasicBlock
        for i, depth in enumerate(self.depths):
            for j in range(depth):
                strides = 2 if i > 0 and j == 0 else 1
                name = f"group{i + 1}_block{j + 1}"
                x = block(self.width * 2**i, strides, self.zero_scale, name=name)(x, train)
            features[f"group{i + 1}"] = x  # b 32 32 256, b 16 16 512, b 8 8 1024, b 4 4 2048
        features["pooled"] = pooled = global_avg_pool(x)  # b 2048
        return head(pooled, self.num_classes), features  # b n


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    features: int
    strides: int
    zero_scale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = conv(x, self.features, 3, self.strides, "conv1")
        y = nn.relu(batch_norm(y, train, name="norm1"))
        y = conv(y, self.features, 3, 1, "conv2")
        y = batch_norm(y, train, scale_init=zeros if self.zero_scale else ones, name="norm2")
        return nn.relu(y + _shortcut(x, self.features, self.strides, train))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut, with 4 * `features` output channels."""

    features: int
    strides: int
    zero_scale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = conv(x, self.features, 1, 1, "conv1")
        y = nn.relu(batch_norm(y, train, name="norm1"))
        y = conv(y, self.features, 3, self.strides, "conv2")
        y = nn.relu(batch_norm(y, train, name="norm2"))
        y = conv(y, 4 * self.features, 1, 1, "conv3")
        y = batch_norm(y, train, scale_init=zeros if self.zero_scale else ones, name="norm3")
        return nn.relu(y + _shortcut(x, 4 * self.features, self.strides, train))


def _shortcut(x: jax.Array, features: int, strides: int, train: bool) -> jax.Array:
    """Returns `x`, or a 1x1 convolution of `x` where the block changes the shape."""
    if x.shape[-1] == features and strides == 1:
        return x
    return batch_norm(conv(x, features, 1, strides, "shortcut"), train, name="shortcut_norm")


def conv(x: jax.Array, features: int, size: int, strides: int, name: str) -> jax.Array:
    """Convolves without a bias, as all residual networks; h' = ceil(h / strides) for odd sizes."""
    return layers.conv(
        x,
        features,
        size,
        strides=strides,
        padding=size // 2,
        kernel_init=normal_fan_out,
        name=name,
    )


def resnet18(
    stem: str = "cifar",
    zero_scale: bool = False,
    width: int = 64,
    *,
    num_classes: int,
    dtype: jnp.dtype,
) -> nn.Module:
    """Builds ResNet-18, with `width` channels in the first group.

    11,173,962 parameters (CIFAR stem, 10 classes) or 11,689,512 (ImageNet stem, 1,000).
    """
    (width,) = layers.checked_widths((width,))
    stem = _known_stem(stem)
    return ResNet((2, 2, 2, 2), False, stem, num_classes, dtype, width, zero_scale)


def resnet50(
    stem: str = "cifar", zero_scale: bool = False, *, num_classes: int, dtype: jnp.dtype
) -> nn.Module:
    """Builds ResNet-50.

    23,520,842 parameters (CIFAR stem, 10 classes) or 25,557,032 (ImageNet stem, 1,000).
    """
    return ResNet((3, 4, 6, 3), True, _known_stem(stem), num_classes, dtype, zero_scale=zero_scale)


def _known_stem(stem: str) -> str:
    if stem not in STEMS:
        raise ValueError(f"stem={stem!r} must be one of {', '.join(STEMS)}")
    return stem
