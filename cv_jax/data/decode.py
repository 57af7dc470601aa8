"""Decodes images for training: a random crop of each, in half of the time of Pillow.

Most of the time goes into a JPEG file's entropy-coded data. So the rows below the crop are not
decoded, and an image at least twice as large as needed is decoded at 1/2, 1/4 or 1/8 of its size.
Every other kind of file goes through `read_image.decode_image`, as in evaluation.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image
from PIL.ExifTags import Base

from cv_jax.config.calls import build
from cv_jax.config.errors import UserError
from cv_jax.data.read_image import MAX_PIXELS, decode_image

AREA = 0.08, 1.0
ASPECT = 3 / 4, 4 / 3
TRIES = 10

Crop = Callable[[bytes, np.random.Generator], np.ndarray]
Range = tuple[float, float]


def find_crop(text: str) -> Callable[[tuple[int, int, int]], Crop] | None:
    """Finds the random crop that `config.data.crop` names: image shape (h, w, c) -> crop.

    The crop maps an encoded image and a generator to (h, w, c) uint8; see `random_crop`. The
    empty text names none.

    Raises:
        UserError: the text does not name one of the crops in `CROPS`.
    """
    found = build(text, CROPS, "config.data.crop")
    if len(found) > 1:
        raise UserError(f"config.data.crop={text!r} names {len(found)} crops: keep one.")
    return found[0] if found else None


def random_resized(area: float = AREA[0], aspect: float = ASPECT[1]) -> Callable:
    """Builds the crop of `random_crop` for an image shape.

    Args:
        area: the smallest share of the image's area; the largest is 1.
        aspect: the largest width / height; the smallest is its inverse.
    """
    if not 0 < area <= 1:
        raise ValueError(f"area={area} must be above 0 and at most 1")
    if not 1 <= aspect <= 100:
        raise ValueError(f"aspect={aspect} must be from 1 to 100")

    def of_shape(shape):
        return lambda data, rng: random_crop(data, shape, rng, (area, 1.0), (1 / aspect, aspect))

    return of_shape


CROPS = {"random_resized": random_resized}


class Box(NamedTuple):
    """A part of an image, in whole pixels."""

    left: int
    top: int
    width: int
    height: int


def random_crop(
    data: bytes,
    shape: tuple[int, int, int],
    rng: np.random.Generator,
    area: Range = AREA,
    aspect: Range = ASPECT,
) -> np.ndarray:
    """Decodes a random part of an image and resizes it (bilinear, antialiased where it shrinks).

    The result depends on the arguments alone. The colours are those of `read_image.fit_image`,
    within 2 of 255 for the grey of a colour JPEG and otherwise the same. The resized pixels of a
    photograph's JPEG differ from Pillow's: by 0.8 of 255 on average at 224x224 pixels, by 3.8 at
    32x32, where the decoder shrinks most. See `_resize`.

    Args:
        data: the content of an image file.
        shape: (h, w, c) of the result; c is 1 for grey, 2 for grey and alpha, 3 for RGB, 4 for
            RGBA.
        rng: what the box is drawn with.
        area: (low, high) of the box's share of the image's area, see `draw_box`.
        aspect: (low, high) of the box's width / height, see `draw_box`.

    Returns:
        (h, w, c) uint8.

    Raises:
        UserError: as `read_image.fit_image`.
    """
    draw = rng.random((TRIES, 4))
    frame = _read_frame(data) if shape[2] in _COLOURS else None
    if frame is not None:
        box = draw_box(frame.size, draw, area, aspect)
        with suppress(ValueError, RuntimeError):  # Pillow says what is wrong, or reads the file
            return _crop_jpeg(data, frame, box, shape)
    h, w, c = shape
    image = decode_image(data, c)
    left, top, width, height = draw_box(image.size, draw, area, aspect)
    part = image.crop((left, top, left + width, top + height))
    return np.asarray(part.resize((w, h), Image.Resampling.BILINEAR)).reshape(shape)


def draw_box(
    size: tuple[int, int], draw: np.ndarray, area: Range = AREA, aspect: Range = ASPECT
) -> Box:
    """Returns a box in an image of `size` (width, height), as torchvision's RandomResizedCrop does.

    The box's share of the area is uniform, and so is the logarithm of its width / height. The first
    try whose box fits into the image counts. If none fits, the box is the largest of an allowed
    width / height at the image's centre.

    Args:
        size: width and height after the EXIF rotation.
        draw: (tries, 4), uniform in [0, 1): area, width / height, left and top.
        area: (low, high) of the box's share of the image's area.
        aspect: (low, high) of the box's width / height.
    """
    width, height = size
    low, high = map(math.log, aspect)
    for a, b, x, y in draw.tolist():
        pixels = width * height * (area[0] + a * (area[1] - area[0]))
        ratio = math.exp(low + b * (high - low))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(x * (width - w + 1)), int(y * (height - h + 1)), w, h)
    w = min(width, max(1, round(height * aspect[1])))
    h = min(height, max(1, round(width / aspect[0])))
    return Box((width - w) // 2, (height - h) // 2, w, h)


# JPEG

_COLOURS = {1: "GRAY", 3: "RGB", 4: "RGBA"}  # simplejpeg's names, by number of channels
# EXIF orientation: (rows become columns, then left becomes right, then top becomes bottom)
_TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


class _Frame(NamedTuple):
    """The frame header of a JPEG file, and how the image is turned when it is shown.

    Attributes:
        at: position of the header in the file.
        width: of the stored image, in pixels.
        height: of the stored image, in pixels.
        turn: a value of `_TURNS`.
    """

    at: int
    width: int
    height: int
    turn: tuple[bool, bool, bool]

    @property
    def size(self) -> tuple[int, int]:
        """Returns (width, height) after the EXIF rotation."""
        return (self.height, self.width) if self.turn[0] else (self.width, self.height)


def _read_frame(data: bytes) -> _Frame | None:
    """Reads a JPEG file's header; None if Pillow has to read the file, or to say what is wrong.

    These are files that are no JPEG of 8 bits in grey or YCbCr, too large, or have no end.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, turned = 2, False
    with suppress(IndexError):
        while data[at] == 0xFF and data[at + 1] not in (0xC0, 0xC1, 0xC2):  # start of frame
            turned |= data[at + 1] == 0xE1  # EXIF or XMP
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
        bits, channels = data[at + 4], data[at + 9]
        height, width = (int.from_bytes(data[i : i + 2]) for i in (at + 5, at + 7))
        whole = data.rfind(b"\xff\xd9") > at  # the end is there: not truncated
        plain = data[at] == 0xFF and bits == 8 and channels in (1, 3) and whole
        if plain and 0 < width * height <= MAX_PIXELS:
            return _Frame(at, width, height, _read_turn(data) if turned else _TURNS[1])
    return None


