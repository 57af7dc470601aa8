"""A segmenter: a class for every pixel, from the features of any backbone.

A backbone with a feature for every pixel, such as `unet`, needs only a 1x1 convolution. Maps of
other backbones are merged by `pyramid` to a part of the resolution; the logits are interpolated.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cv_jax.models import layers
from cv_jax.models.pyramid import STRIDE, block, pyramid


class Segmenter(nn.Module):
    """A segmenter; comments give the shapes for ResNet-18 on images of 240x320 pixels."""

    backbone: nn.Module  # without a head
    num_classes: int
    width: int  # channels of the pyramid
    stride: int = STRIDE  # pixels between two places of the pyramid's finest map

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the logits (b, h, w, n) float32 of normalised images, and the features."""
        size = x.shape[1:3]
        _, features = self.backbone(x, train)
        if "pixels" in features:
            y = features["pixels"]
        else:
            coarse = tuple(-(-side // self.stride) for side in size)
            y = pyramid(features, coarse, self.width, train)  # b 60 80 width
            y = block(y, self.width, 3, "head", train)
        logits = layers.conv(y, self.num_classes, 1, name="logits", use_bias=True)
        logits = logits.astype(jnp.float32)  # b 60 80 n
        if logits.shape[1:3] != size:
            logits = jax.image.resize(logits, (len(x), *size, self.num_classes), "bilinear")
        return logits, features
