"""A detector without anchors: a backbone, a pyramid, and a head at every fourth pixel.

The backbone is any model of MODELS whose features are maps, such as n94 or a ResNet. From its
coarsest map up, the pyramid doubles the resolution and adds the backbone's next finer map (T.-Y.
Lin et al., "Feature Pyramid Networks", https://arxiv.org/abs/1612.03144, figure 3), with a
convolution after each sum. The head is that of X. Zhou et al., "Objects as Points",
https://arxiv.org/abs/1904.07850: a heat map of centres for each class, and here four distances from
a centre to the sides of its box. Its hidden layers are SiLU: ReLU was 0, and without a gradient, at
all objects of a rare class.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from cv_jax.config.errors import UserError
from cv_jax.models import layers
from cv_jax.models.layers import batch_norm, normal_fan_out, zeros

STRIDE = 4  # pixels between two places of the heat map
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
        coarsest, *finer = _maps(features, size)  # b 8 10 512, b 15 20 256, b 30 40 128, b 60 80 64
        y = self._block(coarsest, 1, "lateral0", train)
        for i, level in enumerate(finer, start=1):
            y = _double(y, level.shape[1:3]) + self._block(level, 1, f"lateral{i}", train)
            y = self._block(y, 3, f"merge{i}", train)
        while y.shape[1:3] != size:  # the backbone has no map that fine
            finer_size = tuple(
                min(2 * side, most) for side, most in zip(y.shape[1:3], size, strict=True)
            )
            y = self._block(_double(y, finer_size), 3, f"grow{y.shape[1]}", train)
        of_heat, of_sides = (self._block(y, 3, name, train, nn.silu) for name in ("head1", "head2"))
        bias = nn.initializers.constant(math.log(PRIOR / (1 - PRIOR)))
        heat = _output(of_heat, self.num_classes, "heat", bias)
        sides = _output(of_sides, 4, "sides", zeros)
        return heat.astype(jnp.float32), sides.astype(jnp.float32), features

    def _block(self, x, size, name, train, activation=nn.relu):
        y = layers.conv(
            x, self.width, size, padding=size // 2, kernel_init=normal_fan_out, name=name
        )
        return activation(batch_norm(y, train, name=f"{name}_norm"))


def _output(x, features, name, bias_init):
    return layers.conv(
        x, features, 1, name=name, use_bias=True, kernel_init=_small, bias_init=bias_init
    )


def _maps(features: dict[str, jax.Array], size: tuple[int, int]) -> list[jax.Array]:
    """Returns the last map of each resolution up to `size` (h, w), the coarsest first."""
    found = {}
    for x in features.values():
        if x.ndim == 4 and x.shape[1] <= size[0] and x.shape[2] <= size[1]:
            found[x.shape[1:3]] = x
    if not found:
        raise UserError(
            f"A detector needs a config.model with feature maps of at most {size[0]}x{size[1]} "
            "places, such as resnet18: choose another."
        )
    return [found[of_size] for of_size in sorted(found)]


def _double(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Repeats every value twice along height and width, and the last ones to get `size` (h, w)."""
    for axis in (1, 2):
        shape = [-1, *x.shape[1:]]
        shape[axis] *= 2
        # Not by `repeat`, which tools.export cannot write as ONNX.
        x = jnp.concatenate([jnp.expand_dims(x, axis + 1)] * 2, axis=axis + 1).reshape(shape)
    missing = [max(0, side - have) for side, have in zip(size, x.shape[1:3], strict=True)]
    if any(missing):  # as of a map of 7 places below one of 15
        x = jnp.pad(x, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
    return x[:, : size[0], : size[1]]
