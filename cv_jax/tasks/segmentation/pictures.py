"""Describes and draws a segmenter's prediction: areas by class, a mask, a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from cv_jax.data.fields import IGNORED, Examples
from cv_jax.data.read_image import Back
from cv_jax.learn.images import draw_image, magnification, without_border

OPACITY = 0.5  # of the colours over the image


def palette(count: int = 256) -> np.ndarray:
    """Returns the colours of classes, (count, 3) uint8: PASCAL VOC's, in which 0 is black.

    The bits of a class number, three at a time, are the bits of red, green and blue from the
    highest on.
    """
    number, colours = np.arange(count), np.zeros((count, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def mask_in_file(prediction: dict[str, np.ndarray], back: Back | None) -> np.ndarray:
    """Returns the predicted classes (h, w) uint8 in the pixels of the file; nearest."""
    mask = np.asarray(prediction["mask"])
    if back is None:
        return mask
    (h, w), inverse = back.size, np.linalg.inv(back.matrix)
    rows, columns = (
        np.clip(np.floor(inverse[i, i] * (np.arange(side) + 0.5) + inverse[i, 2]), 0, most - 1)
        for i, side, most in ((1, h, mask.shape[0]), (0, w, mask.shape[1]))
    )
    return mask[rows.astype(int)[:, None], columns.astype(int)[None]]


def to_image(mask: np.ndarray) -> Image.Image:
    """Returns classes (h, w) as an image with VOC's palette, whose pixels are the classes."""
    image = Image.fromarray(mask)
    image.putpalette(palette().tobytes())
    return image


def describe(
    names: Sequence[str],
    example: Examples,
    prediction: dict[str, np.ndarray],
    back: Back | None,
) -> dict[str, Any]:
    """Returns {"areas": [{"class", "share", "pixels"}]}, the largest area first.

    Pixels are those of the file. A class without a pixel is left out.
    """
    del example
    pixels = np.bincount(mask_in_file(prediction, back).ravel(), minlength=len(names))
    order = np.argsort(-pixels, kind="stable")
    return {
        "areas": [
            {"class": names[i], "share": float(pixels[i] / pixels.sum()), "pixels": int(pixels[i])}
            for i in order
            if pixels[i]
        ]
    }


def draw(
    names: Sequence[str],
    example: Examples,
    prediction: dict[str, np.ndarray] | None = None,
    back: Back | None = None,
) -> np.ndarray:
    """Draws the image with the predicted classes over it, or else those of the data set.

    Every class has its colour of `palette`, from 1 on. Pixels that are ignored, or of a class
    called "background", keep the colour of the image. The part of the picture that letter-boxing
    added is cut away; small images are magnified by a whole number. Returns (h, w, 3) uint8.
    """
    image = draw_image(example).astype(np.float32)
    mask = np.asarray((example if prediction is None else prediction)["mask"])
    image, mask = (without_border(x, back) for x in (image, mask))
    colours = palette(len(names) + 1)[1:]
    plain = (IGNORED, *(i for i, name in enumerate(names) if name == "background"))
    known = ~np.isin(mask, plain)
    image[known] += OPACITY * (colours[mask[known]] - image[known])
    times = magnification(image)
    return image.round().astype(np.uint8).repeat(times, 0).repeat(times, 1)
