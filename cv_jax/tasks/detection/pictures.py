"""What a detector says of an image, in words and as a picture."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cv_jax.data.fields import Examples
from cv_jax.data.read_image import Back
from cv_jax.learn.images import draw_image, magnification, without_border

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


def describe(
    names: Sequence[str],
    threshold: float,
    example: Examples,
    prediction: dict[str, np.ndarray],
    back: Back | None,
) -> dict[str, Any]:
    """Returns {"objects": [{"class", "score", "box": [x0, y0, x1, y1]}]}, highest score first.

    Boxes are half-open, in pixels of the file, and inside it. Detections below `threshold`, or
    without area inside the file, are left out.
    """
    del example
    objects = []
    for box, score, number in _kept(prediction, threshold):
        box = _in_file(box, back) if back else box
        if (box[2:] > box[:2]).all():
            corners = [float(x) for x in box]
            objects.append({"class": names[number], "score": float(score), "box": corners})
    return {"objects": objects}


def _kept(prediction, threshold):
    rows = zip(*(prediction[name] for name in ("boxes", "scores", "classes")), strict=True)
    return [row for row in rows if row[1] >= threshold]


def _in_file(box: np.ndarray, back: Back) -> np.ndarray:
    (h, w), matrix = back
    corners = np.append(np.float64(box).reshape(2, 2), [[1], [1]], axis=1) @ matrix.T
    return np.clip(corners[:, :2].ravel(), 0, [w, h, w, h])


def draw(
    names: Sequence[str],
    threshold: float,
    example: Examples,
    prediction: dict[str, np.ndarray] | None = None,
    back: Back | None = None,
) -> np.ndarray:
    """Draws the detections of a prediction, or else the objects of the data set; (h, w, 3) uint8.

    Detections have their class and score in percent beside their box. The part of the picture that
    letter-boxing added is cut away. Small images are magnified by a whole number.
    """
    image = draw_image(example)
    times = magnification(image)
    image = without_border(image, back)
    picture = Image.fromarray(image.repeat(times, 0).repeat(times, 1))
    pen = ImageDraw.Draw(picture)
    if prediction is None:
        rows = zip(example["boxes"], example["box_label"], strict=True)
        boxes = [(box, number, names[number]) for box, number in rows if number >= 0]
    else:
        boxes = [
            (box, number, f"{names[number]} {100 * score:.0f}")
            for box, score, number in reversed(_kept(prediction, threshold))
        ]
    for box, number, text in boxes:
        _box(pen, times * box, COLORS[number % len(COLORS)], text)
    return np.asarray(picture)


def _box(pen: ImageDraw.ImageDraw, box: np.ndarray, color: str, text: str = "") -> None:
    x0, y0, x1, y1 = (int(x) for x in np.round(box))
    pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=color, width=1)
    if text:
        around = pen.textbbox((x0 + 1, y0), text, font=_font())
        pen.rectangle(around, fill="#000000")
        pen.text((x0 + 1, y0), text, fill=color, font=_font())


@cache
def _font() -> Any:
    return ImageFont.load_default(9)
