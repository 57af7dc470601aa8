"""Augmentations that hide a part of an image or mix two examples."""

import jax
import jax.numpy as jnp

from cv_jax.augment.common import MAX_PIXELS, Augment, _blend, _integers, _require_pixels
from cv_jax.config.calls import require


def cutout(size: int, fill: float = 0.5) -> Augment:
    """Hides a square of `size` pixels; its centre is uniform over the image, so borders cut it.

    Args:
        size: side of the square in pixels.
        fill: value inside the square; the default is mid-grey, near the mean of most data sets.

    Source: arXiv 1708.04552.
    """
    _require_pixels("size", size, most=MAX_PIXELS)
    require(lambda: 0 <= fill <= 1, f"fill={fill} must lie in [0, 1]")

    def op(key, batch):
        sides = jnp.full((len(batch["image"]), 2), size, jnp.int32)
        hidden = _random_patch(key, batch["image"].shape, sides)
        return {**batch, "image": jnp.where(hidden, fill, batch["image"])}

    return op


def _random_patch(key, shape, sides):
    """A mask (b, h, w, 1), true in a patch of `sides` (b, 2) pixels (height, width).

    The patch begins half its side, rounded down, before a pixel that is uniform over the image.
    """
    b, h, w, _ = shape
    center = _integers(key, (b, 2), jnp.array([[h, w]], jnp.float32))
    begin = (center - sides // 2)[:, :, None]
    end = begin + sides[:, :, None]
    i = jnp.arange(max(h, w))[None, None]
    inside = (begin <= i) & (i < end)  # (b, 2, max(h, w))
    return inside[:, 0, :h, None, None] & inside[:, 1, None, :w, None]


def mixup(alpha: float = 0.2) -> Augment:
    """Mixes image and label with the next example's: lam own + (1 - lam) next.

    lam is drawn from Beta(alpha, alpha) for each example. Source: arXiv 1710.09412.
    """
    _require_beta(alpha)

    def op(key, batch):
        image, label = batch["image"], batch["label"]
        own = jax.random.beta(key, alpha, alpha, (len(image),), jnp.float32)
        mixed_image = _blend(_next(image), image, own[:, None, None, None])
        mixed_label = _blend(_next(label), label, own[:, None])
        return {**batch, "image": mixed_image, "label": mixed_label}

    return op


def cutmix(alpha: float = 1.0) -> Augment:
    """Pastes a box of the next example into the image; labels mix by the areas that are seen.

    The box has the shape of the image and, before the border cuts it and its sides are rounded
    down to pixels, the share 1 - lam of its area, where lam is drawn from Beta(alpha, alpha) for
    each example; its centre is uniform over the image. Source: arXiv 1905.04899.
    """
    _require_beta(alpha)

    def op(key, batch):
        image, label = batch["image"], batch["label"]
        _, h, w, _ = image.shape
        size_key, place_key = jax.random.split(key)
        lam = jax.random.beta(size_key, alpha, alpha, (len(image),), jnp.float32)
        sides = jnp.sqrt(1 - lam)[:, None] * jnp.array([[h, w]], jnp.float32)
        pasted = _random_patch(place_key, image.shape, sides.astype(jnp.int32))
        share = jnp.mean(pasted, axis=(1, 2), dtype=jnp.float32)  # (b, 1)
        mixed_image = jnp.where(pasted, _next(image), image)
        mixed_label = _blend(label, _next(label), share)
        return {**batch, "image": mixed_image, "label": mixed_label}

    return op


def _next(array):
    return jnp.roll(array, -1, axis=0)


def _require_beta(alpha):
    require(lambda: 1e-3 <= alpha <= 1e6, f"alpha={alpha} must lie in [0.001, 1e6]")
