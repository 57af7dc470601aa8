"""Reads image files of any kind into arrays that a network takes."""

import os
import stat
import struct
import warnings
import zlib
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base

from cv_jax.config.errors import UserError, first_line

# A file of a few bytes can claim any size, so an image with more pixels is an error.
MAX_PIXELS = 50_000_000
MAX_BYTES = 500_000_000  # MAX_PIXELS of 8 bytes, and the file's other contents
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is stricter
warnings.filterwarnings("ignore", module=r"PIL\.")  # damage that leaves the pixels whole
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # damage is said by errors

STRIDE = 4  # sides of images with boxes are multiples of it: what detectors predict is so far apart
_PNG = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3}  # by PNG's type of colour: grey, RGB
_NOT_PLAIN = {b"tRNS", b"eXIf", b"iTXt", b"zTXt", b"tEXt"}  # transparency, or perhaps a rotation
# Where Pillow keeps the EXIF or XMP data of a PNG or JPEG file, which may rotate the image.
_EXIF = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's mode by number of channels


@cache
def _kinds() -> list[str]:
    """Returns Pillow's kinds of files, which it is slow to import."""
    Image.init()
    return [kind for kind in Image.ID if kind != "EPS"]  # Ghostscript would execute an EPS file


def read_bytes(path: Path | str) -> bytes:
    """Reads a file that a user names.

    Raises:
        UserError: the path is not a plain, readable file of at most 500 MB.
    """
    try:
        about = os.stat(path)
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
            raise UserError("it is a pipe, a socket or a device, not a file")  # may never end
        if about.st_size > MAX_BYTES:
            raise UserError(f"it has more than {MAX_BYTES // 10**6} MB")
        # Path.read_bytes takes almost twice the time of a small file: more calls of the system.
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            data = os.read(file, about.st_size)
            while len(data) < about.st_size and (more := os.read(file, about.st_size - len(data))):
                data += more
        finally:
            os.close(file)
        return data
    except IsADirectoryError as error:
        raise UserError("it is a directory: use --dir to predict the images in it") from error
    except OSError as error:
        raise UserError(error.strerror or str(error)) from error


class Back(NamedTuple):
    """The map from pixels of a network's input back to pixels of the file.

    Attributes:
        size: (height, width) of the image in the file, after its EXIF rotation.
        matrix: (3, 3) float64, maps (x, y, 1) of the input to (x, y, 1) of the file.
    """

    size: tuple[int, int]
    matrix: np.ndarray


def read_image(data: bytes, image_shape: tuple[int, int, int], share: float = 1.0) -> np.ndarray:
    """Decodes an image file and fits it to (h, w, c) uint8: see `fit_image`."""
    return fit_image(data, image_shape, share)[0]


def fit_image(
    data: bytes, image_shape: tuple[int, int, int], share: float = 1.0
) -> tuple[np.ndarray, Back]:
    """Decodes an image file and fits it to the image shape of a data set.

    The steps, in order:
    - read the first frame, and rotate it by its EXIF data unless they are damaged;
    - convert 16 bits to 8;
    - without a channel for transparency, make transparent pixels white;
    - convert grey to RGB, or colours to the grey of ITU-R 601-2 (0.299 R + 0.587 G + 0.114 B);
    - crop at the centre: the largest part of the proportions h : w, shrunk by `share`;
    - resize to h x w (bicubic, antialiased where it shrinks). With a share of 1, an image of h x w
      pixels keeps every pixel.

    Args:
        data: the content of a file of a kind that Pillow or OpenCV opens.
        image_shape: (h, w, c); c is 1 for grey, 2 for grey and alpha, 3 for RGB, 4 for RGBA.
        share: of the sides, in (0, 1]. ImageNet's "resize to 256, crop 224" is 0.875: of 500x375
            pixels it keeps the 328.125 a side at the centre.

    Returns:
        The image (h, w, c) uint8, and the map back to the file's own pixels.

    Raises:
        UserError: the file is not an image, is damaged, or has more than 50 million pixels.
    """
    h, w, c = image_shape
    pixels = _read_plain_png(data, c)
    if pixels is not None and pixels.shape == image_shape and share == 1:
        return pixels, _way_back((w, h), (w, h), share)
    image = decode_image(data, c)
    back = _way_back(image.size, (w, h), share)
    if image.size != (w, h) or share < 1:
        border = (1 - share) / 2
        image = ImageOps.fit(image, (w, h), Image.Resampling.BICUBIC, bleed=border)
    return np.asarray(image).reshape(h, w, c), back


