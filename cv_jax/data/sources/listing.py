"""Describes encoded images before they are read: where they are, and what is known of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from cv_jax.data.encoded import Source
from cv_jax.data.fields import Examples, Field

T = TypeVar("T", bound=NamedTuple)
VAL_IS_TEST = "data    the val images are test: the data set has no test images of its own"


class Masks(NamedTuple):
    """The encoded masks of a data set's images, in the same order.

    Attributes:
        source: the mask files or records.
        numbers: (256,) int16, the class of each value of a mask file; IGNORED; -1: no class.
    """

    source: Source
    numbers: np.ndarray


class Listing(NamedTuple):
    """The images of a data set, m of them, in the order of the source.

    Attributes:
        name: of the data set, for messages.
        root: the directory whose cache entry holds the decoded images.
        identity: a text that changes when an image changes.
        source: the encoded images.
        fields: {name: description} of the other fields of an example.
        columns: {name: (m, ...) array} of these fields.
        split: (m,) texts: "train", "val", "test", or "" where the source does not say.
        split_file: the CSV file that keeps the splits chosen here; None: every split is known.
        notes: lines that the log shows at the start.
        masks: the masks of the field `mask`, whose shape is not known yet; None: no such field.
    """

    name: str
    root: Path
    identity: str
    source: Source
    fields: dict[str, Field]
    columns: Examples
    split: np.ndarray
    split_file: Path | None = None
    notes: tuple[str, ...] = ()
    masks: Masks | None = None


def classes_of(names: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the different names in order, numbers by value, and the position of each name."""
    found = sorted(set(names.tolist()), key=_by_number)
    position = {name: i for i, name in enumerate(found)}
    return tuple(found), np.array([position[name] for name in names.tolist()], np.int32)


def _by_number(name: str) -> tuple[float, str]:
    return (int(name) if name.isdecimal() else float("inf"), name)


def some(names: list[str], most: int = 3) -> str:
    """Returns the first few names in words; bytes that are no UTF-8 are shown as \\udcXX."""
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return shown.encode(errors="backslashreplace").decode()


def known_splits(annotations: Sequence[T], notes: list[str], join_val: bool = False) -> list[T]:
    """Returns the annotations, which have a `split`, with the splits that they are used for.

    Without test, val becomes test, and a line is added to `notes`; with train alone, test has to be
    chosen, and every split becomes "". With test, val becomes train if `join_val`.
    """
    found, new = {one.split for one in annotations}, {}
    if "test" in found:
        new = {"val": "train"} if join_val else {}
    elif "val" in found:
        new = {"val": "test"}
        notes.append(VAL_IS_TEST)
    elif found == {"train"}:
        new = {"train": ""}
    return [one._replace(split=new.get(one.split, one.split)) for one in annotations]


def left_out(what: str, why: str, names: Sequence[str]) -> str:
    """Returns a line for the log that counts and names what a source leaves out."""
    count = f"{len(names):,} {what}{'s' if len(names) > 1 else ''}"
    return f"data    {count} {why}, left out: {some(unique(names))}"


def unique(names: Sequence[str]) -> list[str]:
    """Returns the names in order, each once."""
    return list(dict.fromkeys(names))
