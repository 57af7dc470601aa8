"""Lists images with boxes in COCO's format: a JSON file of "instances", and the images.

    DIR/annotations/instances_train2017.json    and instances_val2017.json, any year or none; the
    DIR/train2017/NAME.jpg                      images may be in DIR/images/train2017, DIR/images

    DIR/train/_annotations.coco.json            and DIR/valid, DIR/test: as Roboflow exports
    DIR/train/NAME.jpg

    FILE.json                                   one file without splits
    NAME.jpg                                    beside the file, or in a folder `images` beside it

Source of the format: https://cocodataset.org/#format-data
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.data.sources.folder import SPLIT_FOLDERS
from cv_jax.data.sources.listing import Listing, known_splits, left_out
from cv_jax.data.sources.objects import (
    Annotation,
    known_size,
    list_annotated,
)

ROBOFLOW = "_annotations.coco.json"


class _Part(NamedTuple):
    """A JSON file, the folders where its images may be, and its split."""

    file: Path
    folders: list[Path]
    split: str


class _Found(NamedTuple):
    """What a JSON file says: the annotations, the names of its categories, lines for the log."""

    annotations: list[Annotation]
    categories: dict[float, str]
    notes: list[str]


def list_coco(where: Path) -> Listing:
    """Lists the images of a JSON file, or of a directory of JSON files, in their order there.

    An image without annotations has no boxes, and is kept. Without test, val is test; with train
    alone, and of one JSON file, a fifth of the images becomes test, see `photos.assign_splits`. The
    classes are in the order of their ids; categories of the same name are one class.

    Args:
        where: see above.

    Raises:
        UserError: the directory has another layout, or a file is not in COCO's format.
    """
    root = where if where.is_dir() else where.parent
    parts = _parts(where) if where.is_dir() else [_Part(where, [root, root / "images"], "")]
    annotations, notes, named = [], [], []
    for part in parts:
        found = _read(root, part)
        annotations += found.annotations
        notes += found.notes
        named += found.categories.items()
    annotations = known_splits(annotations, notes)
    classes = list(dict.fromkeys(name for _, name in sorted(named)))
    files = [str(part.file.relative_to(root)) for part in parts]
    listing = list_annotated("coco", root, annotations, classes, files, notes)
    if root == where:
        return listing
    return listing._replace(root=where, split_file=where.with_suffix(".split.csv"))


def _parts(directory: Path) -> list[_Part]:
    parts = []
    for split in ("train", "val", "test"):
        for file in sorted((directory / "annotations").glob(f"instances_{split}*.json")):
            name = file.stem.removeprefix("instances_")
            images = directory / "images"
            parts.append(_Part(file, [directory / name, images / name, images], split))
    for name, split in SPLIT_FOLDERS.items() if not parts else ():
        file = directory / name / ROBOFLOW
        if file.exists():
            parts.append(_Part(file, [file.parent], split))
    first: dict[str, Path] = {}
    for part in parts:
        if first.setdefault(part.split, part.file) != part.file:
            files = f"{first[part.split]} and {part.file}"
            raise UserError(f"{files} are both of the split {part.split!r}: keep one of them.")
    if not parts:
        raise UserError(
            f"config.data.dir={str(directory)!r} has neither annotations/instances_train*.json nor "
            f"train/{ROBOFLOW}: name such a directory, or the JSON file, see docs/detection.md."
        )
    if "train" not in first:
        raise UserError(
            f"config.data.dir={str(directory)!r} has {parts[0].file.relative_to(directory)}, but "
            "no such file of train: add it, or name the JSON file itself."
        )
    return parts


def _read(root: Path, part: _Part) -> _Found:
    """Reads a JSON file, and looks which of its images exist."""
    file, shown = part.file, str(part.file.relative_to(root))
    content = _content(file)
    categories = {}
    for i, row in enumerate(_rows(file, content, "categories")):
        where = f"categories[{i}]"
        name = _get(file, where, row, "name", str).strip()
        if not name:
            raise UserError(f"{file}: {where}['name'] is empty: name the class.")
        categories[_new_id(file, where, row, categories, int | float)] = name
    images, boxes = {}, {}
    for i, row in enumerate(_rows(file, content, "images")):
        where = f"images[{i}]"
        name = _get(file, where, row, "file_name", str)
        size = [_get(file, where, row, key, int | float, 0) for key in ("height", "width")]
        key = _new_id(file, where, row, images, int | float | str)
        images[key], boxes[key] = (name, known_size(*size)), []
    no_image, no_category = [], []
    for i, row in enumerate(_rows(file, content, "annotations")):
        where = f"annotations[{i}]"
        image = _get(file, where, row, "image_id", int | float | str)
        category = _get(file, where, row, "category_id", int | float)
        box = _box(file, where, _get(file, where, row, "bbox", list))
        crowd = _get(file, where, row, "iscrowd", int | float, 0)
        if image not in images:
            no_image.append(f"{image!r} in {shown}")
        elif category not in categories:
            no_category.append(f"{category!r} in {shown}")
        else:
            boxes[image].append((box, categories[category], crowd == 1))
    annotations, missing = [], []
    for key, (name, size) in images.items():
        path = _find(part.folders, name)
        if path is None:
            missing.append(f"{name} of {shown}")
        else:
            path = path.relative_to(root) if path.is_relative_to(root) else path
            annotations.append(_annotation(str(path), size, boxes[key], part.split))
    faults = (
        ("image", "whose file is missing", missing),
        ("annotation", "of an unknown image_id", no_image),
        ("annotation", "of an unknown category_id", no_category),
    )
    notes = [left_out(*fault) for fault in faults if fault[2]]
    return _Found(annotations, categories, notes)


def _annotation(
    path: str,
    size: tuple[int, int] | None,
    objects: Sequence[tuple[list[float], str, bool]],
    split: str,
) -> Annotation:
    return Annotation(
        path=path,
        source=path,
        size=size,
        boxes=np.array([box for box, _, _ in objects], np.float64).reshape(-1, 4),
        labels=[name for _, name, _ in objects],
        difficult=np.zeros(len(objects), bool),
        crowd=np.array([crowd for _, _, crowd in objects], bool),
        split=split,
    )


def _find(folders: Sequence[Path], name: str) -> Path | None:
    """Returns the image file of a name, in the first folder that has it."""
    return next((folder / name for folder in folders if os.path.isfile(folder / name)), None)


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): correct it.") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{file} holds no JSON object with the keys images, annotations, categories."
        )
    return content


def _rows(file: Path, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    rows = _get(file, "", content, key, list)
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{file}: {key}[{i}] is {_shown(row)}, and must be an object.")
    return rows


_KINDS = {
    str: "a text",
    list: "a list",
    int | float: "a number",
    int | float | str: "a number or a text",  # some tools number images by texts
}


def _get(
    file: Path, where: str, row: dict[str, Any], key: str, kind: Any, default: Any = None
) -> Any:
    """Returns row[key], which must be of a kind; `default`: the value of a key that is missing."""
    value = default if row.get(key) is None else row[key]
    at = f"{where}[{key!r}]" if where else repr(key)
    if value is None:
        raise UserError(f"{file} has no {at}, so it is not in COCO's format of instances: add it.")
    if not isinstance(value, kind) or (isinstance(value, bool) and key != "iscrowd"):
        raise UserError(f"{file}: {at} is {_shown(value)}, and must be {_KINDS[kind]}.")
    return value


def _new_id(file: Path, where: str, row: dict[str, Any], known: dict, kind: Any) -> Any:
    key = _get(file, where, row, "id", kind)
    if key in known:
        raise UserError(f"{file}: {where}['id'] is {key!r}, as one before it: keep one of them.")
    return key


def _box(file: Path, where: str, values: list) -> list[float]:
    """Returns the corners x0 y0 x1 y1 of a box x, y, width, height."""
    if len(values) != 4 or not all(isinstance(x, int | float) for x in values):
        raise UserError(
            f"{file}: {where}['bbox'] is {_shown(values)}, and must be 4 numbers: x, y, width, "
            "height."
        )
    try:
        x, y, width, height = map(float, values)
    except OverflowError:
        x = y = width = height = np.nan
    return [x, y, x + width, y + height]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]} ..."
