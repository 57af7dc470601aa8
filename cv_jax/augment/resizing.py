"""Progressive resizing: smaller images early in the training save FLOPs.

From J. Howard and S. Gugger, "fastai: A Layered API for Deep Learning",
https://arxiv.org/abs/2002.04688. For example "size(20, until=0.3)|size(24, until=0.6)" means:
images of 20x20 pixels for the first 30 % of the steps, of 24x24 up to 60 %, then of full size.
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
    """A part of the training with images of one size.

    Attributes:
        start: the stage's first step.
        size: pixels a side of the images; None: full size.
    """

    start: int
    size: int | None


def make_stages(text: str, total_steps: int) -> list[Stage]:
    """Builds the stages of a training of `total_steps`; the last (for "" the only) has full size.

    Raises:
        UserError: the text is not valid, or `until` does not increase from size to size.
    """
    sizes = build(text, SIZES, _KEY)
    shares = [until for _, until in sizes]
    if shares != sorted(set(shares)):
        raise UserError(f"{_KEY}={text!r}: each `until` must be above the one before it.")
    starts = [0, *(round(until * total_steps) for until in shares)]
    return [Stage(*stage) for stage in zip(starts, [*(s for s, _ in sizes), None], strict=True)]


def size_at(stages: list[Stage], step: int) -> int | None:
    """Returns the size of the images in a step; None: full size."""
    return [stage.size for stage in stages if stage.start <= step][-1]


def _size(pixels: int, *, until: float) -> tuple[int, float]:
    if pixels < 1:
        raise ValueError(f"{pixels} is not a number of pixels")
    if not 0 < until < 1:
        raise ValueError(f"until={until} is not between 0 and 1")
    return pixels, until


SIZES = {"size": _size}


def resize(batch: Batch, size: int | None, fields: Fields = IMAGE_AND_LABEL) -> Batch:
    """Returns the batch with images of `size` x `size`, and its other fields moved alike.

    Images and frames of clips are resized by `resize_images`, masks by the nearest pixel; boxes,
    points and tracks are scaled. With size=None the batch is unchanged.

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
    """Resizes (b, h, w, c) to (b, size, size, c), bilinear and antialiased; unchanged for None.

    Raises:
        UserError: the images are smaller than `size`.
    """
    if size is None:
        return images
    b, h, w, c = images.shape
    if size > max(h, w):
        raise UserError(
            f"{_KEY}: {size} pixels a side are more than the images' {h}x{w}. Choose a smaller "
            "size."
        )
    return jax.image.resize(images, (b, size, size, c), "linear", antialias=True)
