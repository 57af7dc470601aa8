"""Moves all fields of an example by one matrix: images, clips, masks, boxes, points and tracks.

A matrix (3, 3) maps points (x, y, 1) in pixels of the input to points in pixels of the output. The
pixel in row i and column j covers [j, j + 1) x [i, i + 1), so its centre is (j + 0.5, i + 0.5). The
last row of a matrix is 0 0 1. Sizes are (height, width).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cv_jax.augment.common import (
    IMAGE_AND_LABEL,
    Batch,
    Fields,
    _blend,
    map_images,
    map_masks,
    select,
)
from cv_jax.data.fields import IGNORED, has_kind

MIN_AREA = 0.3  # the share of a box's area that must stay inside the image

# Keeps a box that is inside by exactly min_area, in spite of float32 rounding: 1e-4 of a box 10
# pixels wide is some ten units in the last place of a coordinate of 1000.
_ROUNDING = 1e-4


# --- Matrices; their arguments are numbers or (b,), and the result is (3, 3) or (b, 3, 3) ---


def translation(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Builds the matrix that moves points by x to the right and by y down."""
    return _matrix(1, 0, x, 0, 1, y)


def rotation(degrees: ArrayLike, size: tuple[int, int]) -> jax.Array:
    """Builds the matrix that turns an image counter-clockwise about its centre."""
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    return _about_centre(cos, sin, -sin, cos, size)


def scaling(factor: ArrayLike, size: tuple[int, int]) -> jax.Array:
    """Builds the matrix that magnifies an image about its centre; above 1 the image grows."""
    return _about_centre(factor, 0, 0, factor, size)


def shearing(degrees: ArrayLike, size: tuple[int, int]) -> jax.Array:
    """Builds the matrix that moves points right by tan(degrees) times depth below the centre."""
    return _about_centre(1, jnp.tan(jnp.deg2rad(degrees)), 0, 1, size)


def skewing(right: ArrayLike, down: ArrayLike) -> jax.Array:
    """Builds the matrix that moves points right by right * y, and down by down * x."""
    return _matrix(1, right, 0, down, 1, 0)


def mirror(size: tuple[int, int], vertical: bool = False) -> jax.Array:
    """Builds the matrix that mirrors an image left to right, or top to bottom."""
    return _matrix(1, 0, 0, 0, -1, size[0]) if vertical else _matrix(-1, 0, size[1], 0, 1, 0)


def quarter_turn(size: tuple[int, int]) -> jax.Array:
    """Builds the matrix that turns an image like numpy.rot90, which swaps height and width."""
    return _matrix(0, 1, 0, -1, 0, size[1])


def resize(before: tuple[ArrayLike, ArrayLike], after: tuple[int, int]) -> jax.Array:
    """Builds the matrix that resizes an image of size `before` to size `after`."""
    (h, w), (new_h, new_w) = before, after
    return _matrix(new_w / w, 0, 0, 0, new_h / h, 0)


def compose(*matrices: jax.Array) -> jax.Array:
    """Returns the product of matrices (b, 3, 3), which applies the first matrix first."""
    product = matrices[0]
    for matrix in matrices[1:]:
        # Not `@`: a TPU or GPU rounds its float32 operands to fewer bits.
        product = (matrix[..., :, :, None] * product[..., None, :, :]).sum(-2)
    return product


def _matrix(a, b, x, c, d, y):
    entries = (jnp.asarray(entry, jnp.float32) for entry in (a, b, x, c, d, y, 0, 0, 1))
    stacked = jnp.stack(jnp.broadcast_arrays(*entries), axis=-1)
    return stacked.reshape(*stacked.shape[:-1], 3, 3)


def _about_centre(a, b, c, d, size):
    x, y = size[1] / 2, size[0] / 2
    return _matrix(a, b, x - a * x - b * y, c, d, y - c * x - d * y)


def _inverse(matrix):
    (a, b, x), (c, d, y) = matrix[0], matrix[1]
    entries = (d, -b, b * y - d * x, -c, a, c * x - a * y)
    # Exact for quarter turns and mirrors; jnp.linalg.inv is not.
    return _matrix(*(entry / (a * d - b * c) for entry in entries))