def _read_turn(data: bytes) -> tuple[bool, bool, bool]:
    with suppress(Exception):  # damaged EXIF data
        orientation = Image.open(BytesIO(data), formats=["JPEG"]).getexif().get(Base.Orientation)
        return _TURNS.get(orientation, _TURNS[1])
    return _TURNS[1]


def _crop_jpeg(data: bytes, frame: _Frame, box: Box, shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes a box of the turned image and resizes it to `shape`."""
    h, w, c = shape
    columns, left_right, up_down = frame.turn
    width, height = frame.size
    if left_right:
        box = box._replace(left=width - box.left - box.width)
    if up_down:
        box = box._replace(top=height - box.top - box.height)
    if columns:
        box, w, h = Box(box.top, box.left, box.height, box.width), h, w
    image = _resize(_decode_jpeg(data, frame, box, (w, h), c), (w, h)).reshape(h, w, c)
    if columns:
        image = image.transpose(1, 0, 2)
    return np.ascontiguousarray(image[:: -1 if up_down else 1, :: -1 if left_right else 1])


def _decode_jpeg(
    data: bytes, frame: _Frame, box: Box, size: tuple[int, int], channels: int
) -> np.ndarray:
    """Decodes a box of the stored image, shrunk by 2, 4 or 8 where it stays as large as `size`.

    The box's borders are rounded to the pixels of the shrunk image.
    """
    shrink = 1
    while shrink < 8 and box.width >= 2 * shrink * size[0] and box.height >= 2 * shrink * size[1]:
        shrink *= 2
    # The decoder stops at the height in the header. Colours of two rows beyond are interpolated.
    rows = min(frame.height, (box.top + box.height + 2 * shrink + 15) // 16 * 16)
    at = frame.at + 5
    if rows < frame.height:
        data = data[:at] + rows.to_bytes(2) + data[at + 2 :]
    image = simplejpeg.decode_jpeg(
        data,
        _COLOURS[channels],
        min_factor=shrink,
        min_height=-(-rows // shrink),
        min_width=-(-frame.width // shrink),
        strict=False,  # the rows left out would be an error
    )
    left, top = round(box.left / shrink), round(box.top / shrink)
    right, bottom = (round((a + b) / shrink) for a, b in (box[::2], box[1::2]))
    return image[top:bottom, left:right]


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes an image to (width, height): bilinear, antialiased where it shrinks.

    Pillow weights pixels by a triangle as wide as the shrinking. A blur and OpenCV's interpolation
    do nearly the same in a quarter of the time.
    """
    h, w = image.shape[:2]
    blur = _blur(w / size[0]), _blur(h / size[1])
    if len(blur[0]) > 1 or len(blur[1]) > 1:
        image = cv2.sepFilter2D(image, -1, *blur, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def _blur(scale: float) -> np.ndarray:
    """Returns the filter before the interpolation that shrinks by `scale`.

    The variance of a triangle 2 s wide is s^2 / 6, and the interpolation's is 1 / 6 on average. Of
    three taps the outer ones get half of the difference.
    """
    if scale <= 1:
        return np.ones(1, np.float32)
    if scale <= 2:
        side = (scale**2 - 1) / 12
        return np.array([side, 1 - 2 * side, side], np.float32)
    reach = math.ceil(scale) - 1
    triangle = 1 - np.abs(np.arange(-reach, reach + 1)) / scale
    return np.float32(triangle / triangle.sum())