def letterbox_image(
    data: bytes, image_shape: tuple[int, int, int], enlarge: bool = True
) -> tuple[np.ndarray, Back]:
    """Decodes an image file and fits all of it into (h, w, c), at the top left, with black beside.

    As `fit_image`, but nothing is cropped: the image is resized to `letterbox_size`.

    Args:
        data, image_shape: see `fit_image`.
        enlarge: whether an image smaller than (h, w) is enlarged.

    Returns:
        The image (h, w, c) uint8, and the map back to the file's own pixels.

    Raises:
        UserError: as `fit_image`.
    """
    h, w, c = image_shape
    image = decode_image(data, c)
    width, height = image.size
    inner_h, inner_w = letterbox_size((height, width), (h, w), enlarge)
    if image.size != (inner_w, inner_h):
        image = image.resize((inner_w, inner_h), Image.Resampling.BICUBIC)
    whole = np.zeros(image_shape, np.uint8)
    whole[:inner_h, :inner_w] = np.asarray(image).reshape(inner_h, inner_w, c)
    back = np.diag([width / inner_w, height / inner_h, 1.0])
    return whole, Back((height, width), back)


def letterbox_size(
    size: tuple[int, int], inside: tuple[int, int], enlarge: bool = True
) -> tuple[int, int]:
    """Returns the largest (height, width) with the proportions of `size` that fits inside.

    An image whose sides lack less than STRIDE pixels each is not enlarged, but keeps its pixels;
    without `enlarge`, no image is.
    """
    if not enlarge and all(side <= whole for whole, side in zip(inside, size, strict=True)):
        return int(size[0]), int(size[1])
    if all(0 <= whole - side < STRIDE for whole, side in zip(inside, size, strict=True)):
        return int(size[0]), int(size[1])
    scale = min(inside[0] / size[0], inside[1] / size[1])
    height, width = (max(1, round(side * scale)) for side in size)
    return min(height, inside[0]), min(width, inside[1])


def decode_image(data: bytes, channels: int) -> Image.Image:
    """Decodes an image file to 8 bits and `channels`: the first four steps of `fit_image`."""
    try:
        image = _open(data)
        with suppress(Exception):  # damaged EXIF data: the pixels are still whole
            if _has_exif(image):
                ImageOps.exif_transpose(image, in_place=True)
        image = _to_8_bits(image)
        if channels in (1, 3) and image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == MODES[channels] else image.convert(MODES[channels])
    except UserError:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise UserError(f"it is damaged ({first_line(error)})") from error


class Facts(NamedTuple):
    """What the header of an image file says.

    Attributes:
        size: (height, width), after the EXIF rotation.
        grey: whether the image has one channel.
        orientation: the EXIF orientation, 1 to 8; from 5 on, height and width are exchanged.
    """

    size: tuple[int, int]
    grey: bool
    orientation: int = 1


def read_facts(data: bytes) -> Facts:
    """Reads the header of an image file, without decoding pixels where Pillow knows the kind.

    Raises:
        UserError: as `fit_image`, but damage behind the header is not found.
    """
    if shape := _plain_png_shape(data):
        return Facts(shape[:2], shape[2] == 1)
    try:
        image = _open(data, decode=False)
        orientation = 1
        with suppress(Exception):  # damaged EXIF data
            if _has_exif(image) and 1 <= (found := image.getexif().get(Base.Orientation, 1)) <= 8:
                orientation = int(found)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"it is damaged ({first_line(error)})") from error
    w, h = image.size
    grey = image.mode in ("1", "L", "F") or image.mode[0] == "I"
    return Facts((w, h) if orientation >= 5 else (h, w), grey, orientation)