# --- Moving a batch ---


def warp(
    batch: Batch,
    matrix: jax.Array,
    size: tuple[int, int],
    fields: Fields = IMAGE_AND_LABEL,
    mode: str = "reflect",
    min_area: float = MIN_AREA,
    samples: int = 1,
    source: tuple[jax.Array, jax.Array] | None = None,
    fill: float = 0,
) -> Batch:
    """Moves every field of each example by its matrix, images in one resampling.

    Images and clips are sampled bilinearly. Masks take the nearest pixel, and 255 outside the
    image. Boxes become the boxes around their four moved corners, cut at the image's border. If
    less than `min_area` of a moved box is inside, the box is dropped: its box, box_label and
    box_flag get their fill values. Points and tracks move; all other fields are unchanged.

    Args:
        batch: the batch to move.
        matrix: (b, 3, 3), the matrix of each example.
        size: height and width of the output.
        fields: the batch's fields.
        mode: the padding outside the image: "reflect" (its mirror image, the border pixels not
            repeated) or "zero". Always "zero" with boxes or a mask: a mirrored object would have
            no box.
        min_area: the smallest share of a moved box's area that must stay inside the image.
        samples: a pixel is the mean over samples x samples places in it, which antialiases images
            that shrink. 1 reads only the centre, which aliases if an image shrinks to less than
            half.
        source: the rows y and columns x, each (b, *size), at which images are read; pixel (0, 0)
            is at y = x = 0. None: from the matrix. `affine` has its own roundings.
        fill: the value of images outside the image with mode "zero".
    """
    mode = outside(mode, fields)
    if source is None:
        source = jax.vmap(lambda m: _source(m, size, samples))(matrix)

    def sample(image):
        image = jax.vmap(lambda image, y, x: _bilinear(image, y, x, mode, fill))(image, *source)
        return image if samples == 1 else _mean_of_blocks(image, samples)

    return {
        **batch,
        **map_images(sample, batch, fields),
        **move_masks(batch, matrix, size, fields),
        **move_coordinates(batch, matrix, size, fields, min_area),
    }


def outside(mode: str, fields: Fields) -> str:
    """Returns `mode`, or "zero" with boxes or masks, so that no object is mirrored."""
    return "zero" if has_kind(fields, "boxes", "mask") else mode


def move_masks(batch: Batch, matrix: jax.Array, size: tuple[int, int], fields: Fields) -> Batch:
    """Returns the masks moved as in `warp`."""

    def move_one(mask, matrix):
        y, x = _source(matrix, size)
        row, col = (jnp.floor(i + 0.5).astype(jnp.int32) for i in (y, x))
        return read_pixels(mask, row, col, "zero", IGNORED)

    return map_masks(lambda mask: jax.vmap(move_one)(mask, matrix), batch, fields)


def move_coordinates(
    batch: Batch,
    matrix: jax.Array,
    size: tuple[int, int],
    fields: Fields,
    min_area: float = MIN_AREA,
) -> Batch:
    """Returns the boxes, their labels and flags, the points and the tracks moved as in `warp`."""
    moved = {
        name: jax.vmap(_move_points)(matrix, points)
        for name, points in select(batch, fields, "points", "tracks").items()
    }
    for name, boxes in select(batch, fields, "boxes").items():
        boxes = jax.vmap(_move_boxes)(matrix, boxes)
        clipped = jnp.clip(boxes, 0, jnp.array([[[size[1], size[0]] * 2]], boxes.dtype))
        moved[name] = clipped
        moved |= keep_boxes({**batch, **moved}, area_of(clipped), area_of(boxes), fields, min_area)
    return moved


