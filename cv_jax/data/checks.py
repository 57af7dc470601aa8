"""Checks the data set that a source returns, before any other code uses it."""

from typing import Any

import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.data.dataset import Stored
from cv_jax.data.encoded import Encoded
from cv_jax.data.fields import KINDS, Field, num_examples
from cv_jax.data.statistics import histogram

# The name of `rows` in a batch, beside the fields.
RESERVED = "rows"


def check_stored(name: str, stored: Stored) -> Stored:
    """Checks a data set; returns it with the dtypes of its fields and histograms of its images.

    Raises:
        UserError: the data set does not match `Stored`; the message names split and field.
    """
    if problem := _problem(stored):
        raise UserError(f"The data set {name!r}: {problem}.")
    fields = {name: _sound(field) for name, field in stored.fields.items()}
    train, test, val = (
        split and {name: _as(split[name], f.dtype) for name, f in fields.items()}
        for split in (stored.train, stored.test, stored.val)
    )
    found = stored.histograms or {}
    histograms = {
        name: found[name] if name in found else histogram(train[name])
        for name, field in fields.items()
        if field.kind == "image"
    }
    return Stored(fields, train, test, val, histograms, stored.notes)


def _as(array: Any, dtype: str) -> Any:
    return array if isinstance(array, Encoded) else array.astype(dtype, copy=False)


def _sound(field: Field) -> Field:
    return field._replace(shape=tuple(map(int, field.shape)), names=tuple(field.names))


def _problem(stored: Any) -> str | None:
    if not isinstance(stored, Stored):
        return f"its function returns {type(stored).__name__}: return cv_jax.data.Stored"
    if not isinstance(stored.fields, dict) or not stored.fields:
        return "fields must be a dict such as {'image': image_field((h, w, c))}"
    for name, field in stored.fields.items():
        if problem := _field_problem(name, field):
            return problem
    for split in ("train", "test", "val"):
        examples = getattr(stored, split)
        if split == "val" and examples is None:
            continue
        if problem := _split_problem(split, examples, stored.fields):
            return problem
    for name, counted in (stored.histograms or {}).items():
        image = stored.train[name]
        shape = 256, image.shape[-1]
        if isinstance(image, Encoded):
            continue  # a sample may have been counted
        if np.shape(counted) != shape or (np.sum(counted, axis=0) != image[..., 0].size).any():
            return (
                f"the histogram of {name!r}, of shape {np.shape(counted)}, does not count the "
                f"pixels of train, whose histogram is {shape}; leave it out of Stored, so that it "
                "is computed"
            )
    return None


def _field_problem(name: Any, field: Any) -> str | None:
    if not isinstance(name, str) or not name or name == RESERVED:
        return f"a field cannot have the name {name!r}; choose another"
    if not isinstance(field, Field):
        return f"fields[{name!r}] must be a cv_jax.data.fields.Field, not {type(field).__name__}"
    if field.kind not in KINDS:
        return f"fields[{name!r}] has the unknown kind {field.kind!r}; there are {', '.join(KINDS)}"
    if name in ("image", "label", "labels") and field.kind != name:
        return f"fields[{name!r}] must be of the kind {name!r}, not {field.kind!r}"
    is_image = len(field.shape) == 3 and 0 not in field.shape and field.shape[-1] <= 4
    if field.kind == "image" and not is_image:
        return (
            f"the images {name!r} have the shape {tuple(field.shape)} and not (h, w, c) with 1 to "
            "4 channels; add a channel to grey images with [..., None]"
        )
    if field.kind in ("label", "labels") and not field.names:
        return f"fields[{name!r}] needs names of its classes, such as ('cat', 'dog')"
    if problem := _names_problem(name, field.names):
        return problem
    wanted = (len(field.names),), "bool"
    if field.kind == "labels" and (tuple(field.shape), field.dtype) != wanted:
        return (
            f"fields[{name!r}] has the shape {tuple(field.shape)} and the dtype {field.dtype}, but "
            f"its {len(field.names)} classes need {wanted[0]} and bool; use labels_field(names)"
        )
    return None


def _names_problem(name: str, names: Any) -> str | None:
    if not isinstance(names, tuple | list):
        return f"fields[{name!r}].names={names!r} must be a tuple of names, such as ('cat', 'dog')"
    first: dict[str, int] = {}
    for i, text in enumerate(names):
        if not (isinstance(text, str) and text) or first.setdefault(text, i) < i:
            return f"fields[{name!r}].names[{i}]={text!r} must be a text, unique among the names"
    return None


def _split_problem(split: str, examples: Any, fields: dict[str, Field]) -> str | None:
    arrays = isinstance(examples, dict) and all(
        isinstance(x, np.ndarray | Encoded) for x in examples.values()
    )
    if not arrays:
        return f"{split} must be a dict from the names of its fields to NumPy arrays"
    if examples.keys() != fields.keys():
        return (
            f"{split} has the arrays {', '.join(examples) or 'none'}, but Stored.fields has "
            f"{', '.join(fields)}"
        )
    for name, field in fields.items():
        if problem := _array_problem(f"{split}[{name!r}]", examples[name], field):
            return problem
    sizes = {name: len(array) for name, array in examples.items()}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{count} of {name}" for name, count in sizes.items())
        return f"{split} has {shown}; each example needs one of each"
    if not num_examples(examples):
        return f"{split} has no examples: give at least one; val may be None"
    return None


def _array_problem(where: str, array: np.ndarray, field: Field) -> str | None:
    if field.dtype == "uint8" and array.dtype != np.uint8:
        return f"{where} is {array.dtype} and not uint8: scale it to 0..255, whole numbers"
    whole = np.issubdtype(array.dtype, np.integer)
    if array.shape[1:] != tuple(field.shape) or not array.ndim:
        return f"{where} has the shape {array.shape} and not (m, {_shape(field)}"
    if field.dtype == "int32" and not whole:
        return f"{where} is {array.dtype} and not whole numbers"
    if field.dtype == "bool" and array.dtype != bool:
        return f"{where} is {array.dtype} and not bool"
    if field.dtype == "float32" and not np.issubdtype(array.dtype, np.floating):
        return f"{where} is {array.dtype} and not float32"
    if field.dtype == "float32" and not np.isfinite(array).all():
        return f"{where} has values that are not finite"
    if isinstance(array, Encoded):
        return None  # every file is checked when it is decoded
    if field.kind in ("label", "box_label", "mask") and field.names and array.size:
        return _class_problem(where, array, field)
    return None


def _shape(field: Field) -> str:
    return "".join(f"{side}, " for side in field.shape)[:-2] + ")" if field.shape else ")"


def _class_problem(where: str, array: np.ndarray, field: Field) -> str | None:
    """Describes the first unknown class. Padding is allowed for a box (-1) and a pixel (255)."""
    known = (array >= 0) & (array < len(field.names))
    if field.kind != "label":
        known |= array == field.fill
    if known.all():
        return None
    place = np.unravel_index(int(np.argmin(known)), array.shape)
    return (
        f"{where}[{', '.join(map(str, place))}] is {array[place]}, but its {len(field.names)} "
        f"classes are 0 to {len(field.names) - 1}"
    )
