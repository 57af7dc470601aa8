"""Describes the fields of a data set: the arrays that make up an example."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Examples, a batch, or one example: {field name: array}.
Examples = dict[str, np.ndarray]

IGNORED = 255  # the class of mask pixels that losses and metrics ignore

# The kinds of field, with the shape and dtype of one example. t frames, o objects, a agents, l
# tokens, p points. Coordinates are (x, y) in pixels of the stored image; the pixel in row i and
# column j covers [j, j + 1) x [i, i + 1).
KINDS = {
    "image": "(h, w, c) uint8",
    "clip": "(t, h, w, c) uint8",
    "label": "() int32, a class",
    "labels": "(n,) bool, which of n classes are true",
    "flag": "() bool",
    "boxes": "(o, 4) float32, corners x0 y0 x1 y1, half-open",
    "box_label": "(o,) int32, the class of a box; -1 is padding",
    "box_flag": "(o,) bool, such as `difficult`",
    "mask": "(h, w) uint8, a class for each pixel; 255 is ignored",
    "points": "(p, 2) float32, x y",
    "tracks": "(a, t, 2) float32, x y",
    "valid": "(a, t) bool, which positions of a track are known",
    "tokens": "(l,) int32",
    "length": "() int32, how many tokens count",
    "group": "() int32, examples that splits must not divide: a patient, a slide, a scene",
    "size": "(2,) int32, height and width of the original",
    "values": "float32 of any shape",
}


class Field(NamedTuple):
    """One array of each example.

    Attributes:
        shape: the shape of one example, such as (h, w, c).
        dtype: "uint8", "int32", "float32" or "bool".
        kind: one of KINDS.
        fill: the value of padding, in padded rows of a batch and for missing objects.
        names: the names of the classes or tokens, in order; (): no names.
        unit: the unit of the values, such as "px" or "m"; "": no unit.
        mean, std: (c,) float32 in [0, 1], per channel over all pixels of train; None for other
            kinds than images.
    """

    shape: tuple[int, ...]
    dtype: str
    kind: str
    fill: float = 0
    names: tuple[str, ...] = ()
    unit: str = ""
    mean: np.ndarray | None = None
    std: np.ndarray | None = None


def image_field(shape: Sequence[int]) -> Field:
    """Describes images (h, w, c) uint8 with 1 to 4 channels."""
    return Field(tuple(shape), "uint8", "image")


def label_field(names: Sequence[str]) -> Field:
    """Describes labels: a class for each example, counted from 0 in the order of `names`."""
    return Field((), "int32", "label", fill=-1, names=tuple(names))


def labels_field(names: Sequence[str]) -> Field:
    """Describes labels of several classes at once: which of `names` are true of an example."""
    return Field((len(names),), "bool", "labels", names=tuple(names))


def values_field(names: Sequence[str], unit: str = "") -> Field:
    """Describes a number for each of `names`, in `unit`, such as the target of a regression."""
    return Field((len(names),), "float32", "values", names=tuple(names), unit=unit)


def points_field(count: int) -> Field:
    """Describes `count` points (x, y) for each example, in pixels of the image."""
    return Field((count, 2), "float32", "points", unit="px")


def boxes_fields(names: Sequence[str], count: int) -> dict[str, Field]:
    """Describes up to `count` objects of an image: the fields of a detection data set.

    `difficult` objects need not be found (PASCAL VOC), and a `crowd` is a box around many objects
    (COCO): neither counts for or against a detector.
    """
    return {
        "boxes": Field((count, 4), "float32", "boxes", unit="px"),
        "box_label": Field((count,), "int32", "box_label", fill=-1, names=tuple(names)),
        "difficult": Field((count,), "bool", "box_flag"),
        "crowd": Field((count,), "bool", "box_flag"),
    }


def mask_field(names: Sequence[str], shape: Sequence[int] = ()) -> Field:
    """Describes masks (h, w) uint8: a class for each pixel, or IGNORED."""
    return Field(tuple(shape), "uint8", "mask", fill=IGNORED, names=tuple(names))


def is_whole(fields: Mapping[str, Field]) -> bool:
    """Returns whether images are read whole, letter-boxed: a crop would cut objects off."""
    return has_kind(fields, "boxes", "mask")


def enlarges(fields: Mapping[str, Field]) -> bool:
    """Returns whether small images that are read whole are enlarged: those with masks are not."""
    return has_kind(fields, "boxes")


def has_kind(fields: Mapping[str, Field], *kinds: str) -> bool:
    """Returns whether any of the fields is of one of `kinds`."""
    return any(field.kind in kinds for field in fields.values())


def num_examples(examples: Mapping[str, Any]) -> int:
    """Returns the number of examples, which is the length of every field."""
    return len(next(iter(examples.values())))


def take(examples: Mapping[str, np.ndarray], positions: Any) -> Examples:
    """Returns the examples at `positions`, an index array or a slice; one example of an index."""
    return {name: array[positions] for name, array in examples.items()}


def decoded(examples: Mapping[str, Any]) -> Examples:
    """Returns the examples as NumPy arrays; images that stay encoded are decoded."""
    return {name: np.asarray(array) for name, array in examples.items()}
