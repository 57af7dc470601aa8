"""Images of discs, squares and triangles on noise, with boxes and masks, drawn by this file.

For a first try of detection or segmentation: no download, and seconds of training.
"""

import numpy as np

from cv_jax.data.dataset import Stored
from cv_jax.data.fields import Examples, boxes_fields, image_field, mask_field

NAMES = ("disc", "square", "triangle")
SIDE = 64  # pixels a side
MOST = 4  # objects of an image
COUNTS = {"train": 512, "test": 128}


def load_shapes() -> Stored:
    """Draws 512 training and 128 test images of 64x64 pixels with up to 4 objects."""
    rng = np.random.default_rng(0)
    splits = {name: _draw(rng, count) for name, count in COUNTS.items()}
    mask = mask_field(("background", *NAMES), (SIDE, SIDE))
    fields = {"image": image_field((SIDE, SIDE, 3)), "mask": mask, **boxes_fields(NAMES, MOST)}
    return Stored(fields, splits["train"], splits["test"])


def _draw(rng: np.random.Generator, count: int) -> Examples:
    image = rng.integers(0, 128, (count, SIDE, SIDE, 3), np.uint8)
    mask = np.zeros((count, SIDE, SIDE), np.uint8)
    boxes = np.zeros((count, MOST, 4), np.float32)
    label = np.full((count, MOST), -1, np.int32)
    for i in range(count):
        for j in range(rng.integers(0, MOST + 1)):
            side = rng.integers(10, 25)
            x, y = rng.integers(0, SIDE - side, 2)
            number = int(rng.integers(len(NAMES)))
            inside = _inside(NAMES[number], side)
            image[i, y : y + side, x : x + side][inside] = rng.integers(128, 256, 3)
            mask[i, y : y + side, x : x + side][inside] = number + 1
            boxes[i, j], label[i, j] = (x, y, x + side, y + side), number
    flags = {name: np.zeros((count, MOST), bool) for name in ("difficult", "crowd")}
    return {"image": image, "mask": mask, "boxes": boxes, "box_label": label, **flags}


def _inside(name: str, side: int) -> np.ndarray:
    """Returns the pixels (side, side) of a shape that touches all sides of its square."""
    y, x = np.mgrid[:side, :side] + 0.5
    if name == "disc":
        return (y - side / 2) ** 2 + (x - side / 2) ** 2 <= (side / 2) ** 2
    if name == "triangle":
        return np.abs(x - side / 2) <= y / 2 + 0.5
    return np.ones((side, side), bool)
