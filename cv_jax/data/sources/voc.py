"""Lists images with boxes in the layout of PASCAL VOC.

    DIR/JPEGImages/NAME.jpg             or .png, or another kind of image
    DIR/Annotations/NAME.xml            an <object> with <name> and <bndbox> for each object
    DIR/ImageSets/Main/{train,val,trainval,test}.txt    NAME, a line each; may be missing
    DIR/classes.txt                     the classes, a line each; may be missing

DIR may also hold several such folders, as VOCdevkit with VOC2007 and VOC2012.
"""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.data.sources.folder import images_by_name
from cv_jax.data.sources.listing import Listing, known_splits, left_out
from cv_jax.data.sources.objects import (
    Annotation,
    known_size,
    list_annotated,
)

SETS = ("train", "val", "trainval", "test")


def list_voc(directory: Path, join_val: bool) -> Listing:
    """Lists the images of a directory in VOC's layout, in the order of their names.

    Without the file of test, val is test; without any of the files, a fifth of the images becomes
    test, see `photos.assign_splits`. Images that no file names are not used.

    Args:
        directory: see above.
        join_val: whether the images of val are training images, as trainval says, if there is test.

    Raises:
        UserError: the directory has another layout, or an annotation cannot be read.
    """
    parts = _parts(directory)
    classes, files = _classes(directory, parts)
    annotations, notes, without_image, without_xml = [], [], [], []
    for part in parts:
        splits, read = _splits(directory / part)
        files += [str(part / file) for file in read]
        images = _images(directory / part)
        names = _names(directory / part)
        if splits is None:
            splits = dict.fromkeys(sorted({*names, *images}), "")
        for name, split in splits.items():
            xml = part / "Annotations" / f"{name}.xml"
            if name not in names:
                without_xml.append(str(xml))
            elif name not in images:
                without_image.append(str(xml))
            else:
                image = str(part / "JPEGImages" / images[name])
                files.append(str(xml))
                annotations.append(_read(directory, xml, image, split))
    if without_xml:
        notes.append(left_out("image", "whose annotation is missing", without_xml))
    if without_image:
        notes.append(left_out("annotation", "whose image is missing", without_image))
    annotations = known_splits(annotations, notes, join_val)
    listing = list_annotated("voc", directory, annotations, classes, files, notes)
    return listing._replace(identity=f"{listing.identity} {join_val}")


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
    return images_by_name(folder)


def _names(part: Path) -> set[str]:
    paths = (part / "Annotations").glob("*.xml")
    return {path.stem for path in paths if not path.name.startswith(".")}


def _splits(part: Path) -> tuple[dict[str, str] | None, list[str]]:
    """Returns {name: split} in order, and the files that say so; None: there are no files."""
    found, files = {}, []
    for name in SETS:
        file = part / "ImageSets" / "Main" / f"{name}.txt"
        if not file.exists():
            continue
        files.append(str(file.relative_to(part)))
        split = "train" if name == "trainval" else name
        for line in _lines(file):
            before = found.setdefault(line, split)
            if before != split and name != "trainval":
                raise UserError(
                    f"{file} names {line!r}, which is in {before} already: keep one of them."
                )
    return (dict(sorted(found.items())) if files else None), files


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in _text(file).splitlines() if line.strip()]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): correct it.") from error


def _classes(directory: Path, parts: list[Path]) -> tuple[list[str], list[str]]:
    """Returns the classes that classes.txt names and the file, relative; [], [] without it."""
    for folder in (Path(), *parts):
        file = directory / folder / "classes.txt"
        if file.exists():
            names = _lines(file)
            if not names:
                raise UserError(f"{file} names no class: write one a line, or remove the file.")
            if len(set(names)) < len(names):
                raise UserError(f"{file} names a class twice: keep each once.")
            return names, [str(folder / "classes.txt")]
    return [], []


def _read(directory: Path, xml: Path, image: str, split: str) -> Annotation:
    """Reads an annotation, whose corners are pixels that are counted from 1 and included.

    So the smaller corner moves by one. Equal corners are a box without area: nobody draws an object
    of one pixel.
    """
    try:
        root = ElementTree.fromstring((directory / xml).read_bytes())
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:  # or its encoding
        raise UserError(
            f"{directory / xml} cannot be read ({error}): correct it, or remove it and its image."
        ) from error
    objects = root.findall("object")
    if not objects and root.tag != "annotation":
        raise UserError(
            f"{directory / xml} has the element <{root.tag}> and no <annotation>: correct it, or "
            "remove it and its image."
        )
    corners = [[_number(one, f"bndbox/{name}") for name in _CORNERS] for one in objects]
    first, last = np.array(corners, np.float64).reshape(-1, 2, 2).swapaxes(0, 1)
    boxes = np.concatenate([first - (first < last), last - (last < first)], axis=1)
    height, width = (_number(root, f"size/{name}") for name in ("height", "width"))
    return Annotation(
        path=image,
        source=str(xml),
        size=known_size(height, width),
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
