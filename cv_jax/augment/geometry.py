"""Augmentations: pure functions (key, batch) -> batch that run inside the jitted train step.

A batch is a dict of arrays:
    image: (b, h, w, c) float32 in [0, 1], not yet normalised.
    label: (b, n) float32 class probabilities.
    index: (b,) int32, the example's position in the training set.
    epoch: (b,) int32, the epoch that the example is drawn in.
    coin: (b,) uint32, random bits that belong to the example for the whole run.

Every example has its own randomness. An op reads and replaces only the entries that it names, so
batches without labels can be augmented too. One string composes the ops, in order: see
`make_augment`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from cv_jax.augment.common import (
    MAX_PIXELS,
    Augment,
    _blend,
    _happens,
    _integers,
    _require_mode,
    _require_pixels,
)
from cv_jax.config.calls import require

# --- Mirror images ---


def flip(p: float = 0.5) -> Augment:
    """Mirrors an image left to right with probability p."""
    require(lambda: 0 <= p <= 1, f"p={p} must lie in [0, 1]")

    def op(key, batch):
        flipped = _happens(key, p, batch["image"].shape[:1])
        return {**batch, "image": _mirror(batch["image"], flipped)}

    return op


def alternating_flip() -> Augment:
    """Mirrors an image in every second epoch; the example's coin decides whether in the even ones.

    Any two successive epochs thus show both versions of every image. Needs no key: which version
    is shown is the parity of coin + epoch. Source: arXiv 2404.00498.
    """

    def op(key, batch):
        rows = batch["rows"]
        odd = (rows["coin"] + rows["epoch"].astype(jnp.uint32)) % 2 == 1
        return {**batch, "image": _mirror(batch["image"], odd)}

    return op


def _mirror(image, flipped):
    return jnp.where(flipped[:, None, None, None], image[:, :, ::-1], image)


# --- Other views of the image ---


def crop(padding: int, mode: str = "reflect") -> Augment:
    """Pads the image by `padding` pixels on each side, then crops it back at a random place.

    That moves it by whole pixels, uniform in -padding..padding in both directions, without blur.

    Args:
        padding: pixels.
        mode: what lies outside the image: "reflect" (its mirror image, the border pixels not
            repeated) or "zero".
    """
    _require_pixels("padding", padding, most=256)  # by choice, each pixel is two slices more
    _require_mode(mode)

    def op(key, batch):
        corner = _integers(key, (len(batch["image"]), 2), 2 * padding + 1)
        ways = {
            "cpu": functools.partial(_crop_by_gather, padding=padding, mode=mode),
            "default": functools.partial(_crop_by_choice, padding=padding, mode=mode),
        }
        image = jax.lax.platform_dependent(batch["image"], corner, **ways)
        return {**batch, "image": image}

    return op


def _crop_by_gather(image, corner, padding, mode):
    """The crops of the padded images (b, h, w, c) whose upper left pixel is `corner` (b, 2)."""

    def crop_one(image, corner):
        h, w, _ = image.shape
        rows, cols = (corner[i] - padding + jnp.arange(side) for i, side in enumerate((h, w)))
        return _pixels(image, rows[:, None], cols[None], mode)

    return jax.vmap(crop_one)(image, corner)


def _crop_by_choice(image, corner, padding, mode):
    """The same, from all crops that there are, for a TPU: by its compiler's account a gather of
    pixels makes n94's step 3 % longer."""
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


def affine(
    degrees: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    translate: float = 0.0,
    shear: float = 0.0,
    mode: str = "reflect",
) -> Augment:
    """Shears, scales, rotates and then moves the image, in one bilinear resampling.

    All draws are uniform, and one of each is made for an example.

    Args:
        degrees: the image turns about its centre by up to this angle either way; positive angles
            turn counter-clockwise.
        scale: (low, high) of the magnification about the centre; above 1 the image grows.
        translate: the image moves by up to this many pixels in each direction, down and right
            being positive; the amounts are fractional (`crop` moves by whole pixels).
        shear: up to this angle in degrees either way; a point moves right by tan(angle) times its
            height below the centre.
        mode: what lies outside the image: "reflect" or "zero", as in `crop`.
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

    def op(key, batch):
        middle = jnp.array([[0, (low + high) / 2, 0, 0, 0]], jnp.float32)
        spread = [degrees, (high - low) / 2, shear, translate, translate]
        reach = jnp.array([spread], jnp.float32)
        draws = jax.random.uniform(key, (len(batch["image"]), 5), minval=-1, maxval=1)
        transform = functools.partial(_affine, mode=mode)
        return {**batch, "image": jax.vmap(transform)(batch["image"], middle + reach * draws)}

    return op


def rotate(degrees: float, mode: str = "reflect") -> Augment:
    """Turns the image by up to `degrees` either way: `affine` with rotation alone."""
    return affine(degrees=degrees, mode=mode)


def scale(low: float, high: float, mode: str = "reflect") -> Augment:
    """Magnifies the image by a factor in [low, high]: `affine` with scale alone."""
    return affine(scale=(low, high), mode=mode)


def translate(pixels: float, mode: str = "reflect") -> Augment:
    """Moves the image by up to `pixels` in each direction: `affine` with translation alone."""
    return affine(translate=pixels, mode=mode)


def random_resized_crop(
    size: int | tuple[int, int] | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (0.75, 4 / 3),
) -> Augment:
    """Cuts out a box of random area, shape and place, and resizes it (bilinear, antialiased).

    Ten boxes are drawn and the first that fits into the image is taken; should none fit, the
    largest box whose shape is allowed. Boxes have fractional borders.

    Args:
        size: height and width of the result in pixels; None keeps those of the image.
        scale: (low, high) of the box's share of the image's area, drawn uniformly.
        ratio: (low, high) of the box's width / height; its logarithm is drawn uniformly.

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

    def op(key, batch):
        b, h, w, _ = batch["image"].shape
        shape_key, place_key = jax.random.split(key)
        extent = _box_shapes(shape_key, b, h, w, scale, ratio)
        room = jnp.array([[h, w]], jnp.float32) - extent
        corner = room * jax.random.uniform(place_key, (b, 2))
        return {**batch, "image": _resize_boxes(batch["image"], corner, extent, size or (h, w))}

    return op


