"""A feature pyramid: the maps of a backbone, merged from the coarsest to the finest.

From its coarsest map up, the pyramid doubles the resolution and adds the backbone's next finer map,
with a convolution after each sum (T.-Y. Lin et al., "Feature Pyramid Networks",
https://arxiv.org/abs/1612.03144, figure 3).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.models import layers
from cv_jax.models.layers import batch_norm, normal_fan_out

STRIDE = 4  # pixels between two places of the finest map


def pyramid(
    features: dict[str, jax.Array], size: tuple[int, int], width: int, train: bool
) -> jax.Array:
    """Returns the map (b, *size, width) that merges the features of a backbone.

    Its layers belong to the module that calls it. Comments give the shapes for ResNet-18 on images
    of 240x320 pixels, with `size` 60x80.

    Args:
        features: the backbone's features by name; maps (b, h, w, c) of at most `size` are used, the
            last one of each resolution.
        size: height and width of the result.
        width: channels of every map.
        train: whether the batch's own statistics normalise.

    Raises:
        UserError: no map is small enough.
    """
    coarsest, *finer = _maps(features, size)  # b 8 10 512, b 15 20 256, b 30 40 128, b 60 80 64
    y = block(coarsest, width, 1, "lateral0", train)
    for i, level in enumerate(finer, start=1):
        y = double(y, level.shape[1:3]) + block(level, width, 1, f"lateral{i}", train)
        y = block(y, width, 3, f"merge{i}", train)
    while y.shape[1:3] != size:  # the backbone has no map that fine
        finer_size = tuple(
            min(2 * side, most) for side, most in zip(y.shape[1:3], size, strict=True)
        )
        y = block(double(y, finer_size), width, 3, f"grow{y.shape[1]}", train)
    return y


def block(
    x: jax.Array, width: int, size: int, name: str, train: bool, activation: Callable = nn.relu
) -> jax.Array:
    """Returns a convolution of `size` x `size`, normalised, with an activation."""
    y = layers.conv(x, width, size, padding=size // 2, kernel_init=normal_fan_out, name=name)
    return activation(batch_norm(y, train, name=f"{name}_norm"))


def _maps(features: dict[str, jax.Array], size: tuple[int, int]) -> list[jax.Array]:
    """Returns the last map of each resolution up to `size` (h, w), the coarsest first."""
    found = {}
    for x in features.values():
        if x.ndim == 4 and x.shape[1] <= size[0] and x.shape[2] <= size[1]:
            found[x.shape[1:3]] = x
    if not found:
        raise UserError(
            f"config.task needs a config.model with feature maps of at most {size[0]}x{size[1]} "
            "places, such as resnet18: choose another."
        )
    return [found[of_size] for of_size in sorted(found)]


def double(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Enlarges maps (b, h, w, c) to `size` (h', w'), at most twice as large in each axis.

    Where 2 h is h' or differs by one, as the map of a strided convolution does, every value is
    repeated twice, and the last ones are cut or repeated again. Otherwise, a place takes the value
    at the nearest place.
    """
    for axis, side in zip((1, 2), size, strict=True):
        if abs(2 * x.shape[axis] - side) <= 1:
            x = _repeat_twice(x, axis, side)
        elif x.shape[axis] != side:
            x = _nearest(x, axis, side)
    return x


def _repeat_twice(x: jax.Array, axis: int, side: int) -> jax.Array:
    shape = list(x.shape)
    shape[axis] *= 2
    shape[0] = -1  # a program for any number of images
    # Not by `repeat`, which tools.export cannot write as ONNX.
    x = jnp.concatenate([jnp.expand_dims(x, axis + 1)] * 2, axis=axis + 1).reshape(shape)
    if x.shape[axis] < side:  # as of a map of 7 places below one of 15
        pads = [(0, 0)] * 4
        pads[axis] = (0, 1)
        x = jnp.pad(x, pads, mode="edge")
    return jax.lax.slice_in_dim(x, 0, side, axis=axis)


def _nearest(x: jax.Array, axis: int, side: int) -> jax.Array:
    here = x.shape[axis]
    nearest = ((np.arange(side) + 0.5) * here / side).astype(int)
    chosen = jnp.asarray(np.eye(here)[nearest], x.dtype)  # a product, which ONNX has
    moved = jnp.tensordot(x, chosen, ((axis,), (1,)), precision="highest")
    return jnp.moveaxis(moved, -1, axis)
