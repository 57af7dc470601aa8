"""Lists images that a CSV file names, with their labels or numbers."""

import csv
import math
from pathlib import Path

import numpy as np

from cv_jax.config.errors import UserError, nearest
from cv_jax.data.encoded import Files
from cv_jax.data.fields import Field, label_field
from cv_jax.data.sources.folder import SPLIT_FOLDERS, identity_of
from cv_jax.data.sources.listing import Listing, classes_of, require_images

COLUMNS = ("path", "label", "labels", "target", "split", "group")
SEPARATOR = ";"  # of the classes in the column `labels`


def list_table(file: Path) -> Listing:
    """Lists the images of a CSV file with a header.

    Columns:
        path: the image file, relative to the CSV file's directory.
        label: the class.
        labels: several classes, "cat;dog"; empty for none.
        target, or target:NAME: numbers.
        split: train, val or test; without it `photos.assign_splits` chooses test.
        group: examples with the same text stay in one split, such as the images of a patient.

    Raises:
        UserError: the file cannot be read, or has an unknown column or an odd cell; the message
            names the line.
    """
    header, rows = _read(file)
    paths = [row["path"] for row in rows]
    require_images(bool(paths), "its column 'path'", file)
    fields, columns = {}, {}
    for name, make in (("label", _label), ("labels", _labels), ("group", _group)):
        if name in header:
            fields[name], columns[name] = make(file, [row[name] for row in rows])
    if targets := [name for name in header if name.partition(":")[0] == "target"]:
        fields["target"], columns["target"] = _targets(file, targets, rows)
    split = [_split(file, i, row.get("split", "")) for i, row in enumerate(rows)]
    if "split" in header and "test" not in split:
        split = ["test" if name == "val" else name for name in split]
    return Listing(
        name=file.name,
        root=file,
        identity=identity_of(file.parent, [file.name, *paths]),
        source=Files(file.parent, paths),
        fields=fields,
        columns=columns,
        split=np.array(split),
        split_file=None if all(split) else file.with_suffix(".split.csv"),
    )


def _read(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, strict=True, restval="")
            rows = list(reader)
            header = list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"config.data.dir={str(file)!r} cannot be read: {error}.") from error
    if "path" not in header:
        raise UserError(
            f"{file} has no column 'path'.{nearest('path', header)} Its first line must name the "
            f"columns, of {', '.join(COLUMNS)}."
        )
    for name in header:
        if name.partition(":")[0] not in COLUMNS or (":" in name and name[:7] != "target:"):
            raise UserError(
                f"{file} has the unknown column {name!r}.{nearest(name, COLUMNS)} There are: "
                f"{', '.join(COLUMNS)}, target:NAME."
            )
    for i, row in enumerate(rows):
        if None in row:
            raise UserError(f"{file}, line {i + 2} has more cells than the first line.")
    return header, rows


def _label(file: Path, cells: list[str]) -> tuple[Field, np.ndarray]:
    for i, cell in enumerate(cells):
        if not cell:
            raise UserError(f"{file}, line {i + 2} has no label: add it, or remove the line.")
    classes, label = classes_of(np.array(cells))
    return label_field(classes), label


def _labels(file: Path, cells: list[str]) -> tuple[Field, np.ndarray]:
    del file
    parts = [[part.strip() for part in cell.split(SEPARATOR) if part.strip()] for cell in cells]
    classes, _ = classes_of(np.array([name for row in parts for name in row]))
    position = {name: i for i, name in enumerate(classes)}
    labels = np.zeros((len(cells), len(classes)), bool)
    for row, names in zip(labels, parts, strict=True):
        row[[position[name] for name in names]] = True
    return Field((len(classes),), "bool", "labels", names=classes), labels


def _group(file: Path, cells: list[str]) -> tuple[Field, np.ndarray]:
    del file
    return Field((), "int32", "group"), np.unique(cells, return_inverse=True)[1].astype(np.int32)


def _targets(file: Path, names: list[str], rows: list[dict[str, str]]) -> tuple[Field, np.ndarray]:
    values = np.empty((len(rows), len(names)), np.float32)
    for i, row in enumerate(rows):
        for j, name in enumerate(names):
            try:
                values[i, j] = float(row[name])
            except ValueError:
                values[i, j] = math.nan
            if not math.isfinite(values[i, j]):
                raise UserError(f"{file}, line {i + 2}: {name}={row[name]!r} is not a number.")
    shown = tuple(name.partition(":")[2] or name for name in names)
    return Field((len(names),), "float32", "values", names=shown), values


def _split(file: Path, i: int, cell: str) -> str:
    if cell and cell not in SPLIT_FOLDERS:
        raise UserError(
            f"{file}, line {i + 2} has the unknown split {cell!r}: write train, val or test."
        )
    return SPLIT_FOLDERS.get(cell, "")
