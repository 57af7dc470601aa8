"""Reads a mask file: the class of every pixel of an image."""

from io import BytesIO

import numpy as np
from PIL import Image

from cv_jax.config.errors import UserError, first_line
from cv_jax.data.fields import IGNORED
from cv_jax.data.read_image import MAX_PIXELS, letterbox_size

_GREY = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


def mask_numbers(num_classes: int, ignored: tuple[int, ...] = (), first: int = 0) -> np.ndarray:
    """Returns (256,) int16: the class of each value of a mask file, -1 for values of no class.

    The value of class 0 is `first`, and so on; 255 and the values `ignored` are IGNORED.
    """
    numbers = np.full(256, -1, np.int16)
    numbers[first : first + num_classes] = np.arange(num_classes)
    numbers[[*ignored, IGNORED]] = IGNORED
    return numbers


def letterbox_mask(data: bytes, numbers: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Decodes a mask and fits all of it into `size`, as `letterbox_image` without `enlarge`.

    A pixel gets the class of the nearest pixel of the file, measured between their centres.

    Args:
        data: the content of a mask file with one channel, or with equal ones; palettes are ignored.
        numbers: see `mask_numbers`.
        size: height and width.

    Returns:
        (h, w) uint8, IGNORED outside of the mask.

    Raises:
        UserError: the file cannot be read, or has a value that is no class.
    """
    mask = decode_mask(data, numbers)
    h, w = letterbox_size(mask.shape, size, enlarge=False)
    if mask.shape != (h, w):
        mask = np.asarray(Image.fromarray(mask).resize((w, h), Image.Resampling.NEAREST))
    whole = np.full(size, IGNORED, np.uint8)
    whole[:h, :w] = mask
    return whole


def decode_mask(data: bytes, numbers: np.ndarray) -> np.ndarray:
    """Decodes a mask file to classes (h, w) uint8; errors as `letterbox_mask`."""
    image = _open(data)
    try:
        values = np.asarray(image)
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise UserError(f"its mask is damaged ({first_line(error)})") from error
    if image.mode == "LA":
        values = values[..., 0]
    if values.ndim == 3:
        if (values[..., :3] != values[..., :1]).any():
            raise UserError(
                "its mask has colours: a mask has one channel, whose values are the numbers of "
                "classes"
            )
        values = values[..., 0]
    values = values.astype(np.int64)
    classes = np.where((values >= 0) & (values < 256), numbers[np.clip(values, 0, 255)], -1)
    if (classes < 0).any():
        odd = values[classes < 0][0]
        raise UserError(f"its mask has the value {int(odd)}, which is no class")
    return classes.astype(np.uint8)


def read_mask_size(data: bytes) -> tuple[int, int]:
    """Returns (height, width) of a mask file, from its header.

    Raises:
        UserError: the file is no mask, or too large.
    """
    image = _open(data)
    return image.height, image.width


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(BytesIO(data), formats=["PNG", "BMP", "TIFF", "GIF"])
    except Exception as error:
        raise UserError("its mask is not an image without loss, such as PNG") from error
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"its mask has more than {MAX_PIXELS:,} pixels")
    if image.mode not in (*_GREY, "LA", "RGB", "RGBA"):
        raise UserError(f"its mask has pixels of the mode {image.mode}, not whole numbers")
    return image
