"""Lists images in class folders: DIR/{train,val,test}/CLASS/*, or DIR/CLASS/*."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from cv_jax.config.errors import UserError
from cv_jax.data.encoded import Files
from cv_jax.data.fields import label_field
from cv_jax.data.sources.listing import VAL_IS_TEST, Listing, classes_of, some

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
        UserError: the directory cannot be read, has no images, or only one class.
    """
    splits, notes = _split_folders(directory)
    paths, names, split, odd, empty, closed = [], [], [], [], [], []
    for folder, of_split in splits.items():
        for entry in _entries(directory / folder):
            if not entry.is_dir():
                odd.append(os.path.join(folder, entry.name))
                continue
            images, others, unread = _images_below(Path(entry.path), directory)
            paths += images
            names += [entry.name] * len(images)
            split += [of_split] * len(images)
            odd += others
            closed += unread
            empty += [] if images or unread else [os.path.join(folder, entry.name)]
    if not paths:
        raise UserError(
            f"config.data.dir={str(directory)!r} has no images in class folders: put them into "
            "DIR/{train,test}/CLASS/ or DIR/CLASS/, or name a CSV file with the columns path and "
            f"label.{' Left out: ' + some(closed) + '.' if closed else ''}"
        )
    # By file name, so that numbered files are in the order of their numbers, over all classes.
    order = sorted(range(len(paths)), key=lambda i: (os.path.basename(paths[i]), paths[i]))
    paths, names, split = ([x[i] for i in order] for x in (paths, names, split))
    classes, label = classes_of(np.array(names))
    if len(classes) == 1:
        raise UserError(
            f"config.data.dir={str(directory)!r} has the images of only one class, {classes[0]!r}: "
            "a network needs two to tell apart. Is DIR the folder above the class folders?"
        )
    if closed:
        folders = "folders" if len(closed) > 1 else "folder"
        notes.append(f"data    {len(closed):,} {folders} left out: {some(closed)}")
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


def _entries(directory: Path) -> Iterator[os.DirEntry]:
    """Yields what a directory holds, by name, without hidden files and the file of splits."""
    try:
        found = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"config.data.dir: {directory} cannot be read ({error.strerror}): make it readable."
        ) from error
    for entry in found:
        if not entry.name.startswith(".") and entry.name != SPLIT_FILE:
            yield entry


def _split_folders(directory: Path) -> tuple[dict[str, str], list[str]]:
    """Returns {folder: split}, {"": ""} for class folders without splits, and lines for the log."""
    names = [entry.name for entry in _entries(directory) if entry.is_dir()]
    found = {name: SPLIT_FOLDERS[name.lower()] for name in names if name.lower() in SPLIT_FOLDERS}
    shown = " and ".join(found)
    if "train" not in found.values():
        if found and len(found) == len(names):
            raise UserError(
                f"config.data.dir={str(directory)!r} has the split folders {shown}, but no train: "
                "add the folder of the training images, or rename one."
            )
        return {"": ""}, []
    if len(set(found.values())) < len(found):
        raise UserError(
            f"config.data.dir={str(directory)!r} has {shown}, of which two mean the same split: "
            "keep one of them."
        )
    notes = []
    if beside := [entry.name for entry in _entries(directory) if entry.name not in found]:
        are = "are" if len(found) > 1 else "is"
        notes.append(f"data    only {shown} {are} read; not read is: {some(beside)}")
    if len(found) == 1:
        return dict.fromkeys(found, ""), notes  # nothing to test on: a part of train is chosen
    if "test" not in found.values():
        found = {name: "test" if split == "val" else split for name, split in found.items()}
        notes.append(VAL_IS_TEST)
    return found, notes


def _images_below(folder: Path, directory: Path) -> tuple[list[str], list[str], list[str]]:
    """Returns the images and other files below a folder, and the folders that cannot be read.

    Paths are relative to `directory`. Links are followed, but no folder is read twice: a link to a
    folder above would never end.
    """
    images, others, closed, seen = [], [], [], set()

    def note(error):
        closed.append(f"{os.path.relpath(error.filename, directory)} ({error.strerror})")

    for where, folders, names in os.walk(folder, onerror=note, followlinks=True):
        folders.sort()
        about = os.stat(where)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        inside = os.path.relpath(where, directory)
        for name in sorted(names):
            if not name.startswith("."):
                ending = os.path.splitext(name)[1].lower()
                (images if ending in ENDINGS else others).append(os.path.join(inside, name))
    return images, others, closed


def images_by_name(folder: Path) -> dict[str, str]:
    """Returns {name without ending: file name} of the images in a folder, in order.

    Raises:
        UserError: two images have one name.
    """
    found: dict[str, str] = {}
    for file in sorted(os.listdir(folder)):
        name, ending = os.path.splitext(file)
        if file.startswith(".") or ending.lower() not in ENDINGS:
            continue
        if found.setdefault(name, file) != file:
            raise UserError(f"{folder} has {found[name]} and {file}: keep one of them.")
    return found


def identity_of(root: Path, paths: list[str]) -> str:
    """Returns a digest of the names, sizes, times and modes of files; a missing file has none."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            about = os.stat(os.path.join(root, path))
            # The mode, because a file that could not be read may be allowed later.
            facts = about.st_size, about.st_mtime_ns, about.st_mode
        except OSError:
            facts = None
        digest.update(repr((path, facts)).encode())
    return digest.hexdigest()