def keep_boxes(
    batch: Batch, seen: jax.Array, area: jax.Array, fields: Fields, min_area: float
) -> Batch:
    """Returns the boxes, their labels and flags; a box with too little visible area gets fills.

    Args:
        batch: the batch with the boxes.
        seen: (b, o), the visible area of each box.
        area: (b, o), the whole area of each box. A box of area 0, such as padding, is dropped.
        fields: the batch's fields.
        min_area: the smallest share of a box's area that must be visible.
    """
    kept = (seen > 0) & (seen >= min_area * (1 - _ROUNDING) * area)
    filled = {}
    for name, array in select(batch, fields, "boxes", "box_label", "box_flag").items():
        fill = jnp.asarray(fields[name].fill, array.dtype)
        filled[name] = jnp.where(kept[..., None] if array.ndim == 3 else kept, array, fill)
    return filled


def _move_points(matrix, points):
    """Moves points (..., 2) by a matrix (3, 3)."""
    x, y = points[..., 0], points[..., 1]
    (a, b, right), (c, d, down) = matrix[0], matrix[1]
    return jnp.stack([a * x + b * y + right, c * x + d * y + down], axis=-1)


def _move_boxes(matrix, boxes):
    """Returns the boxes (o, 4) around the moved corners of boxes (o, 4)."""
    corners = boxes[:, np.array([[0, 1], [2, 1], [0, 3], [2, 3]])]
    corners = _move_points(matrix, corners)  # (o, 4, 2)
    return jnp.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=-1)


def area_of(boxes: Any) -> Any:
    """Returns the areas (...) of boxes (..., 4), a JAX or NumPy array."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


# --- Reading the pixels of one image ---
# Under vmap the compiler knows that an example's pixels come from that example. With the example as
# an index of the gather, each device that shares a batch would fetch the whole batch.


def _source(matrix, size, samples=1):
    """Returns the rows y and columns x of the input that each pixel of the output reads.

    Both have the shape `size`, times `samples` in each axis.
    """
    places = ((jnp.arange(side * samples, dtype=jnp.float32) + 0.5) / samples for side in size)
    y, x = jnp.meshgrid(*places, indexing="ij")
    back = _move_points(_inverse(matrix), jnp.stack([x, y], axis=-1)) - 0.5
    return back[..., 1], back[..., 0]


def _mean_of_blocks(images, samples):
    b, h, w, c = images.shape
    blocks = images.reshape(b, h // samples, samples, w // samples, samples, c)
    return blocks.mean(axis=(2, 4))


def _bilinear(image, y, x, mode, fill=0):
    """Interpolates `image` at the fractional rows y and columns x, both (h, w)."""
    # dm_pix.affine_transform also interpolates between channels: on the CPU it takes 80 times as
    # long (20 times with its mode "reflect").
    top, left = jnp.floor(y), jnp.floor(x)
    down, right = (y - top)[..., None], (x - left)[..., None]
    row, col = top.astype(jnp.int32), left.astype(jnp.int32)
    read = functools.partial(read_pixels, image, mode=mode, fill=fill)
    upper = _blend(read(row, col), read(row, col + 1), right)
    row = row + 1
    lower = _blend(read(row, col), read(row, col + 1), right)
    return _blend(upper, lower, down)


def read_pixels(
    image: jax.Array, rows: jax.Array, cols: jax.Array, mode: str, fill: float = 0
) -> jax.Array:
    """Returns image[rows, cols]; outside the image a mirrored pixel or `fill`, by `mode`."""
    # One gather of whole pixels from the unpadded image: on the CPU a crop takes a fifth of the
    # time of a padded copy and a dynamic_slice.
    h, w, _ = image.shape
    if mode == "reflect":
        return image.at[_reflect(rows, h), _reflect(cols, w)].get(mode="promise_in_bounds")
    inside = (rows >= 0) & (rows < h) & (cols >= 0) & (cols < w)
    # Without the clip, row -1 would be the last row.
    nearest = image.at[jnp.clip(rows, 0, h - 1), jnp.clip(cols, 0, w - 1)]
    return jnp.where(inside[..., None], nearest.get(mode="promise_in_bounds"), fill)


def _reflect(i, size):
    """Returns the position of pixel i in an image that is continued by its mirror images."""
    period = max(1, 2 * (size - 1))
    return jnp.minimum(i % period, period - i % period)
