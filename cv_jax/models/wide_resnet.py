"""Wide residual networks (Zagoruyko and Komodakis, https://arxiv.org/abs/1605.07146).

As in the authors' code: normalisation and ReLU before each convolution; where a block changes the
shape, its 1x1 shortcut also starts from the activated input; only the head has a bias; no dropout.
Convolutions start as N(0, 2 / fan_out).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cv_jax.models.layers import batch_norm, global_avg_pool, head
from cv_jax.models.resnet import conv


class WideResNet(nn.Module):
    """A wide ResNet. Comments give the shapes of 32x32 images and width 10."""

    depth: int  # 6 * (blocks of each group) + 4
    width: int  # the groups have 16, 32 and 64 times as many channels
    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = conv(x.astype(self.dtype), 16, 3, 1, "stem")  # b 32 32 16
        features = {"stem": x}
        for i in range(3):
            for j in range((self.depth - 4) // 6):
                strides = 2 if i > 0 and j == 0 else 1
                name = f"group{i + 1}_block{j + 1}"
                x = PreActivationBlock(16 * self.width * 2**i, strides, name=name)(x, train)
            features[f"group{i + 1}"] = x  # b 32 32 160, b 16 16 320, b 8 8 640
        x = nn.relu(batch_norm(x, train, name="norm"))
        features["pooled"] = pooled = global_avg_pool(x)  # b 640
        return head(pooled, self.num_classes), features  # b n


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after normalisation and ReLU, beside a shortcut."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(batch_norm(x, train, name="norm1"))
        if x.shape[-1] != self.features or self.strides != 1:
            x = conv(y, self.features, 1, self.strides, "shortcut")
        y = conv(y, self.features, 3, self.strides, "conv1")
        y = nn.relu(batch_norm(y, train, name="norm2"))
        return x + conv(y, self.features, 3, 1, "conv2")


def wrn28_10(*, num_classes: int, dtype: jnp.dtype) -> nn.Module:
    """Builds WRN-28-10: 36,479,194 parameters for RGB images, 10 classes (36.5M in the paper)."""
    return WideResNet(28, 10, num_classes, dtype)
