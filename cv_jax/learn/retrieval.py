"""Finds an image by a part of it: a measure of features that needs no labels."""

import jax
import numpy as np

from cv_jax.learn.inputs import to_unit

CORNER = 0.75  # height and width of a corner, beside those of the image


def corner(image: jax.Array, last: bool) -> jax.Array:
    """Cuts the upper left (`last`: lower right) 75 % x 75 % out of images (b, h, w, c).

    The result has the size of `image`, and is float32 in [0, 1].
    """
    h, w = (max(1, round(CORNER * side)) for side in image.shape[1:3])
    part = image[:, -h:, -w:] if last else image[:, :h, :w]
    return jax.image.resize(to_unit(part), image.shape, "bilinear")


def found_again(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the share of images whose features `second` are most like their own `first`.

    Both are (m, d); likeness is the cosine. An image is not found if another
    image's `first` is as like, so that equal features of all images give 0.
    """
    first, second = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (first, second)
    )
    found = 0
    for start in range(0, len(second), 1000):  # so that large splits fit into memory
        like = second[start : start + 1000] @ first.T
        own = like[np.arange(len(like)), start + np.arange(len(like))]
        found += ((like >= own[:, None]).sum(1) == 1).sum()
    return found / len(second)
