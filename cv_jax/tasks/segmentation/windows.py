"""Predicts an image larger than the network's input by overlapping windows.

Every pixel gets its class from the window in which it is farthest from the border. Windows begin at
multiples of STEP pixels, so that the network's strides fall on the same pixels as if it saw the
whole image; only the last window of a row or column ends with the image. Therefore the classes are
those of the whole image wherever the network's field of view ends inside the window.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cv_jax.data.fields import Examples
from cv_jax.data.read_image import Back, decode_image

STEP = 32  # pixels: the strides of the networks divide it
OVERLAP = 0.5  # of a window's side, at least


def starts(side: int, window: int) -> list[int]:
    """Returns where the windows along an axis of `side` pixels begin, ascending."""
    if side <= window:
        return [0]
    step = max(1, int(window * (1 - OVERLAP)))
    step = step // STEP * STEP or step
    return [*range(0, side - window, step), side - window]


def cuts(begins: Sequence[int], window: int, side: int) -> list[tuple[int, int]]:
    """Returns the pixels from, to that each window along an axis answers for."""
    middles = [(b + a + window) // 2 for a, b in itertools.pairwise(begins)]
    return list(zip([0, *middles], [*middles, side], strict=True))


def make_read_windows(
    image_shape: tuple[int, int, int],
) -> Callable[[bytes], list[tuple[Examples, Back]]]:
    """Returns a function: image file -> [(example, back)], windows of the file's own pixels.

    An image that fits into `image_shape` is one example, with black beside it.
    """
    h, w, c = image_shape

    def read(data: bytes) -> list[tuple[Examples, Back]]:
        image = decode_image(data, c)
        size = image.height, image.width
        beside = [(0, max(0, most - side)) for side, most in zip(size, (h, w), strict=True)]
        pixels = np.pad(np.asarray(image).reshape(*size, c), [*beside, (0, 0)])
        return [
            ({"image": pixels[y : y + h, x : x + w]}, _at(x, y, size))
            for y in starts(size[0], h)
            for x in starts(size[1], w)
        ]

    return read


def join(
    parts: Sequence[tuple[Examples, dict[str, np.ndarray], Any]],
) -> tuple[Examples, dict[str, np.ndarray], Any]:
    """Joins the windows of a file, each (example, prediction, back), to one of the whole file."""
    if len(parts) == 1:
        return parts[0]
    h, w, c = parts[0][0]["image"].shape
    size = parts[0][2].size
    corners = [back.matrix[:2, 2].astype(int).tolist() for _, _, back in parts]
    columns, rows = (sorted({corner[i] for corner in corners}) for i in (0, 1))
    of_column = dict(zip(columns, cuts(columns, w, size[1]), strict=True))
    of_row = dict(zip(rows, cuts(rows, h, size[0]), strict=True))
    image, mask = np.zeros((*size, c), np.uint8), np.zeros(size, np.uint8)
    for (example, prediction, _), (x, y) in zip(parts, corners, strict=True):
        top, bottom = of_row[y]
        left, right = of_column[x]
        for whole, part in ((image, example["image"]), (mask, prediction["mask"])):
            whole[top:bottom, left:right] = part[top - y : bottom - y, left - x : right - x]
    shares = np.mean([prediction["shares"] for _, prediction, _ in parts], axis=0)
    return {"image": image}, {"mask": mask, "shares": shares}, Back(size, np.eye(3))


def _at(x: int, y: int, size: tuple[int, int]) -> Back:
    return Back(size, np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64))
