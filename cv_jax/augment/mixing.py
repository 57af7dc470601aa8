"""Augmentations that hide a part of an image or mix two examples."""

import jax
import jax.numpy as jnp

from cv_jax.augment.common import (
    IMAGE_AND_LABEL,
    MAX_PIXELS,
    Augment,
    Fields,
    _blend,
    _integers,
    _require_pixels,
    image_size,
    map_images,
    map_masks,
    num_rows,
    select,
)
from cv_jax.augment.warp import IGNORED, MIN_AREA, area_of, keep_boxes
from cv_jax.config.calls import require


def cutout(
    size: int,
    fill: float = 0.5,
    *,
    fields: Fields = IMAGE_AND_LABEL,
    min_area: float = MIN_AREA,
) -> Augment:
    """Hides a square of `size` pixels; its centre is uniform over the image, so borders cut it.

    Hidden pixels of a mask are 255. A box is dropped if less than `min_area` of it stays visible.

    Args:
        size: side of the square in pixels.
        fill: value inside the square; the default is mid-grey, near the mean of most data sets.

    Source: arXiv 1708.04552.
    """
    _require_pixels("size", size, most=MAX_PIXELS)
    require(lambda: 0 <= fill <= 1, f"fill={fill} must lie in [0, 1]")

    def op(key, batch):
        image_hw = image_size(batch, fields)
        sides = jnp.full((num_rows(batch, fields), 2), size, jnp.int32)
        corners = _random_patch(key, sides, image_hw)
        hidden = _pixels_between(*corners, image_hw)
        changed = map_images(lambda image: jnp.where(hidden, fill, image), batch, fields)
        changed |= map_masks(lambda mask: jnp.where(hidden, IGNORED, mask), batch, fields)
        for boxes in select(batch, fields, "boxes").values():
            area = area_of(boxes)
            seen = area - _area_between(*corners, boxes)
            changed |= keep_boxes(batch, seen, area, fields, min_area)
        return {**batch, **changed}

    return op


def _random_patch(key, sides, size):
    """Draws patches of `sides` (b, 2) pixels; returns their corners (y, x) begin and end, (b, 2).

    The patch begins half its side, rounded down, before a pixel that is uniform over the image.
    """
    center = _integers(key, sides.shape, jnp.array([size], jnp.float32))
    begin = center - sides // 2
    return begin, begin + sides


def _pixels_between(begin, end, size):
    """Returns a mask (b, h, w, 1), true in the patch between the corners."""
    h, w = size
    i = jnp.arange(max(h, w))[None, None]
    inside = (begin[:, :, None] <= i) & (i < end[:, :, None])  # (b, 2, max(h, w))
    return inside[:, 0, :h, None, None] & inside[:, 1, None, :w, None]


def _area_between(begin, end, boxes):
    """Returns the area (b, o) of boxes (b, o, 4) that lies in the patch between the corners."""
    first, last = (i[:, None, ::-1].astype(boxes.dtype) for i in (begin, end))  # x, y
    sides = jnp.minimum(boxes[..., 2:], last) - jnp.maximum(boxes[..., :2], first)
    return jnp.prod(jnp.maximum(sides, 0), axis=-1)


# --- Two examples in one ---
# The partner of an example is the next in the batch: the order of the data is already random, and
# devices that share the batch send only one example each.

_MIXED = ("image", "clip", "label")
_UNCHANGED = ("group", "size")  # fields that a mixed example keeps


def mixup(alpha: float = 0.2, *, fields: Fields = IMAGE_AND_LABEL) -> Augment:
    """Mixes image and label with the next example's: lam own + (1 - lam) next.

    lam is drawn from Beta(alpha, alpha) for each example. Source: arXiv 1710.09412.
    """
    _require_beta(alpha)
    _require_mixable(fields)

    def op(key, batch):
        own = jax.random.beta(key, alpha, alpha, (num_rows(batch, fields),), jnp.float32)

        def mix(array):
            return _blend(_next(array), array, own.reshape(-1, *[1] * (array.ndim - 1)))

        labels = {name: mix(batch[name]) for name in _labels(fields)}
        return {**batch, **map_images(mix, batch, fields), **labels}

    return op


def cutmix(alpha: float = 1.0, *, fields: Fields = IMAGE_AND_LABEL) -> Augment:
    """Pastes a box of the next example into the image; labels mix by the visible areas.

    The box has the image's shape and the share 1 - lam of its area, before its sides are rounded
    down to pixels and the border cuts it. lam is drawn from Beta(alpha, alpha) for each example;
    the centre is uniform over the image. Source: arXiv 1905.04899.
    """
    _require_beta(alpha)
    _require_mixable(fields)

    def op(key, batch):
        size = image_size(batch, fields)
        size_key, place_key = jax.random.split(key)
        lam = jax.random.beta(size_key, alpha, alpha, (num_rows(batch, fields),), jnp.float32)
        sides = jnp.sqrt(1 - lam)[:, None] * jnp.array([size], jnp.float32)
        corners = _random_patch(place_key, sides.astype(jnp.int32), size)
        pasted = _pixels_between(*corners, size)
        share = jnp.mean(pasted, axis=(1, 2), dtype=jnp.float32)  # (b, 1)
        images = map_images(lambda x: jnp.where(pasted, _next(x), x), batch, fields)
        labels = {name: _blend(batch[name], _next(batch[name]), share) for name in _labels(fields)}
        return {**batch, **images, **labels}

    return op


def _labels(fields):
    return [name for name, field in fields.items() if field.kind == "label"]


def _next(array):
    return jnp.roll(array, -1, axis=0)


def _require_mixable(fields):
    """Raises ValueError if a field cannot be mixed, or if there is no label."""
    others = [n for n, field in fields.items() if field.kind not in (*_MIXED, *_UNCHANGED)]
    message = f"it mixes images and labels, but cannot mix {', '.join(others)}: remove it"
    require(lambda: not others, message)
    require(lambda: bool(_labels(fields)), "it mixes labels, but the task has none: remove it")


def _require_beta(alpha):
    require(lambda: 1e-3 <= alpha <= 1e6, f"alpha={alpha} must lie in [0.001, 1e6]")
