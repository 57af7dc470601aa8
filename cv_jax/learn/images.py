"""Reads an image file into an example, and draws an example. Tasks on images share both."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cv_jax.data import DataSpec
from cv_jax.data.fields import enlarges, is_whole
from cv_jax.data.read_image import Back, fit_image, letterbox_image


def make_read(spec: DataSpec) -> Callable[[bytes], list[tuple[dict[str, np.ndarray], Back]]]:
    """Returns a function: image file -> [(example, back)], where `back` undoes what is done to it.

    The image becomes what it is in evaluation: cropped and resized by `data.read_image.fit_image`,
    or whole by `letterbox_image` where the data set has boxes or masks.
    """
    whole = is_whole(spec.fields)

    def read(data: bytes) -> list[tuple[dict[str, np.ndarray], Back]]:
        if whole:
            image, back = letterbox_image(data, spec.image_shape, enlarges(spec.fields))
        else:
            image, back = fit_image(data, spec.image_shape, spec.eval_crop)
        return [({"image": image}, back)]

    return read


LEGIBLE = 256  # pixels of the longer side of a picture, or more


def magnification(image: np.ndarray) -> int:
    """Returns by how much to magnify an image (h, w, c), so that it is legible."""
    return max(1, round(LEGIBLE / max(image.shape[:2])))


def without_border(image: np.ndarray, back: Back | None) -> np.ndarray:
    """Cuts away what letter-boxing has added to an image or mask (h, w, ...)."""
    if back is None:
        return image
    w, h = (np.linalg.inv(back.matrix) @ [*back.size[::-1], 1])[:2].round().astype(int)
    return image[:h, :w]


def draw_image(example: dict[str, Any], prediction: Any = None, back: Any = None) -> np.ndarray:
    """Returns the image of an example as a picture (h, w, 3) uint8.

    Args:
        example: {"image": (h, w, c) uint8, or float32 in [0, 1]}.
        prediction, back: ignored.
    """
    del prediction, back
    image = np.asarray(example["image"])
    if image.dtype != np.uint8:
        image = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    colours = image[..., :3] if image.shape[-1] >= 3 else image[..., :1]
    return np.broadcast_to(colours, (*image.shape[:2], 3))
