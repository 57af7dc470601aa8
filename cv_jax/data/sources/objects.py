"""Makes a listing of images with boxes, whatever the format of their annotations.

Boxes are half-open, in pixels of the image as it is displayed, after its EXIF rotation. Where an
annotation's height and width are those of the image before that rotation, its boxes turn with it.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.data.encoded import Files
from cv_jax.data.fields import Examples, Field, boxes_fields
from cv_jax.data.read_image import MAX_PIXELS, read_bytes, read_facts
from cv_jax.data.sources.folder import SPLIT_FILE, identity_of
from cv_jax.data.sources.listing import Listing, some, unique


class Annotation(NamedTuple):
    """What is known of an image before it is read.

    Attributes:
        path: the image file, relative to the data set's directory.
        source: where the annotation is, for messages.
        size: (height, width) that the annotation says; None: the image file says it.
        boxes: (k, 4) float64, corners x0 y0 x1 y1, half-open; any numbers.
        labels: k class names; "": the annotation names no class.
        difficult, crowd: (k,) bool, see `fields.boxes_fields`.
        split: "train", "val", "test" or "", see `Listing`.
    """

    path: str
    source: str
    size: tuple[int, int] | None
    boxes: np.ndarray
    labels: list[str]
    difficult: np.ndarray
    crowd: np.ndarray
    split: str


class AnnotatedFiles(NamedTuple):
    """Image files with boxes; a `Source`."""

    files: Files
    sizes: list[tuple[int, int] | None]
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def read(self, position: int) -> bytes:
        return self.files.read(position)

    def name(self, position: int) -> str:
        return self.files.name(position)

    def example(self, position: int) -> tuple[bytes, dict[str, Any]]:
        """Returns the encoded image, and its boxes in pixels of the displayed image."""
        data = self.read(position)
        facts, said = read_facts(data), self.sizes[position]
        if said is None or said == facts.size:
            return data, {}
        if facts.orientation < 5 or said != facts.size[::-1]:
            shown = ["{}x{}".format(*size[::-1]) for size in (said, facts.size)]
            raise UserError(f"its annotation is of {shown[0]} pixels, and it has {shown[1]}")
        return data, {"boxes": turn_boxes(self.boxes[position], said, facts.orientation)}


def turn_boxes(boxes: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Moves boxes (k, 4) of an image of `size` (h, w) as an EXIF orientation of 5 to 8 moves it."""
    h, w = size
    x, y = boxes[:, ::2], boxes[:, 1::2]
    x, y = {5: (y, x), 6: (h - y, x), 7: (h - y, w - x), 8: (y, w - x)}[orientation]
    turned = np.stack([x.min(1), y.min(1), x.max(1), y.max(1)], axis=1)
    return np.where((boxes[:, 2:] > boxes[:, :2]).all(1)[:, None], turned, boxes)  # not padding


def list_annotated(
    name: str,
    root: Path,
    annotations: Sequence[Annotation],
    classes: Sequence[str],
    files: Sequence[str],
    notes: Sequence[str] = (),
) -> Listing:
    """Lists annotated images; counts and names the boxes that it corrects or leaves out.

    Args:
        name: of the data set, for messages.
        root: its directory.
        annotations: one for each image.
        classes: the names of the classes; (): all names of the annotations, in order.
        files: the paths of the annotations, below `root`.
        notes: lines for the log.

    Raises:
        UserError: there is no image, no image of train or test, or no box.
    """
    splits = {one.split for one in annotations}
    if "" not in splits and (lacking := [x for x in ("train", "test") if x not in splits]):
        of = f" in the split {lacking[0]!r}" if annotations else ""
        faults = [f" {line.removeprefix('data    ')}." for line in notes if "left out" in line]
        raise UserError(
            f"config.data.dir={str(root)!r} has no images with annotations{of}.{''.join(faults)} "
            "See docs/detection.md for what it must hold."
        )
    if not classes:
        classes = sorted({label for one in annotations for label in one.labels if label})
    annotations = [_with_size(root, one) for one in annotations]
    fields, columns, found = box_columns(root, annotations, classes)
    paths = [one.path for one in annotations]
    split = np.array([one.split for one in annotations])
    return Listing(
        name=name,
        root=root,
        identity=identity_of(root, [*files, *paths]),
        source=AnnotatedFiles(
            Files(root, paths), [one.size for one in annotations], columns["boxes"]
        ),
        fields=fields,
        columns=columns,
        split=split,
        split_file=None if all(split) else root / SPLIT_FILE,
        notes=(*notes, *found),
    )


