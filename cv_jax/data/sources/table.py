"""Lists images that a CSV file names, with their labels or numbers."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cv_jax.config.errors import UserError, nearest
from cv_jax.data.encoded import Files
from cv_jax.data.fields import Field, label_field, labels_field, values_field
from cv_jax.data.sources.folder import SPLIT_FOLDERS, identity_of
from cv_jax.data.sources.listing import VAL_IS_TEST, Listing, classes_of

COLUMNS = ("path", "label", "labels", "target", "split", "group")
SEPARATOR = ";"  # of the classes in the column `labels`


class _Table(NamedTuple):
    """A CSV file: its columns, its rows by column, and the line in the file of each row."""

    file: Path
    header: list[str]
    rows: list[dict[str, str]]
    lines: list[int]

    def at(self, i: int) -> str:
        """Returns where a row is, for messages."""
        return f"{self.file}, line {self.lines[i]}"

    def cells(self, name: str) -> list[str]:
        """Returns the cells of a column, without space around the text."""
        return [row[name].strip() for row in self.rows]


def list_table(file: Path) -> Listing:
    """Lists the images of a CSV file with a header.

    Columns:
        path: the image file, relative to the CSV file's directory.
        label: the class.
        labels: several classes, "cat;dog"; empty for none.
        target, or target:NAME: numbers.
        split: train, val or test; without it `photos.assign_splits` chooses test.
        group: examples with the same text stay in one split, such as the images of a patient. An
            example without a text is a group of its own.

    Raises:
        UserError: the file cannot be read, or has an unknown column or an odd cell; the message
            names the line.
    """
    table = _read(file)
    paths = _paths(table)
    fields, columns = {}, {}
    for name, make in (("label", _label), ("labels", _labels), ("group", _group)):
        if name in table.header:
            fields[name], columns[name] = make(table)
    if targets := [name for name in table.header if name.partition(":")[0] == "target"]:
        fields["target"], columns["target"] = _targets(table, targets)
    split, notes = _splits(table)
    return Listing(
        name=file.name,
        root=file,
        identity=identity_of(file.parent, [file.name, *paths]),
        source=Files(file.parent, paths),
        fields=fields,
        columns=columns,
        split=np.array(split),
        split_file=None if all(split) else file.with_suffix(".split.csv"),
        notes=notes,
    )


def _read(file: Path) -> _Table:
    rows, at = [], []
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, strict=True, restval="")
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            for row in reader:
                rows.append(row)
                at.append(reader.line_num)
    except UnicodeDecodeError as error:
        raise UserError(
            f"config.data.dir={str(file)!r} is neither a directory nor a CSV file in UTF-8: name "
            "the directory of the class folders, or save the table as CSV in UTF-8."
        ) from error
    except csv.Error as error:
        last = at[-1] if at else reader.line_num
        raise UserError(
            f"config.data.dir={str(file)!r} is not a CSV file after line {last}: {error}."
        ) from error
    except OSError as error:
        raise UserError(
            f"config.data.dir={str(file)!r} cannot be read: {error.strerror}."
        ) from error
    table = _Table(file, reader.fieldnames, rows, at)
    _check_header(table)
    for i, row in enumerate(rows):
        if None in row:
            raise UserError(f"{table.at(i)} has more cells than the first line.")
    return table


def _check_header(table: _Table) -> None:
    file, header = table.file, table.header
    if "path" not in header:
        other = len(header) == 1 and next((sign for sign in ";\t" if sign in header[0]), "")
        comma = f"Its cells are divided by {other!r}: divide them by commas. " if other else ""
        raise UserError(
            f"{file} has no column 'path'.{nearest('path', header)} {comma}Its first line must "
            f"name the columns, of {', '.join(COLUMNS)}."
        )
    for name in header:
        if name.partition(":")[0] not in COLUMNS or (":" in name and name[:7] != "target:"):
            raise UserError(
                f"{file} has the unknown column {name!r}.{nearest(name, COLUMNS)} There are: "
                f"{', '.join(COLUMNS)}, target:NAME. Rename or remove it."
            )
        if header.count(name) > 1:
            raise UserError(f"{file} has {header.count(name)} columns {name!r}: keep one.")


def _paths(table: _Table) -> list[str]:
    if not table.rows:
        raise UserError(f"{table.file} names no images: add a line for each below the first line.")
    found: dict[str, int] = {}
    for i, row in enumerate(table.rows):
        path = row["path"]
        if not path.strip() or "\0" in path:
            raise UserError(f"{table.at(i)} has no path: add it, or remove the line.")
        if found.setdefault(path, i) != i:
            raise UserError(
                f"{table.at(i)} names {path!r} again, as line {table.lines[found[path]]} does: "
                "keep one of them. Several classes of an image belong into the column 'labels'."
            )
    return list(found)


def _label(table: _Table) -> tuple[Field, np.ndarray]:
    cells = table.cells("label")
    for i, cell in enumerate(cells):
        if not cell:
            raise UserError(f"{table.at(i)} has no label: add it, or remove the line.")
    classes, label = classes_of(np.array(cells))
    if len(classes) == 1:
        raise UserError(
            f"{table.file} has the images of only one class, {classes[0]!r}: a network needs two "
            "to tell apart."
        )
    return label_field(classes), label


def _labels(table: _Table) -> tuple[Field, np.ndarray]:
    cells = table.cells("labels")
    parts = [[part.strip() for part in cell.split(SEPARATOR) if part.strip()] for cell in cells]
    classes, _ = classes_of(np.array([name for row in parts for name in row]))
    if not classes:
        raise UserError(f"{table.file} has no class in its column 'labels': add some.")
    position = {name: i for i, name in enumerate(classes)}
    labels = np.zeros((len(cells), len(classes)), bool)
    for row, names in zip(labels, parts, strict=True):
        row[[position[name] for name in names]] = True
    return labels_field(classes), labels


def _group(table: _Table) -> tuple[Field, np.ndarray]:
    cells = table.cells("group")
    names = [(cell, -1 if cell else i) for i, cell in enumerate(cells)]
    position = {name: i for i, name in enumerate(sorted(set(names)))}
    return Field((), "int32", "group"), np.array([position[name] for name in names], np.int32)


def _targets(table: _Table, names: list[str]) -> tuple[Field, np.ndarray]:
    values = np.empty((len(table.rows), len(names)), np.float32)
    for j, name in enumerate(names):
        for i, cell in enumerate(table.cells(name)):
            try:
                with np.errstate(over="ignore"):
                    values[i, j] = float(cell)
            except ValueError:
                values[i, j] = np.nan
            if not np.isfinite(values[i, j]):
                raise UserError(
                    f"{table.at(i)}: {name}={cell!r} is not a finite number of 32 bits, such as "
                    "1.5: correct it, or remove the line."
                )
    return values_field([name.partition(":")[2] or name for name in names]), values


def _splits(table: _Table) -> tuple[list[str], tuple[str, ...]]:
    """Returns the split of each row, "" where a split has to be chosen, and lines for the log."""
    if "split" not in table.header:
        return [""] * len(table.rows), ()
    cells = table.cells("split")
    for i, cell in enumerate(cells):
        if cell and cell not in SPLIT_FOLDERS:
            raise UserError(
                f"{table.at(i)} has the unknown split {cell!r}: write train, val or test."
            )
    split = [SPLIT_FOLDERS.get(cell, "") for cell in cells]
    if set(split) == {"train"}:
        return [""] * len(split), ()  # nothing to test on: a part of train is chosen
    if set(split) == {"train", "val"}:
        return ["test" if name == "val" else name for name in split], (VAL_IS_TEST,)
    return split, ()
