"""Geometric augmentations: move the pixels of an example, and all other fields with them.

`flip`, `alternating_flip`, `crop` and `random_resized_crop` have their own exact or antialiased
pixel code. Each of the others is a `Motion`, one matrix an example; a chain resamples neighbouring
motions once. For the fields of a batch see common.py.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cv_jax.augment.common import (
    IMAGE_AND_LABEL,
    MAX_PIXELS,
    SPATIAL_AXES,
    Augment,
    Batch,
    Fields,
    _happens,
    _integers,
    _require_mode,
    _require_pixels,
    image_size,
    map_images,
    map_masks,
    num_rows,
)
from cv_jax.augment.warp import (
    IGNORED,
    MIN_AREA,
    compose,
    mirror,
    move_coordinates,
    move_masks,
    outside,
    quarter_turn,
    read_pixels,
    resize,
    rotation,
    scaling,
    shearing,
    translation,
    warp,
)
from cv_jax.config.calls import require
from cv_jax.config.errors import UserError
from cv_jax.data.fields import has_kind

# --- Mirror images ---


def flip(p: float = 0.5, vertical: bool = False, *, fields: Fields = IMAGE_AND_LABEL) -> Augment:
    """Mirrors an example left to right, or top to bottom if `vertical`, with probability p."""
    require(lambda: 0 <= p <= 1, f"p={p} must lie in [0, 1]")

    def op(key, batch):
        flipped = _happens(key, p, (num_rows(batch, fields),))
        return _mirrored(batch, flipped, fields, vertical)

    return op


def alternating_flip(*, fields: Fields = IMAGE_AND_LABEL) -> Augment:
    """Mirrors an example in every second epoch; its coin chooses even or odd epochs.

    Any two successive epochs show both versions of every example. The parity of coin + epoch
    chooses the version, so the key is not used. Source: arXiv 2404.00498.
    """

    def op(key, batch):
        rows = batch["rows"]
        odd = (rows["coin"] + rows["epoch"].astype(jnp.uint32)) % 2 == 1
        return _mirrored(batch, odd, fields)

    return op


def _mirrored(batch, flipped, fields, vertical=False):
    """Returns the batch with its examples mirrored where `flipped` (b,) is true."""
    size = image_size(batch, fields)
    mirror_pixels = functools.partial(_mirror, flipped=flipped, axis=1 if vertical else 2)
    turned = mirror(size, vertical)
    matrix = jnp.where(flipped[:, None, None], turned[None], translation(0, 0)[None])
    return {
        **batch,
        **map_images(mirror_pixels, batch, fields),
        **map_masks(mirror_pixels, batch, fields),
        **move_coordinates(batch, matrix, size, fields, min_area=0),
    }


def _mirror(image, flipped, axis):
    return jnp.where(flipped[:, None, None, None], jnp.flip(image, axis), image)


# --- Other views of the image ---


def crop(
    padding: int,
    mode: str = "reflect",
    *,
    fields: Fields = IMAGE_AND_LABEL,
    min_area: float = MIN_AREA,
) -> Augment:
    """Pads the image by `padding` pixels on each side, then crops it back at a random place.

    The image moves by whole pixels, uniform in -padding..padding in both directions, without blur.

    Args:
        padding: pixels added on each side.
        mode: the padding outside the image: "reflect" (its mirror image, the border pixels not
            repeated) or "zero". Always "zero" with boxes or masks.
    """
    _require_pixels("padding", padding, most=256)  # _crop_by_choice needs two slices a pixel
    _require_mode(mode)
    image_mode = outside(mode, fields)

    def op(key, batch):
        size = image_size(batch, fields)
        corner = _integers(key, (num_rows(batch, fields), 2), 2 * padding + 1)
        matrix = translation(padding - corner[:, 1], padding - corner[:, 0])

        def crop_image(image):
            return _crop(image, corner, padding, image_mode)

        def crop_mask(mask):  # pads the complement with 0, which pads the mask with 255
            return IGNORED - _crop(IGNORED - mask, corner, padding, "zero")

        return {
            **batch,
            **map_images(crop_image, batch, fields),
            **map_masks(crop_mask, batch, fields),
            **move_coordinates(batch, matrix, size, fields, min_area),
        }

    return op


def _crop(image, corner, padding, mode):
    ways = {
        "cpu": functools.partial(_crop_by_gather, padding=padding, mode=mode),
        "default": functools.partial(_crop_by_choice, padding=padding, mode=mode),
    }
    return jax.lax.platform_dependent(image, corner, **ways)


def _crop_by_gather(image, corner, padding, mode):
    """Returns the crops of the padded images (b, h, w, c) with upper left pixel `corner` (b, 2)."""

    def crop_one(image, corner):
        h, w, _ = image.shape
        rows, cols = (corner[i] - padding + jnp.arange(side) for i, side in enumerate((h, w)))
        return read_pixels(image, rows[:, None], cols[None], mode)

    return jax.vmap(crop_one)(image, corner)


def _crop_by_choice(image, corner, padding, mode):
    """Returns the same crops, chosen among all possible ones, for a TPU.

    By the TPU compiler's estimate, a gather of pixels makes n94's step 3 % longer.
    """
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(image, pads, **({"mode": "reflect"} if mode == "reflect" else {}))
    for axis, start in ((1, corner[:, 0]), (2, corner[:, 1])):
        size, start = image.shape[axis], start[:, None, None, None]
        chosen = jax.lax.slice_in_dim(padded, 0, size, axis=axis)
        for i in range(1, 2 * padding + 1):
            view = jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
            chosen = jnp.where(start == i, view, chosen)
        padded = chosen
    return padded


# --- Motions: one matrix an example ---


class Motion(NamedTuple):
    """An augmentation that moves each example by its own matrix.

    Attributes:
        draw: (key, b, size) -> (matrices (b, 3, 3), the `source` of `warp` or None).
        mode: the padding outside the image: "reflect" or "zero".
        samples: samples a side in each pixel of the output; see `warp`.
        fields, min_area: see `warp`.
        size: height and width of the output; None: those of the input.
    """

    draw: Callable
    mode: str
    samples: int
    fields: Fields
    min_area: float
    size: tuple[int, int] | None = None

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        return move([self], [key], batch)


def move(motions: list[Motion], keys: list[jax.Array], batch: Batch) -> Batch:
    """Applies all motions in one resampling; all must have the same `mode` and `fields`."""
    _, mode, _, fields, min_area, _ = motions[0]
    size, b = image_size(batch, fields), num_rows(batch, fields)
    drawn = []
    for motion, key in zip(motions, keys, strict=True):
        drawn.append(motion.draw(key, b, size))
        size = motion.size or size
    samples = max(motion.samples for motion in motions)
    source = drawn[0][1] if len(drawn) == 1 and samples == 1 else None
    matrix = compose(*(matrix for matrix, _ in drawn))
    return warp(batch, matrix, size, fields, mode, min_area, samples, source)


def affine(
    degrees: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    translate: float = 0.0,
    shear: float = 0.0,
    mode: str = "reflect",
    samples: int = 1,
    *,
    fields: Fields = IMAGE_AND_LABEL,
    min_area: float = MIN_AREA,
) -> Augment:
    """Shears, scales, rotates and then moves the image, in one bilinear resampling.

    All amounts are uniform, and drawn for each example.

    Args:
        degrees: the largest rotation about the centre, either way; positive angles turn
            counter-clockwise.
        scale: (low, high) of the magnification about the centre; above 1 the image grows.
        translate: the largest shift in pixels, down and right being positive. Shifts are
            fractional (`crop` moves by whole pixels).
        shear: the largest angle in degrees, either way; a point moves right by tan(angle) times
            its distance below the centre.
        mode: the padding outside the image: "reflect" or "zero", as in `crop`.
        samples: a pixel is the mean of samples x samples values, which antialiases images that
            shrink. If `scale` begins below 1/2, use 1 / low, rounded up.
    """
    low, high = scale
    require(lambda: 0.01 <= low <= high <= 100, f"scale={scale} must be 0.01 <= low <= high <= 100")
    require(lambda: 0 <= degrees <= 360, f"degrees={degrees} must lie in [0, 360]")
    require(
        lambda: 0 <= translate <= MAX_PIXELS,
        f"translate={translate} must be pixels, 0 to {MAX_PIXELS}",
    )
    require(lambda: 0 <= shear < 90, f"shear={shear} must lie in [0, 90)")
    _require_mode(mode)
    whole = isinstance(samples, int) and 1 <= samples <= 16
    require(lambda: whole, f"samples={samples} must be a whole number, 1 to 16")

    def draw(key, b, size):
        middle = jnp.array([[0, (low + high) / 2, 0, 0, 0]], jnp.float32)
        spread = [degrees, (high - low) / 2, shear, translate, translate]
        reach = jnp.array([spread], jnp.float32)
        amounts = middle + reach * jax.random.uniform(key, (b, 5), minval=-1, maxval=1)
        return _affine_matrix(amounts, size), _affine_source(amounts, size)

    return Motion(draw, outside(mode, fields), samples, fields, min_area)


def _affine_matrix(amounts, size):
    """Returns the matrices for amounts (b, 5): degrees, scale, shear, pixels down, pixels right."""
    degrees, scale, shear, down, right = amounts.T
    return compose(
        shearing(shear, size),
        scaling(scale, size),
        rotation(degrees, size),
        translation(right, down),
    )


def _affine_source(amounts, size):
    """Returns the rows and columns (b, h, w) of the input that each pixel of the output reads.

    They equal those from the matrix up to rounding; `affine` keeps these roundings.
    """
    h, w = size

    def of_one(amounts):
        degrees, scale, shear, down, right = amounts
        cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
        center_y, center_x = (h - 1) / 2, (w - 1) / 2
        # From a pixel of the output back to the input: undo the move, the turn, shear and scale.
        y = (jnp.arange(h, dtype=jnp.float32) - center_y - down)[:, None]
        x = (jnp.arange(w, dtype=jnp.float32) - center_x - right)[None]
        y, x = cos * y + sin * x, cos * x - sin * y
        x = x - jnp.tan(jnp.deg2rad(shear)) * y
        return y / scale + center_y, x / scale + center_x

    return jax.vmap(of_one)(amounts)


def rotate(
    degrees: float,
    mode: str = "reflect",
    *,
    fields: Fields = IMAGE_AND_LABEL,
    min_area: float = MIN_AREA,
) -> Augment:
    """Turns the image by up to `degrees` either way: `affine` with rotation only."""
    return affine(degrees=degrees, mode=mode, fields=fields, min_area=min_area)


def scale(
    low: float,
    high: float,
    mode: str = "reflect",
    samples: int = 1,
    *,
    fields: Fields = IMAGE_AND_LABEL,
    min_area: float = MIN_AREA,
) -> Augment:
    """Magnifies the image by a factor in [low, high]: `affine` with scale only."""
    reach = (low, high)
    return affine(scale=reach, mode=mode, samples=samples, fields=fields, min_area=min_area)


def translate(
    pixels: float,
    mode: str = "reflect",
    *,
    fields: Fields = IMAGE_AND_LABEL,
    min_area: float = MIN_AREA,
) -> Augment:
    """Moves the image by up to `pixels` in each direction: `affine` with translation only."""
    return affine(translate=pixels, mode=mode, fields=fields, min_area=min_area)


def random_crop(
    size: int | tuple[int, int],
    *,
    fields: Fields = IMAGE_AND_LABEL,
    min_area: float = MIN_AREA,
) -> Augment:
    """Cuts out a part of `size` pixels at a random place, without resizing.

    After `affine` or another motion, both are one resampling. An image smaller than `size` is put
    at a random place of the result, with the padding of `warp` around it.

    Args:
        size: height and width of the part in pixels, or one number for both.
    """
    size = tuple(size) if isinstance(size, tuple | list) else (size, size)
    whole = len(size) == 2 and all(isinstance(x, int) and 1 <= x <= MAX_PIXELS for x in size)
    require(lambda: whole, f"size={size} must be one or two whole numbers of pixels")

    def draw(key, b, before):
        room = np.float32([[have - want for have, want in zip(before, size, strict=True)]])
        # Whole pixels, so that the part is exact unless another motion joins in.
        corner = jnp.floor((np.abs(room) + 1) * jax.random.uniform(key, (b, 2)))
        corner = np.sign(room) * jnp.minimum(corner, np.abs(room))
        return translation(-corner[:, 1], -corner[:, 0]), None

    return Motion(draw, outside("reflect", fields), 1, fields, min_area, size)


def rot90(*, fields: Fields = IMAGE_AND_LABEL, min_area: float = MIN_AREA) -> Augment:
    """Turns a square image by 0, 1, 2 or 3 quarter turns, equally likely, without resampling."""

    def draw(key, b, size):
        if size[0] != size[1]:
            raise UserError(
                f"config.augment: 'rot90' needs square images; these have {size[0]}x{size[1]} "
                "pixels: remove it, or put random_resized_crop with a square size before it."
            )
        turn = quarter_turn(size)[None]
        stay = translation(0, 0)[None]
        turns = jnp.concatenate([compose(stay, *[turn] * count) for count in range(4)])
        count = _integers(key, (b,), 4)
        return turns.at[count].get(mode="promise_in_bounds"), None

    # A quarter turn reads no pixel outside the image, so all modes agree; "reflect" is the default.
    return Motion(draw, outside("reflect", fields), 1, fields, min_area)


# --- Boxes cut out and resized ---


def random_resized_crop(
    size: int | tuple[int, int] | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (0.75, 4 / 3),
    *,
    fields: Fields = IMAGE_AND_LABEL,
    min_area: float = MIN_AREA,
) -> Augment:
    """Cuts out a box of random area, shape and place, and resizes it (bilinear, antialiased).

    Ten boxes are drawn, and the first that fits into the image is taken. If none fits, the largest
    box of an allowed shape is taken. Boxes have fractional borders.

    Args:
        size: height and width of the result in pixels; None: those of the image.
        scale: (low, high) of the box's share of the image's area, drawn uniformly.
        ratio: (low, high) of the box's width / height, with a uniform logarithm.

    Source: arXiv 1409.4842, section 6.
    """
    if isinstance(size, int):
        size = (size, size)
    require(
        lambda: size is None or all(1 <= n <= MAX_PIXELS for n in size),
        f"size={size} must be one or two whole numbers of pixels, 1 to {MAX_PIXELS}",
    )
    require(lambda: 0 < scale[0] <= scale[1] <= 1, f"scale={scale} must be 0 < low <= high <= 1")
    require(
        lambda: 0.01 <= ratio[0] <= ratio[1] <= 100,
        f"ratio={ratio} must be 0.01 <= low <= high <= 100",
    )

    require(
        lambda: has_kind(fields, *SPATIAL_AXES),
        "it needs examples with an image, a clip or a mask",
    )

    def op(key, batch):
        h, w = image_size(batch, fields)
        new_size = size or (h, w)
        b = num_rows(batch, fields)
        shape_key, place_key = jax.random.split(key)
        extent = _box_shapes(shape_key, b, h, w, scale, ratio)
        room = jnp.array([[h, w]], jnp.float32) - extent
        corner = room * jax.random.uniform(place_key, (b, 2))
        to_corner = translation(-corner[:, 1], -corner[:, 0])
        matrix = compose(to_corner, resize((extent[:, 0], extent[:, 1]), new_size))

        def resize_image(image):
            return _resize_boxes(image, corner, extent, new_size)

        return {
            **batch,
            **map_images(resize_image, batch, fields),
            **move_masks(batch, matrix, new_size, fields),
            **move_coordinates(batch, matrix, new_size, fields, min_area),
        }

    return op


def _box_shapes(key, b, h, w, scale, ratio):
    """Draws the heights and widths, (b, 2), of the boxes of `random_resized_crop`."""
    taken, fits = draw_boxes(key, b, h, w, scale, ratio)
    nearest = min(max(w / h, ratio[0]), ratio[1])
    largest = jnp.array([min(h, w / nearest), min(w, h * nearest)], jnp.float32)
    return jnp.where(fits[:, None], taken, largest[None])


def draw_boxes(
    key: jax.Array,
    b: int,
    h: int,
    w: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[jax.Array, jax.Array]:
    """Draws a box for each example: its height and width (b, 2), and whether it fits (b,).

    It is the first of ten boxes that fits into h x w pixels. The share of the area is uniform
    between the two numbers of `scale`, and so is the logarithm of width / height in `ratio`.
    """
    area_key, ratio_key = jax.random.split(key)
    area = h * w * jax.random.uniform(area_key, (b, 10), minval=scale[0], maxval=scale[1])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = jnp.exp(jax.random.uniform(ratio_key, (b, 10), minval=low, maxval=high))
    drawn = jnp.sqrt(jnp.stack([area / aspect, area * aspect], axis=-1))  # (b, 10, 2)
    fits = jnp.all(drawn <= jnp.array([[[h, w]]], jnp.float32), axis=-1)
    first = jnp.argmax(fits, axis=1)[:, None, None]
    return jnp.take_along_axis(drawn, first, axis=1)[:, 0], jnp.any(fits, axis=1)


def _resize_boxes(image, corner, extent, size):
    """Resizes the box of each image at `corner` (y, x) with `extent` (h, w), both (b, 2)."""
    magnify = jnp.array([size], jnp.float32) / extent

    def resize(image, magnify, corner):
        shape = (*size, image.shape[-1])
        shift = -corner * magnify
        return jax.image.scale_and_translate(image, shape, (0, 1), magnify, shift, "linear")

    return jax.vmap(resize)(image, magnify, corner)
