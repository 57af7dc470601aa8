"""Image files of any kind, as the arrays that a network takes."""

import warnings
from io import BytesIO

import cv2
import numpy as np
from PIL import Image, ImageOps

from cv_jax.errors import UserError, first_line

# A few bytes can say that they are an image of any size: more pixels are refused.
MAX_PIXELS = 50_000_000
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of twice as many
Image.init()
KINDS = [kind for kind in Image.ID if kind != "EPS"]  # which Ghostscript would run as a program


def read_image(data: bytes, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes an image file and brings it to the shape of the images of a data set.

    Evaluation takes images as they are, so one of that size keeps each of its pixels. Any other is
    resized (bicubic, smoothed where it shrinks) until it covers h x w, and its middle is cut out.
    Before that it is turned as its EXIF data say; what is transparent becomes white; grey becomes
    RGB, or colours the grey of ITU-R 601-2 (0.299 R + 0.587 G + 0.114 B); 16 bits become 8. Of
    several frames the first one counts.

    Args:
        data: the content of a file of a kind that Pillow or OpenCV opens.
        image_shape: (h, w, c), c is 1 or 3.

    Returns:
        (h, w, c) uint8.

    Raises:
        UserError: it is no image, damaged, or has more than 50 million pixels.
    """
    h, w, c = image_shape
    try:
        image = _open(data)
        ImageOps.exif_transpose(image, in_place=True)
        image = _to_8_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if c == 1 else "RGB")
        if image.size != (w, h):
            image = ImageOps.fit(image, (w, h), Image.Resampling.BICUBIC)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file does to a decoder
        raise UserError(f"it is damaged ({first_line(error)})") from error
    return np.asarray(image).reshape(h, w, c)


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
