"""Lists images with a mask each, which holds the class of every pixel.

    DIR/{train,val,test}/images/NAME.jpg     or .png, or another kind of image
    DIR/{train,val,test}/labels/NAME.png     one channel: the number of the pixel's class
    DIR/classes.txt                          the classes, a line each, from number 0 on

The folder of the masks may also be called masks, and DIR may hold the two folders itself: then a
fifth of the images becomes test. The value 255 is ignored, and so is a class called "void".
PASCAL VOC's own layout has other folders, see `list_voc_masks`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.data.encoded import Files
from cv_jax.data.fields import mask_field
from cv_jax.data.read_mask import mask_numbers
from cv_jax.data.sources.folder import SPLIT_FILE, SPLIT_FOLDERS, identity_of, images_by_name
from cv_jax.data.sources.listing import Listing, Masks, known_splits, left_out

VOID = "void"  # the name of a class that is ignored
CAMVID = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
    VOID,
)
VOC = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_FOLDERS = ("labels", "masks")


class Pair(NamedTuple):
    """An image with its mask: paths relative to the data set's directory, and the split."""

    image: str
    mask: str
    split: str


def list_masks(directory: Path, join_val: bool, names: Sequence[str] = ()) -> Listing:
    """Lists the images of a directory in the layout above, in the order of their names.

    Args:
        directory: see above.
        join_val: whether the images of val are training images, if there is test.
        names: the classes; (): those of classes.txt.

    Raises:
        UserError: the directory has another layout, or no classes.
    """
    _require_directory(directory)
    files = [] if names else ["classes.txt"]
    names = names or _read_names(directory)
    found = {
        entry: SPLIT_FOLDERS[entry.lower()]
        for entry in sorted(os.listdir(directory))
        if entry.lower() in SPLIT_FOLDERS and (directory / entry).is_dir()
    }
    pairs, notes = [], []
    for folder, split in (found or {"": ""}).items():
        part = directory / folder
        masks = [name for name in _FOLDERS if (part / name).is_dir()]
        if not (part / "images").is_dir() or len(masks) != 1:
            raise UserError(
                f"config.data.dir: {part} must have the folders images and labels, or images and "
                "masks: see docs/segmentation.md for the layout."
            )
        names_there = images_by_name(part / "images")
        pairs += _pairs(directory, part / "images", part / masks[0], names_there, split, notes)
    return _listing("masks", directory, pairs, names, files, notes, join_val)


def list_voc_masks(directory: Path, join_val: bool) -> Listing:
    """Lists the images of VOC's folder for segmentation, such as VOCdevkit/VOC2012.

    The images are those of ImageSets/Segmentation/{train,val,test}.txt. Without test, or where
    test has no masks, val is test.

    Raises:
        UserError: the directory has another layout.
    """
    _require_directory(directory)
    sets = directory / "ImageSets" / "Segmentation"
    images, masks = directory / "JPEGImages", directory / "SegmentationClass"
    for folder in (sets, images, masks):
        if not folder.is_dir():
            raise UserError(
                f"config.data.dir={str(directory)!r} has no folder "
                f"{folder.relative_to(directory)}: name a folder such as VOCdevkit/VOC2012."
            )
    files, pairs, notes, known = [], [], [], images_by_name(images)
    for split in ("train", "val", "test"):
        file = sets / f"{split}.txt"
        if file.exists():
            files.append(str(file.relative_to(directory)))
            lines = file.read_text().split()
            there = {line: known[line] for line in lines if line in known}
            if missing := [line for line in lines if line not in known]:
                notes.append(left_out("image", "without an image", missing))
            pairs += _pairs(directory, images, masks, there, split, notes)
    return _listing("voc_masks", directory, pairs, VOC, files, notes, join_val)


def _require_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise UserError(f"config.data.dir={str(directory)!r} is a file: name a directory.")


def _read_names(directory: Path) -> list[str]:
    file = directory / "classes.txt"
    try:
        names = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} cannot be read: write the names of the classes there, a line each, in the "
            "order of their numbers in the masks."
        ) from error
    if not names or len(set(names)) < len(names) or len(names) > 255:
        raise UserError(
            f"{file} has {len(names)} names, {len(set(names))} of them different: write 1 to 255 "
            "names, each once."
        )
    return names


def _pairs(
    root: Path, images: Path, masks: Path, names: dict[str, str], split: str, notes: list[str]
) -> list[Pair]:
    """Returns the images of {name: file name} that have a mask; notes name those without."""
    of_mask = images_by_name(masks)
    if alone := [str((images / names[x]).relative_to(root)) for x in names if x not in of_mask]:
        notes.append(left_out("image", "without a mask", alone))
    return [
        Pair(
            str((images / file).relative_to(root)),
            str((masks / of_mask[name]).relative_to(root)),
            split,
        )
        for name, file in names.items()
        if name in of_mask
    ]


def _listing(
    name: str,
    root: Path,
    pairs: list[Pair],
    names: Sequence[str],
    files: list[str],
    notes: list[str],
    join_val: bool,
) -> Listing:
    if not pairs:
        raise UserError(
            f"config.data.dir={str(root)!r} has no images with masks.{' '.join(['', *notes])}"
        )
    pairs = known_splits(pairs, notes, join_val)
    images, masks = [pair.image for pair in pairs], [pair.mask for pair in pairs]
    split = np.array([pair.split for pair in pairs])
    ignored = tuple(i for i, x in enumerate(names) if x == VOID)
    classes = [x for x in names if x != VOID]
    if ignored and ignored != (len(classes),):
        raise UserError(
            f"{root / 'classes.txt'}: {VOID!r} must be the last class, so that the numbers of the "
            "others have no gap."
        )
    return Listing(
        name=name,
        root=root,
        identity=f"{identity_of(root, [*files, *images, *masks])} {join_val}",
        source=Files(root, images),
        fields={"mask": mask_field(classes)},
        columns={},
        split=split,
        split_file=None if all(split) else root / SPLIT_FILE,
        notes=tuple(notes),
        masks=Masks(Files(root, masks), mask_numbers(len(classes), ignored)),
    )
