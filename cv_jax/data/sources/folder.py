"""Lists images in class folders: DIR/{train,val,test}/CLASS/*, or DIR/CLASS/*."""

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image

from cv_jax.config.errors import UserError
from cv_jax.data.encoded import Files
from cv_jax.data.fields import label_field
from cv_jax.data.sources.listing import Listing, classes_of, require_images, some

SPLIT_FOLDERS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
SPLIT_FILE = "cv_jax_split.csv"
# Endings of images; the rest is counted as no image. ".hdr" and ".pic" are OpenCV's.
ENDINGS = {*Image.registered_extensions(), ".hdr", ".pic"}


def list_folder(directory: Path) -> Listing:
    """Lists a directory of class folders, in the order of the file names.

    Sub-folders of a class belong to the class. With the folders train and test, or train and val,
    the splits are known: where there is no test, val becomes test, as in TFDS. Else
    `photos.assign_splits` chooses test.

    Raises:
        UserError: the directory does not exist, has no images, or only one class.
    """
    if not directory.is_dir():
        raise UserError(
            f"config.data.dir={str(directory)!r} is not a directory: name the directory of the "
            "class folders, or a CSV file."
        )
    splits = _split_folders(directory)
    paths, names, split, odd, empty = [], [], [], [], []
    for folder, of_split in splits.items():
        inside = directory / folder
        for entry in sorted(os.scandir(inside), key=lambda e: e.name):
            if entry.name.startswith(".") or entry.name == SPLIT_FILE:
                continue
            if not entry.is_dir():
                odd.append(os.path.join(folder, entry.name))
                continue
            images, others = _images_below(Path(entry.path), directory)
            paths += images
            names += [entry.name] * len(images)
            split += [of_split] * len(images)
            odd += others
            empty += [] if images else [os.path.join(folder, entry.name)]
    require_images(bool(paths), "config.data.name='folder'", directory)
    # By file name, so that numbered files are in the order of their numbers, over all classes.
    order = sorted(range(len(paths)), key=lambda i: (os.path.basename(paths[i]), paths[i]))
    paths, names, split = ([x[i] for i in order] for x in (paths, names, split))
    classes, label = classes_of(np.array(names))
    if len(classes) == 1:
        raise UserError(
            f"config.data.dir={str(directory)!r} has the images of only one class, {classes[0]!r}: "
            "a network needs two to tell apart. Is DIR the folder above the class folders?"
        )
    notes = []
    if odd:
        are = "files are not images" if len(odd) > 1 else "file is not an image"
        notes.append(f"data    {len(odd):,} {are}: {some(odd)}")
    if empty:
        folders = "class folders" if len(empty) > 1 else "class folder"
        notes.append(f"data    {len(empty):,} {folders} without images: {some(empty)}")
    return Listing(
        name="folder",
        root=directory,
        identity=identity_of(directory, paths),
        source=Files(directory, paths),
        fields={"label": label_field(classes)},
        columns={"label": label},
        split=np.array(split),
        split_file=None if all(split) else directory / SPLIT_FILE,
        notes=tuple(notes),
    )


def _split_folders(directory: Path) -> dict[str, str]:
    """Returns {folder: split}; {"": ""} for class folders without splits."""
    found = {name: SPLIT_FOLDERS[name] for name in SPLIT_FOLDERS if (directory / name).is_dir()}
    if "train" not in found:
        return {"": ""}
    if len(found) == 1:
        return {"train": ""}  # nothing to test on: a part of train is chosen
    if len(set(found.values())) < len(found):
        raise UserError(
            f"config.data.dir={str(directory)!r} has {' and '.join(found)}, which mean the same: "
            "keep one of them."
        )
    if "test" not in found.values():
        found = {name: "test" if split == "val" else split for name, split in found.items()}
    return found


def _images_below(folder: Path, directory: Path) -> tuple[list[str], list[str]]:
    """Returns the paths of images and of other files below a folder, relative to `directory`."""
    images, others = [], []
    for where, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        inside = os.path.relpath(where, directory)
        for name in sorted(names):
            if not name.startswith("."):
                ending = os.path.splitext(name)[1].lower()
                (images if ending in ENDINGS else others).append(os.path.join(inside, name))
    return images, others


def identity_of(root: Path, paths: list[str]) -> str:
    """Returns a digest of the names, sizes and times of files; a missing file has none."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            about = os.stat(os.path.join(root, path))
            facts = about.st_size, about.st_mtime_ns
        except OSError:
            facts = None
        digest.update(repr((path, facts)).encode())
    return digest.hexdigest()