def box_columns(
    root: Path, annotations: Sequence[Annotation], classes: Sequence[str]
) -> tuple[dict[str, Field], Examples, list[str]]:
    """Returns the fields of `fields.boxes_fields`, their arrays, and lines for the log.

    Raises:
        UserError: no box can be learned from.
    """
    found: Mapping[str, list[str]] = defaultdict(list)
    known = set(classes)
    kept = [_kept(one, known, found) for one in annotations]
    count = max(len(one.labels) for one in kept)
    if not count:
        shown = "; ".join(_notes(found))
        raise UserError(
            f"config.data.dir={str(root)!r} has no boxes to learn from{shown and f' ({shown})'}: "
            "add annotations, or choose another directory."
        )
    position = {label: i for i, label in enumerate(classes)}
    columns = {
        "boxes": _padded([one.boxes for one in kept], (count, 4), 0, np.float32),
        "box_label": _padded([[position[x] for x in one.labels] for one in kept], (count,), -1),
        "difficult": _padded([one.difficult for one in kept], (count,), False, bool),
        "crowd": _padded([one.crowd for one in kept], (count,), False, bool),
    }
    notes = [f"data    {line}" for line in _notes(found)]
    return boxes_fields(classes, count), columns, [*notes, _counted(classes, kept)]


def known_size(height: float, width: float) -> tuple[int, int] | None:
    """Returns the size that an annotation says; None where no image can have it."""
    known = 1 <= height <= MAX_PIXELS and 1 <= width <= MAX_PIXELS
    return (int(height), int(width)) if known else None


def _with_size(root: Path, one: Annotation) -> Annotation:
    """Takes the size that an annotation does not say from its image, unless that is broken."""
    if one.size is None:
        with suppress(UserError):
            return one._replace(size=read_facts(read_bytes(root / one.path)).size)
    return one


def _kept(one: Annotation, classes: Collection[str], found: Mapping[str, list[str]]) -> Annotation:
    """Returns the boxes that can be learned from, and adds the others to `found` by their fault."""
    h, w = one.size or (MAX_PIXELS, MAX_PIXELS)  # no image has a longer side
    good, boxes = [], one.boxes.tolist()  # Python's floats: COCO has 900,000 boxes
    for i, ((x0, y0, x1, y1), label) in enumerate(zip(boxes, one.labels, strict=True)):
        if label not in classes:
            fault = f"of the unknown class {label!r}" if label else "without the name of a class"
            found[f"{fault}, left out"].append(one.source)
            continue
        if not all(map(math.isfinite, (x0, y0, x1, y1))):
            found["with corners that are not numbers, left out"].append(one.source)
            continue
        if x1 < x0 or y1 < y0:
            found["with exchanged corners, put in order"].append(one.source)
            x0, y0, x1, y1 = min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
        inside = [max(x0, 0), max(y0, 0), min(x1, w), min(y1, h)]
        if inside[2] <= inside[0] or inside[3] <= inside[1]:
            fault = "without area" if x0 == x1 or y0 == y1 else "outside the image"
            found[f"{fault}, left out"].append(one.source)
            continue
        if inside != [x0, y0, x1, y1]:
            found["partly outside the image, cut"].append(one.source)
        boxes[i] = inside
        good.append(i)
    return one._replace(
        boxes=np.array([boxes[i] for i in good]).reshape(-1, 4),
        labels=[one.labels[i] for i in good],
        difficult=one.difficult[good],
        crowd=one.crowd[good],
    )


def _notes(found: Mapping[str, list[str]]) -> list[str]:
    return [
        f"{len(where):,} box{'es' if len(where) > 1 else ''} {fault}: {some(unique(where))}"
        for fault, where in found.items()
    ]


def _padded(rows: Sequence, shape: tuple[int, ...], fill: float, dtype: Any = np.int32):
    array = np.full((len(rows), *shape), fill, dtype)
    for one, row in zip(array, rows, strict=True):
        one[: len(row)] = row
    return array


def _counted(classes: Sequence[str], kept: Sequence[Annotation]) -> str:
    counts = dict.fromkeys(classes, 0)
    for one in kept:
        for label in one.labels:
            counts[label] += 1
    shown = [f"{label} {count:,}" for label, count in counts.items()]
    total, most = sum(counts.values()), max(len(one.labels) for one in kept)
    return f"data    {total:,} boxes, up to {most} an image: {some(shown, 10)}"
