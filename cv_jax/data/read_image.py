"""Image files of any kind, as the arrays that a network takes."""

import stat
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps

from cv_jax.config.errors import UserError, first_line

# A few bytes can say that they are an image of any size: more pixels are refused.
MAX_PIXELS = 50_000_000
MAX_BYTES = 500_000_000  # of a file: so many pixels of 8 bytes, and its other contents
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of twice as many
warnings.filterwarnings("ignore", module=r"PIL\.")  # of damage that leaves the pixels whole
Image.init()
KINDS = [kind for kind in Image.ID if kind != "EPS"]  # which Ghostscript would run as a program


MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of so many channels


def read_bytes(path: Path) -> bytes:
    """Reads a file that a user names.

    Raises:
        UserError: the path is not that of a plain file of at most 500 MB that can be read.
    """
    try:
        about = path.stat()
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
            raise UserError("it is a pipe, a socket or a device and not a file")  # may never end
        if about.st_size > MAX_BYTES:
            raise UserError(f"it has more than {MAX_BYTES // 10**6} MB")
        return path.read_bytes()
    except IsADirectoryError as error:
        raise UserError("it is a directory that is not looked into: name it as --dir") from error
    except OSError as error:
        raise UserError(error.strerror or str(error)) from error


class Back(NamedTuple):
    """The way from the pixels of a network's input back to those of the file.

    Attributes:
        size: (height, width) of the image in the file, turned as its EXIF data say.
        matrix: (3, 3) float64; (x, y, 1) of the input to (x, y, 1) of the file.
    """

    size: tuple[int, int]
    matrix: np.ndarray


def read_image(data: bytes, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes an image file and brings it to (h, w, c) uint8: see `fit_image`."""
    return fit_image(data, image_shape)[0]


def fit_image(data: bytes, image_shape: tuple[int, int, int]) -> tuple[np.ndarray, Back]:
    """Decodes an image file and brings it to the shape of the images of a data set.

    Evaluation takes images as they are, so one of that size keeps each of its pixels. Any other is
    resized (bicubic, antialiased where it shrinks) until it covers h x w, and its middle is cut
    out. Before that it is turned as its EXIF data say, unless they are damaged; grey becomes RGB,
    or colours the grey of ITU-R 601-2 (0.299 R + 0.587 G + 0.114 B); 16 bits become 8. Where there
    is no channel for transparency, transparent pixels become white. Of several frames the first is
    read.

    Args:
        data: the content of a file of a kind that Pillow or OpenCV opens.
        image_shape: (h, w, c), c is 1 for grey, 2 for grey and alpha, 3 for RGB, 4 for RGBA.

    Returns:
        (h, w, c) uint8, and the way back to the file's own pixels.

    Raises:
        UserError: the file is not an image, damaged, or has more than 50 million pixels.
    """
    h, w, c = image_shape
    try:
        image = _open(data)
        with suppress(Exception):  # whatever damaged EXIF data do: the pixels are whole
            ImageOps.exif_transpose(image, in_place=True)
        image = _to_8_bits(image)
        if c in (1, 3) and image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(MODES[c])
        back = _way_back(image.size, (w, h))
        if image.size != (w, h):
            image = ImageOps.fit(image, (w, h), Image.Resampling.BICUBIC)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file does to a decoder
        raise UserError(f"it is damaged ({first_line(error)})") from error
    return np.asarray(image).reshape(h, w, c), back


def _way_back(size: tuple[int, int], fitted: tuple[int, int]) -> Back:
    """Returns the way back from an image that covers `fitted` (w, h), cut out of its middle."""
    scale = min(size[0] / fitted[0], size[1] / fitted[1])
    left, top = ((side - scale * small) / 2 for side, small in zip(size, fitted, strict=True))
    matrix = np.array([[scale, 0, left], [0, scale, top], [0, 0, 1]])
    return Back((size[1], size[0]), matrix)


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(BytesIO(data), formats=KINDS)
    except Image.DecompressionBombError as error:
        raise UserError(f"it has more than {MAX_PIXELS:,} pixels") from error
    except Image.UnidentifiedImageError as error:
        return _open_by_opencv(data, error)
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"it has more than {MAX_PIXELS:,} pixels: {image.width} x {image.height}")
    image.load()
    return image


def _open_by_opencv(data: bytes, error: Exception) -> Image.Image:
    """Of the kinds that Pillow does not know, such as Radiance HDR."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # no data at all, or too many pixels
        pixels = None
    if pixels is None:
        raise UserError("it is no image of a kind that can be read") from error
    return Image.fromarray(pixels)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of floating-point numbers in [0, 1]: Pillow would cut the values off."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    most = 1 if image.mode == "F" else 2**16 - 1
    pixels = np.asarray(image, np.float64)
    if not (pixels.min() >= 0 and pixels.max() <= most):
        raise UserError(f"its grey values are not all between 0 and {most}")
    return Image.fromarray((pixels * (255 / most)).round().astype(np.uint8))
