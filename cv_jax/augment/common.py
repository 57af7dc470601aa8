"""What augmentations share: the batch and its fields, checks of arguments, and small parts.

A batch is a dict of arrays by name, with a leading axis of b examples:
    image: (b, h, w, c) float32 in [0, 1], not yet normalised. Clips are (b, t, h, w, c).
    label: (b, n) float32 class probabilities.
    other fields: as `cv_jax.data.fields.KINDS` says.
    rows: a dict of what a batch says of its rows: index (b,) int32, the example's position in the
        training set; epoch (b,) int32, the epoch that the example is drawn in; coin (b,) uint32,
        random bits that belong to the example for the whole run.

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


# What an augmentation finds where nobody says more.
IMAGE_AND_LABEL: Fields = {
    "image": Field((), "uint8", "image"),
    "label": Field((), "int32", "label"),
}


SPATIAL_AXES = {"image": (1, 2), "clip": (2, 3), "mask": (1, 2)}  # height and width, in a batch


MAX_PIXELS = 4096  # of a length that an argument gives


# --- Fields of a batch ---


def has_kind(fields: Fields, *kinds: str) -> bool:
    """Returns whether a field is of one of these kinds."""
    return any(field.kind in kinds for field in fields.values())


def select(batch: Batch, fields: Fields, *kinds: str) -> Batch:
    """Returns the batch's fields of these kinds."""
    return {name: batch[name] for name in fields if name in batch and fields[name].kind in kinds}


def num_rows(batch: Batch, fields: Fields) -> int:
    """Returns b, the number of examples of the batch."""
    return next(len(batch[name]) for name in fields if name in batch)


def image_size(batch: Batch, fields: Fields) -> tuple[int, int]:
    """Returns the height and width of all images, clips and masks; (0, 0) where there are none.

    The points of an example without an image thus turn about the origin.

    Raises:
        UserError: the sizes differ.
    """
    found = select(batch, fields, *SPATIAL_AXES)
    axes = {name: SPATIAL_AXES[fields[name].kind] for name in found}
    sizes = {name: (x.shape[axes[name][0]], x.shape[axes[name][1]]) for name, x in found.items()}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name} {h}x{w}" for name, (h, w) in sizes.items())
        raise UserError(
            f"The images, clips and masks of an example must have one size, and have {shown}."
        )
    return next(iter(sizes.values()), (0, 0))


Change = Callable[[jax.Array], jax.Array]


def map_images(function: Change, batch: Batch, fields: Fields) -> Batch:
    """Returns function(image) of each image (b, h, w, c), and of each frame of each clip alike."""
    images = {name: function(x) for name, x in select(batch, fields, "image").items()}
    frames = jax.vmap(function, in_axes=1, out_axes=1)
    return images | {name: frames(x) for name, x in select(batch, fields, "clip").items()}


def map_masks(function: Change, batch: Batch, fields: Fields) -> Batch:
    """Returns function(mask) of each mask, which is given to the function as (b, h, w, 1)."""
    masks = select(batch, fields, "mask")
    return {name: function(mask[..., None])[..., 0] for name, mask in masks.items()}


# --- Draws and arguments ---


def _blend(a, b, share):
    """a where `share` is 0, b where it is 1; exactly a where both are equal."""
    return a + share * (b - a)


def _integers(key, shape, count):
    """Uniform in 0, 1, ..., count - 1, for counts far below 2^23."""
    # jax.random.randint draws twice the bits: 5.7 us for a batch of 4 on the CPU, this 1.4 us.
    return (jax.random.uniform(key, shape) * count).astype(jnp.int32)


def _happens(key, p, shape):
    """Whether something of probability p, which may be a whole number, happens: bool."""
    return jax.random.bernoulli(key, jnp.float32(p), shape)


def _is_known_as(value, number):
    """Whether the number is known to be this value; a swept number never is."""
    return isinstance(value, int | float) and number == value


def _require_pixels(name, pixels, most):
    whole = isinstance(pixels, int) and 0 <= pixels <= most
    require(lambda: whole, f"{name}={pixels} must be a whole number of pixels, 0 to {most}")


def _require_mode(mode):
    require(lambda: mode in ("reflect", "zero"), f'mode={mode!r} must be "reflect" or "zero"')
