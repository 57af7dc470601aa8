"""Progressive resizing: smaller images in the first part of a training cost it fewer FLOPs.

From J. Howard and S. Gugger, "fastai: A Layered API for Deep Learning",
https://arxiv.org/abs/2002.04688. It is written "size(20, until=0.3)|size(24, until=0.6)": images of
20x20 pixels for the first 30 % of the steps, of 24x24 up to 60 %, and as they are from there on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cv_jax.augment import warp
from cv_jax.augment.common import (
    IMAGE_AND_LABEL,
    Batch,
    Fields,
    image_size,
    map_images,
    num_rows,
)
from cv_jax.config.calls import build
from cv_jax.config.errors import UserError

_KEY = "config.progressive_resizing"


class Stage(NamedTuple):
    """A part of the training: its first step, and the pixels a side of its images, None: all."""

    start: int
    size: int | None


def make_stages(text: str, total_steps: int) -> list[Stage]:
    """The stages of a training of `total_steps`; the last, of "" the only one, has whole images.

    Raises:
        UserError: a text that is not understood, or shares of the training that do not grow.
    """
    sizes = build(text, SIZES, _KEY)
    shares = [until for _, until in sizes]
    if shares != sorted(set(shares)):
        raise UserError(f"{_KEY}={text!r}: each `until` must be above the one before.")
    starts = [0, *(round(until * total_steps) for until in shares)]
    return [Stage(*stage) for stage in zip(starts, [*(s for s, _ in sizes), None], strict=True)]


def size_at(stages: list[Stage], step: int) -> int | None:
    """The size of the images in this step."""
    return [stage.size for stage in stages if stage.start <= step][-1]


def _size(pixels: int, *, until: float) -> tuple[int, float]:
    if pixels < 1:
        raise ValueError(f"{pixels} is not a number of pixels")
    if not 0 < until < 1:
        raise ValueError(f"until={until} is not between 0 and 1")
    return pixels, until


SIZES = {"size": _size}


def resize(batch: Batch, size: int | None, fields: Fields = IMAGE_AND_LABEL) -> Batch:
    """Returns the batch with images of `size` x `size`, and with all other fields moved alike.

    Images and the frames of clips are as from `resize_images`, masks have the nearest pixel, and
    boxes, points and tracks are scaled. For None the batch stays as it is.

    Raises:
        UserError: the images are smaller than `size`.
    """
    if size is None:
        return batch
    new_size = (size, size)
    matrix = warp.resize(image_size(batch, fields), new_size)
    matrix = jnp.broadcast_to(matrix[None], (num_rows(batch, fields), 3, 3))
    return {
        **batch,
        **map_images(lambda image: resize_images(image, size), batch, fields),
        **warp.move_masks(batch, matrix, new_size, fields),
        **warp.move_coordinates(batch, matrix, new_size, fields, min_area=0),
    }


def resize_images(images: jax.Array, size: int | None) -> jax.Array:
    """(b, h, w, c) to (b, size, size, c), bilinear and antialiased; as they are for None.

    Raises:
        UserError: the images are smaller than `size`.
    """
    if size is None:
        return images
    b, h, w, c = images.shape
    if size > max(h, w):
        raise UserError(f"{_KEY}: {size} pixels a side are more than the images' {h}x{w}.")
    return jax.image.resize(images, (b, size, size, c), "linear", antialias=True)
