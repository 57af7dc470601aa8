"""Augmentations that hide a part of an image or mix two examples."""

import jax
import jax.numpy as jnp

from cv_jax.augment.common import (
    IMAGE_AND_LABEL,
    MAX_PIXELS,
    Augment,
    Fields,
    _blend,
    _happens,
    _integers,
    _require_pixels,
    image_size,
    map_images,
    map_masks,
    num_rows,
    select,
)
from cv_jax.augment.geometry import draw_boxes
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
        return _hide(batch, corners, lambda image: fill, fields, min_area)

    return op


def random_erasing(
    p: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 10 / 3),
    fill: float | str = "noise",
    *,
    fields: Fields = IMAGE_AND_LABEL,
    min_area: float = MIN_AREA,
) -> Augment:
    """Hides a box of random area, shape and place with probability p.

    With S the image's area, s uniform in `area`, and r of a uniform logarithm in `ratio`, the box
    is sqrt(s S / r) high and sqrt(s S r) wide, rounded to pixels. The box lies wholly inside the
    image, at a uniform place. The first of ten boxes that fits is taken; if none fits, nothing is
    hidden. Masks and boxes change as in `cutout`.

    Args:
        p: the probability that a box is hidden.
        area: (low, high) of the box's share of the image's area.
        ratio: (low, high) of the box's width / height.
        fill: the value inside the box, 0 to 1, such as 0 for black; "noise": each value is uniform
            in [0, 1].

    Source: Z. Zhong et al., "Random Erasing Data Augmentation", arXiv 1708.04896, algorithm 1,
    where r and not its logarithm is uniform. timm and torchvision draw the logarithm.
    """
    require(lambda: 0 <= p <= 1, f"p={p} must lie in [0, 1]")
    require(lambda: 0 < area[0] <= area[1] <= 1, f"area={area} must be 0 < low <= high <= 1")
    require(
        lambda: 0.01 <= ratio[0] <= ratio[1] <= 100,
        f"ratio={ratio} must be 0.01 <= low <= high <= 100",
    )
    require(
        lambda: fill == "noise" if isinstance(fill, str) else 0 <= fill <= 1,
        f"fill={fill!r} must be 'noise' or lie in [0, 1]",
    )

    def op(key, batch):
        h, w = image_size(batch, fields)
        b = num_rows(batch, fields)
        p_key, box_key, place_key, noise_key = jax.random.split(key, 4)
        sides, fits = draw_boxes(box_key, b, h, w, area, ratio)
        chosen = fits & _happens(p_key, p, (b,))
        sides = jnp.where(chosen[:, None], jnp.round(sides).astype(jnp.int32), 0)
        room = jnp.array([[h, w]], jnp.int32) - sides
        begin = _integers(place_key, (b, 2), room.astype(jnp.float32) + 1)

        def inside(image):
            return jax.random.uniform(noise_key, image.shape) if isinstance(fill, str) else fill

        return _hide(batch, (begin, begin + sides), inside, fields, min_area)

    return op


def _hide(batch, corners, inside, fields, min_area):
    """Returns the batch with inside(image) in the patch of each image (b, h, w, c)."""
    hidden = _pixels_between(*corners, image_size(batch, fields))
    changed = map_images(lambda image: jnp.where(hidden, inside(image), image), batch, fields)
    changed |= map_masks(lambda mask: jnp.where(hidden, IGNORED, mask), batch, fields)
    for boxes in select(batch, fields, "boxes").values():
        area = area_of(boxes)
        seen = area - _area_between(*corners, boxes)
        changed |= keep_boxes(batch, seen, area, fields, min_area)
    return {**batch, **changed}


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

_MIXED = ("image", "clip", "label", "labels")
_UNCHANGED = ("group", "size")  # fields that a mixed example keeps


def mixup(alpha: float = 0.2, *, fields: Fields = IMAGE_AND_LABEL) -> Augment:
    """Mixes image and label with the next example's: lam own + (1 - lam) next.

    lam is drawn from Beta(alpha, alpha) for each example. `labels` of several classes and values,
    such as the target of a regression, mix alike. Source: arXiv 1710.09412.
    """
    _require_beta(alpha)
    _require_mixable(fields, "values")

    def op(key, batch):
        own = jax.random.beta(key, alpha, alpha, (num_rows(batch, fields),), jnp.float32)

        def mix(array):
            return _blend(_next(array), array, _beside(own, array))

        labels = {name: mix(batch[name]) for name in _labels(fields, "values")}
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


def mixup_or_cutmix(
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    p: float = 0.5,
    *,
    fields: Fields = IMAGE_AND_LABEL,
) -> Augment:
    """Applies `cutmix` with probability p, else `mixup`; the choice is drawn for each example.

    The chain "mixup|cutmix" applies both. timm's Mixup chooses for a whole batch in its mode
    "batch", and for each example in its mode "elem"; p is its `switch_prob`.

    Args:
        mixup_alpha: alpha of `mixup`.
        cutmix_alpha: alpha of `cutmix`.
        p: the probability of `cutmix`.
    """
    require(lambda: 0 <= p <= 1, f"p={p} must lie in [0, 1]")
    mix, paste = mixup(mixup_alpha, fields=fields), cutmix(cutmix_alpha, fields=fields)

    def op(key, batch):
        p_key, mix_key, paste_key = jax.random.split(key, 3)
        chosen = _happens(p_key, p, (num_rows(batch, fields),))
        mixed, pasted = mix(mix_key, batch), paste(paste_key, batch)

        def choose(name):
            return jnp.where(_beside(chosen, batch[name]), pasted[name], mixed[name])

        return {**batch, **{name: choose(name) for name in select(batch, fields, *_MIXED)}}

    return op


def _labels(fields, *others):
    return [name for name, field in fields.items() if field.kind in ("label", "labels", *others)]


def _next(array):
    return jnp.roll(array, -1, axis=0)


def _beside(values, array):
    """Returns values (b,) with as many axes as the array (b, ...)."""
    return values.reshape(-1, *[1] * (array.ndim - 1))


def _require_mixable(fields, *others):
    """Raises ValueError if a field cannot be mixed, or if there is no label.

    Args:
        fields: the batch's fields.
        others: kinds that can be mixed, beside images and labels.
    """
    mixed = (*_MIXED, *_UNCHANGED, *others)
    left = [name for name, field in fields.items() if field.kind not in mixed]
    message = f"it mixes images and labels, but cannot mix {', '.join(left)}: remove it"
    require(lambda: not left, message)
    has_label = bool(_labels(fields, *others))
    require(lambda: has_label, "it mixes labels, but the task has none: remove it")


def _require_beta(alpha):
    require(lambda: 1e-3 <= alpha <= 1e6, f"alpha={alpha} must lie in [0.001, 1e6]")
