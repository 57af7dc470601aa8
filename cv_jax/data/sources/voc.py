"""Lists images with boxes in the layout of PASCAL VOC.

    DIR/JPEGImages/NAME.jpg             or .jpeg, .png
    DIR/Annotations/NAME.xml            an <object> with <name> and <bndbox> for each object
    DIR/ImageSets/Main/{train,val,trainval,test}.txt    names of the images; may be missing
    DIR/classes.txt                     the classes, a line each; may be missing

DIR may also hold several such folders, as VOCdevkit with VOC2007 and VOC2012.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.data.sources.listing import VAL_IS_TEST, Listing, some
from cv_jax.data.sources.objects import Annotation, list_annotated

ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
SETS = ("train", "val", "trainval", "test")


def list_voc(directory: Path, join_val: bool) -> Listing:
    """Lists the images of a directory in VOC's layout, in the order of their names.

    Without the file of test, val is test; without any of the files, a fifth of the images becomes
    test, see `photos.assign_splits`. Images that no file names are not used.

    Args:
        directory: see above.
        join_val: whether the images of val are training images, as trainval says.

    Raises:
        UserError: the directory has another layout, or an annotation cannot be read.
    """
    parts = _parts(directory)
    annotations, notes, files = [], [], []
    without_image, without_xml = [], []
    for part in parts:
        splits, read = _splits(directory / part, join_val)
        files += [str(part / file) for file in read]
        images = _images(directory / part)
        names = _names(directory / part)
        if splits is None:
            splits = dict.fromkeys(sorted(names), "")
        for name, split in splits.items():
            xml = part / "Annotations" / f"{name}.xml"
            if name not in names:
                without_xml.append(name)
            elif name not in images:
                without_image.append(str(xml))
            else:
                files.append(str(xml))
                image = str(part / "JPEGImages" / images[name])
                annotations.append(_read(directory, xml, image, split))
    if without_xml:
        notes.append(_left_out(len(without_xml), "image", "without annotation", without_xml))
    if without_image:
        notes.append(_left_out(len(without_image), "annotation", "without image", without_image))
    found = {one.split for one in annotations}
    if found and "test" not in found and "val" in found:
        annotations = [
            one._replace(split={"val": "test"}.get(one.split, one.split)) for one in annotations
        ]
        notes.append(VAL_IS_TEST)
    elif found == {"train"}:
        annotations = [one._replace(split="") for one in annotations]
    listing = list_annotated(
        "voc", directory, annotations, _classes(directory, parts), files, notes
    )
    return listing._replace(identity=f"{listing.identity} {join_val}")


def _left_out(count: int, what: str, why: str, names: list[str]) -> str:
    return f"data    {count:,} {what}{'s' if count > 1 else ''} {why}, left out: {some(names)}"


def _parts(directory: Path) -> list[Path]:
    """Returns the folders of the layout, relative to the directory."""
    if directory.is_file():
        raise UserError(f"config.data.dir={str(directory)!r} is a file: name VOC's directory.")
    if (directory / "Annotations").is_dir():
        return [Path()]
    inner = sorted(path.name for path in directory.iterdir() if (path / "Annotations").is_dir())
    if inner:
        return [Path(name) for name in inner]
    raise UserError(
        f"config.data.dir={str(directory)!r} has no folder Annotations with XML files, nor has a "
        "folder in it: name a directory in the layout of PASCAL VOC, see docs/detection.md."
    )


def _images(part: Path) -> dict[str, str]:
    """Returns {name: file name} of the images."""
    folder = part / "JPEGImages"
    if not folder.is_dir():
        raise UserError(f"{part} has no folder JPEGImages: put the images there.")
    return {path.stem: path.name for path in folder.iterdir() if path.suffix in ENDINGS}


def _names(part: Path) -> set[str]:
    return {path.stem for path in (part / "Annotations").glob("*.xml")}


def _splits(part: Path, join_val: bool) -> tuple[dict[str, str] | None, list[str]]:
    """Returns {name: split} in order, and the files that say so; None: there are no files."""
    found, files = {}, []
    for name in SETS:
        file = part / "ImageSets" / "Main" / f"{name}.txt"
        if not file.exists():
            continue
        files.append(str(file.relative_to(part)))
        split = "train" if name == "trainval" or (join_val and name == "val") else name
        for line in _lines(file):
            before = found.setdefault(line, split)
            if before != split and name != "trainval":
                raise UserError(
                    f"{file} names {line!r}, which is in {before} already: keep one of them."
                )
    return (dict(sorted(found.items())) if files else None), files


def _lines(file: Path) -> Iterator[str]:
    for line in _text(file).splitlines():
        if line.strip():
            yield line.split()[0]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): correct it.") from error


def _classes(directory: Path, parts: list[Path]) -> list[str]:
    for folder in (Path(), *parts):
        file = directory / folder / "classes.txt"
        if file.exists():
            names = [line.strip() for line in _text(file).splitlines() if line.strip()]
            if len(set(names)) < len(names):
                raise UserError(f"{file} names a class twice: keep each once.")
            return names
    return []


def _read(directory: Path, xml: Path, image: str, split: str) -> Annotation:
    """Reads an annotation, whose corners are pixels that are counted from 1 and included.

    So the smaller corner moves by one. Equal corners are a box without area: nobody draws an object
    of one pixel.
    """
    try:
        root = ElementTree.fromstring((directory / xml).read_bytes())
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(
            f"{directory / xml} cannot be read ({error}): correct it, or remove it and its image."
        ) from error
    objects = root.findall("object")
    corners = [[_number(one, f"bndbox/{name}") for name in _CORNERS] for one in objects]
    first, last = np.array(corners, np.float64).reshape(-1, 2, 2).swapaxes(0, 1)
    boxes = np.concatenate([first - (first < last), last - (last < first)], axis=1)
    height, width = (_number(root, f"size/{name}") for name in ("height", "width"))
    known = height > 0 and width > 0
    return Annotation(
        path=image,
        source=str(xml),
        size=(int(height), int(width)) if known else None,
        boxes=boxes,
        labels=[(one.findtext("name") or "").strip() for one in objects],
        difficult=np.array([_number(one, "difficult") == 1 for one in objects], bool),
        crowd=np.zeros(len(objects), bool),
        split=split,
    )


_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _number(element: ElementTree.Element, path: str) -> float:
    try:
        return float(element.findtext(path) or "nan")
    except ValueError:
        return float("nan")