def _box_shapes(key, b, h, w, scale, ratio):
    """Heights and widths, (b, 2), of the boxes of `random_resized_crop`."""
    area_key, ratio_key = jax.random.split(key)
    area = h * w * jax.random.uniform(area_key, (b, 10), minval=scale[0], maxval=scale[1])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = jnp.exp(jax.random.uniform(ratio_key, (b, 10), minval=low, maxval=high))
    drawn = jnp.sqrt(jnp.stack([area / aspect, area * aspect], axis=-1))  # (b, 10, 2)
    nearest = min(max(w / h, ratio[0]), ratio[1])
    largest = jnp.array([min(h, w / nearest), min(w, h * nearest)], jnp.float32)
    fits = jnp.all(drawn <= jnp.array([[[h, w]]], jnp.float32), axis=-1)
    first = jnp.argmax(fits, axis=1)[:, None, None]
    taken = jnp.take_along_axis(drawn, first, axis=1)[:, 0]
    return jnp.where(jnp.any(fits, axis=1)[:, None], taken, largest[None])


def _resize_boxes(image, corner, extent, size):
    """Resizes the box of each image at `corner` (y, x) with `extent` (h, w), both (b, 2)."""
    magnify = jnp.array([size], jnp.float32) / extent

    def resize(image, magnify, corner):
        shape = (*size, image.shape[-1])
        shift = -corner * magnify
        return jax.image.scale_and_translate(image, shape, (0, 1), magnify, shift, "linear")

    return jax.vmap(resize)(image, magnify, corner)


# --- Parts hidden, colours changed ---


# --- Two examples in one ---
# The partner of an example is the next one of its batch: the order of the data is random already,
# and a roll by one is all that devices which share the batch must send.


# --- Resampling of one image ---
# Under vmap the compiler knows that an example's pixels come from that example; were the example
# an index of the gather, devices that share a batch would each fetch all of it.


def _affine(image, amounts, mode):
    """`affine` by given amounts: degrees, scale, shear, pixels down, pixels right."""
    h, w, _ = image.shape
    degrees, scale, shear, down, right = amounts
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    center_y, center_x = (h - 1) / 2, (w - 1) / 2
    # From a pixel of the result back to where it came from: undo the move, the turn, the rest.
    y = (jnp.arange(h, dtype=jnp.float32) - center_y - down)[:, None]
    x = (jnp.arange(w, dtype=jnp.float32) - center_x - right)[None]
    y, x = cos * y + sin * x, cos * x - sin * y
    x = x - jnp.tan(jnp.deg2rad(shear)) * y
    return _bilinear(image, y / scale + center_y, x / scale + center_x, mode)


def _bilinear(image, y, x, mode):
    """Values of `image` at the fractional rows y and columns x, both (h, w)."""
    # dm_pix.affine_transform also interpolates between channels: on the CPU it takes 80 times as
    # long (20 times with its mode "reflect").
    top, left = jnp.floor(y), jnp.floor(x)
    down, right = (y - top)[..., None], (x - left)[..., None]
    row, col = top.astype(jnp.int32), left.astype(jnp.int32)
    upper = _blend(_pixels(image, row, col, mode), _pixels(image, row, col + 1, mode), right)
    row = row + 1
    lower = _blend(_pixels(image, row, col, mode), _pixels(image, row, col + 1, mode), right)
    return _blend(upper, lower, down)


def _pixels(image, rows, cols, mode):
    """image[rows, cols], where rows and columns outside the image are filled as `mode` says."""
    # One gather of whole pixels from the image as it is: on the CPU a crop takes a fifth of the
    # time of a padded copy and a dynamic_slice from it.
    h, w, _ = image.shape
    if mode == "reflect":
        return image.at[_reflect(rows, h), _reflect(cols, w)].get(mode="promise_in_bounds")
    inside = (rows >= 0) & (rows < h) & (cols >= 0) & (cols < w)
    nearest = image.at[jnp.clip(rows, 0, h - 1), jnp.clip(cols, 0, w - 1)]
    return jnp.where(inside[..., None], nearest.get(mode="promise_in_bounds"), 0)


def _reflect(i, size):
    """Where pixel i is found when the image is continued by its mirror images for ever."""
    period = max(1, 2 * (size - 1))
    return jnp.minimum(i % period, period - i % period)


# --- Draws and arguments ---