def _has_exif(image: Image.Image) -> bool:
    """Returns whether an image may have EXIF data; to look for them takes as long as to decode."""
    return image.format not in ("PNG", "JPEG") or any(key in image.info for key in _EXIF)


def _way_back(size: tuple[int, int], fitted: tuple[int, int], share: float) -> Back:
    """Returns the map back from a centre crop of `fitted` (w, h) to an image of `size` (w, h)."""
    scale = share * min(size[0] / fitted[0], size[1] / fitted[1])
    left, top = ((side - scale * small) / 2 for side, small in zip(size, fitted, strict=True))
    matrix = np.array([[scale, 0, left], [0, scale, top], [0, 0, 1]])
    return Back((size[1], size[0]), matrix)


def _read_plain_png(data: bytes, channels: int) -> np.ndarray | None:
    """Decodes a PNG file of 8-bit RGB or grey in a third of Pillow's time; None of another file."""
    shape = _plain_png_shape(data)
    if shape is None or shape[-1] != channels:
        return None
    how = cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), how | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if pixels is None else pixels.reshape(shape)


def _plain_png_shape(data: bytes) -> tuple[int, int, int] | None:
    """Returns (h, w, c) of a PNG file of 8-bit RGB or grey; None of another file.

    None also of a damaged file, or of too many pixels: Pillow then says what is wrong, where OpenCV
    would print.
    """
    if data[:8] != _PNG or len(data) < 26 or data[24] != 8 or data[25] not in _CHANNELS:
        return None
    chunks = _png_chunks(data)
    if chunks is None or chunks & _NOT_PLAIN:
        return None
    w, h = struct.unpack_from(">II", data, 16)
    return (h, w, _CHANNELS[data[25]]) if w * h <= MAX_PIXELS else None


def _png_chunks(data: bytes) -> set[bytes] | None:
    """Returns the kinds of a PNG file's chunks; None where one is damaged or the end is missing."""
    view, kinds, start = memoryview(data), set(), len(_PNG)
    while start + 12 <= len(data):  # length, kind, contents, CRC of kind and contents
        size, kind = struct.unpack_from(">I4s", data, start)
        end = start + 8 + size
        if view[end : end + 4] != zlib.crc32(view[start + 4 : end]).to_bytes(4, "big"):
            return None
        kinds.add(kind)
        if kind == b"IEND":
            return kinds
        start = end + 4
    return None


def _open(data: bytes, decode: bool = True) -> Image.Image:
    try:
        image = Image.open(BytesIO(data), formats=_kinds())
    except Image.DecompressionBombError as error:
        raise UserError(f"it has more than {MAX_PIXELS:,} pixels") from error
    except Image.UnidentifiedImageError as error:
        return _open_by_opencv(data, error)
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"it has more than {MAX_PIXELS:,} pixels: {image.width} x {image.height}")
    if decode:
        image.load()
    return image


def _open_by_opencv(data: bytes, error: Exception) -> Image.Image:
    """Decodes an image of a kind that Pillow does not read, such as Radiance HDR."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # no data at all, or too many pixels
        pixels = None
    if pixels is None:
        raise UserError("it is not an image of a kind that can be read") from error
    return Image.fromarray(pixels)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Converts grey of 16 bits, or floats in [0, 1], to 8 bits; Pillow would clip the values."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    most = 1 if image.mode == "F" else 2**16 - 1
    pixels = np.asarray(image, np.float64)
    if not (pixels.min() >= 0 and pixels.max() <= most):
        raise UserError(f"its grey values are not all between 0 and {most}")
    return Image.fromarray((pixels * (255 / most)).round().astype(np.uint8))
