"""Helpers of the augmentations: the fields of a batch, random draws, and checks of arguments.

A batch is a dict of arrays by name, with a leading axis of b examples:
    image: (b, h, w, c) float32 in [0, 1], not yet normalised. Clips are (b, t, h, w, c).
    label: (b, n) float32 class probabilities.
    other fields: see `cv_jax.data.fields.KINDS`.
    rows: a dict of facts about each row: index (b,) int32, the example's position in the training
        set; epoch (b,) int32, the current epoch; coin (b,) uint32, random bits that an example
        keeps for the whole run.

An augmentation is a pure function (key, batch) -> batch, which runs inside the jitted train step.
Every example has its own randomness.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cv_jax.config.calls import require
from cv_jax.config.errors import UserError
from cv_jax.data.fields import Field

Batch = dict[str, Any]


Augment = Callable[[jax.Array, Batch], Batch]


Fields = Mapping[str, Field]


# The default fields of a batch.
IMAGE_AND_LABEL: Fields = {
    "image": Field((), "uint8", "image"),
    "label": Field((), "int32", "label"),
}


SPATIAL_AXES = {"image": (1, 2), "clip": (2, 3), "mask": (1, 2)}  # height and width, in a batch


MAX_PIXELS = 4096  # the largest length that an argument may give


# --- Fields of a batch ---


def select(batch: Batch, fields: Fields, *kinds: str) -> Batch:
    """Returns the arrays of the batch whose field is of one of `kinds`."""
    return {name: batch[name] for name in fields if name in batch and fields[name].kind in kinds}


def num_rows(batch: Batch, fields: Fields) -> int:
    """Returns b, the number of examples in the batch."""
    return next(len(batch[name]) for name in fields if name in batch)


def image_size(batch: Batch, fields: Fields) -> tuple[int, int]:
    """Returns the height and width of all images, clips and masks; (0, 0) if the batch has none.

    The points of an example without an image are therefore rotated about the origin.

    Raises:
        UserError: the sizes differ.
    """
    found = select(batch, fields, *SPATIAL_AXES)
    axes = {name: SPATIAL_AXES[fields[name].kind] for name in found}
    sizes = {name: (x.shape[axes[name][0]], x.shape[axes[name][1]]) for name, x in found.items()}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name} {h}x{w}" for name, (h, w) in sizes.items())
        raise UserError(
            f"The images, clips and masks of an example have different sizes: {shown}. "
            "Give them one size."
        )
    return next(iter(sizes.values()), (0, 0))


Change = Callable[[jax.Array], jax.Array]


def map_images(function: Change, batch: Batch, fields: Fields) -> Batch:
    """Returns function(image) for each image (b, h, w, c), and for each frame of each clip."""
    images = {name: function(x) for name, x in select(batch, fields, "image").items()}
    frames = jax.vmap(function, in_axes=1, out_axes=1)
    return images | {name: frames(x) for name, x in select(batch, fields, "clip").items()}


def map_masks(function: Change, batch: Batch, fields: Fields) -> Batch:
    """Returns function(mask) for each mask; the function gets and returns (b, h, w, 1)."""
    masks = select(batch, fields, "mask")
    return {name: function(mask[..., None])[..., 0] for name, mask in masks.items()}


# --- Draws and arguments ---


def _blend(a, b, share):
    """Returns a + share * (b - a), which is exactly a where a and b are equal."""
    return a + share * (b - a)


def _integers(key, shape, count):
    """Draws uniform integers in 0, 1, ..., count - 1, for counts far below 2^23."""
    # jax.random.randint draws twice the bits: 5.7 us for a batch of 4 on the CPU against 1.4 us.
    return (jax.random.uniform(key, shape) * count).astype(jnp.int32)


def _happens(key, p, shape):
    """Draws booleans that are true with probability p, a float or an int."""
    return jax.random.bernoulli(key, jnp.float32(p), shape)


def _is_known_as(value, number):
    """Returns whether the number is a constant equal to `value`; False for a swept (traced) one.

    Args:
        value: the constant to compare with.
        number: a Python number or a traced array.
    """
    return isinstance(number, int | float) and number == value


def _require_pixels(name, pixels, most):
    whole = isinstance(pixels, int) and 0 <= pixels <= most
    require(lambda: whole, f"{name}={pixels} must be a whole number of pixels, 0 to {most}")


def _require_mode(mode):
    require(lambda: mode in ("reflect", "zero"), f'mode={mode!r} must be "reflect" or "zero"')
