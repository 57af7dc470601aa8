"""ConvNeXt-T (Liu et al., https://arxiv.org/abs/2201.03545).

As in the authors' code, without stochastic depth. Kernels start as N(0, 0.02^2), biases as 0, and
the scale of each block as 1e-6.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from cv_jax.models import layers
from cv_jax.models.layers import check_image_size, gelu, layer_norm, zeros

_normal = nn.initializers.normal(0.02)
_dense = partial(layers.dense, kernel_init=_normal, bias_init=zeros)
_patch_conv = partial(layers.patch_conv, kernel_init=_normal)


class ConvNeXt(nn.Module):
    """A ConvNeXt. Comments give the shapes of ConvNeXt-T on 224x224 images."""

    depths: tuple[int, ...]  # blocks of each group
    widths: tuple[int, ...]  # channels of each group
    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        del train  # the network has no dropout and no batch statistics
        check_image_size(x, "convnext_t", least=4 * 2 ** (len(self.depths) - 1))
        x = _patch_conv(x.astype(self.dtype), self.widths[0], 4, name="stem")
        x = layer_norm(x, name="stem_norm")
        features = {"stem": x}  # b 56 56 96
        for i, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True), start=1):
            if i > 1:
                x = layer_norm(x, name=f"group{i}_norm")
                x = _patch_conv(x, width, 2, name=f"group{i}_shrink")
            for j in range(depth):
                x = Block(name=f"group{i}_block{j + 1}")(x)
            features[f"group{i}"] = x  # b 56 56 96, b 28 28 192, b 14 14 384, b 7 7 768
        pooled = layer_norm(layers.global_avg_pool(x), name="norm")
        features["pooled"] = pooled  # b 768
        return layers.head(pooled, self.num_classes, kernel_init=_normal, bias_init=zeros), features


class Block(nn.Module):
    """A 7x7 depthwise convolution and two 1x1 convolutions beside a shortcut."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = layers.depthwise_conv(x, 7, kernel_init=_normal, name="conv")
        y = layer_norm(y, name="norm")
        y = gelu(_dense(y, 4 * width, name="dense1"))
        y = _dense(y, width, name="dense2")
        scale = self.param("scale", nn.initializers.constant(1e-6), (width,))
        return x + scale.astype(y.dtype)[None, None, None] * y


def convnext_t(*, num_classes: int, dtype: jnp.dtype) -> nn.Module:
    """Builds ConvNeXt-T: 28,589,128 parameters for 1,000 classes, as in torchvision and timm."""
    return ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), num_classes, dtype)
