"""A detector without anchors: a backbone, a pyramid, and a head at every fourth pixel.

The backbone is any model of MODELS whose features are maps, such as n94 or a ResNet. The head is
that of X. Zhou et al., "Objects as Points", https://arxiv.org/abs/1904.07850: a heat map of centres
for each class, and here four distances from a centre to the sides of its box. Its hidden layers are
SiLU: ReLU was 0, and without a gradient, at all objects of a rare class.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from cv_jax.models import layers
from cv_jax.models.layers import zeros
from cv_jax.models.pyramid import STRIDE, block, pyramid

PRIOR = 0.1  # probability of a centre at the start, at every place
_small = nn.initializers.normal(0.01)


class Detector(nn.Module):
    """A detector; comments give the shapes for ResNet-18 on images of 240x320 pixels."""

    backbone: nn.Module  # without a head
    num_classes: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array, dict]:
        """Returns heat map and distances of normalised images (b, h, w, c).

        Returns:
            logits (b, h / 4, w / 4, n) float32 of the classes; logarithms (b, h / 4, w / 4, 4)
            float32 of the distances to left, top, right and bottom, in units of 16 pixels; and the
            backbone's features by name.
        """
        size = x.shape[1] // STRIDE, x.shape[2] // STRIDE
        _, features = self.backbone(x, train)
        y = pyramid(features, size, self.width, train)  # b 60 80 width
        of_heat, of_sides = (
            block(y, self.width, 3, name, train, nn.silu) for name in ("head1", "head2")
        )
        bias = nn.initializers.constant(math.log(PRIOR / (1 - PRIOR)))
        heat = _output(of_heat, self.num_classes, "heat", bias)
        sides = _output(of_sides, 4, "sides", zeros)
        return heat.astype(jnp.float32), sides.astype(jnp.float32), features


def _output(x, features, name, bias_init):
    return layers.conv(
        x, features, 1, name=name, use_bias=True, kernel_init=_small, bias_init=bias_init
    )
