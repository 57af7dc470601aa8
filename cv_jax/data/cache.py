"""Decoded data sets, kept between runs: `cache_dir()`/data, which CV_JAX_CACHE moves.

An entry is a directory: arrays as .npy files, and cache.json with a checksum of each.
"""

import contextlib
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cv_jax.data.dataset import Stored, field_from_json, field_to_json
from cv_jax.runtime.startup import cache_dir

# Part of every identity: to be raised when decoding gives other arrays than before.
FORMAT = 2


def cached(directory: Path, read: Callable[[Path], Stored], settings: str = "") -> Stored:
    """Returns `read(directory)`, done once; later calls map its arrays from the cache into memory.

    An entry belongs to the directory's path, to `settings`, and to the names, sizes and times of
    all files in the directory and in the directories below it. All of it is verified by checksum on
    every call. A damaged entry is made again, which a line on stderr says; so it does where the
    cache cannot be written, and then there is none.

    Args:
        directory: a prepared data set, .../NAME[/CONFIG]/VERSION.
        read: decodes it.
        settings: what else `read` depends on, as text; each text has an entry of its own.
    """
    path = directory.resolve()
    key = _digest(f"{path}\0{settings}" if settings else str(path))[:12]
    entry = cache_dir() / "data" / f"{path.parent.name}-{path.name}-{key}"
    identity = _identity(path)
    try:
        if found := _load(entry, identity):
            return found
    except Exception as error:  # whatever is wrong with it: it is not trusted
        _warn(f"the cache {entry} is damaged ({error}) and is made again.")
    stored = read(directory)
    try:
        _save(entry, identity, stored)
    except OSError as error:
        _warn(f"the cache {entry} cannot be written ({error}): the next start decodes again.")
    return stored


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(directory: Path) -> str:
    facts = []
    for folder, _, names in os.walk(directory, followlinks=True):
        for name in names:
            path = Path(folder, name)
            stat = path.stat() if path.exists() else path.lstat()  # of a broken link, its own
            facts.append((str(path.relative_to(directory)), stat.st_size, stat.st_mtime_ns))
    return _digest(repr((FORMAT, sorted(facts))))


def _arrays(stored: Stored) -> dict[str, np.ndarray]:
    """Arrays by their names in the entry: SPLIT.FIELD and histogram.FIELD."""
    parts = {"train": stored.train, "test": stored.test, "val": stored.val}
    parts["histogram"] = stored.histograms
    return {
        f"{part}.{name}": array
        for part, arrays in parts.items()
        for name, array in (arrays or {}).items()
    }


def _save(entry: Path, identity: str, stored: Stored) -> None:
    """Writes an entry; cache.json comes last, so that a reader finds all of it or none."""
    entry.mkdir(parents=True, exist_ok=True)
    checks = {}
    for name, array in _arrays(stored).items():
        checks[name] = {"crc32": zlib.crc32(array), "shape": array.shape}
        with _replaced(entry / f"{name}.npy") as file:
            np.save(file, array)
    fields = {name: field_to_json(field) for name, field in stored.fields.items()}
    content = {"identity": identity, "fields": fields, "arrays": checks}
    with _replaced(entry / "cache.json") as file:
        file.write(json.dumps(content, indent=2).encode())


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when all of it is written, and not before."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(entry: Path, identity: str) -> Stored | None:
    """Maps an entry into memory; None where there is none of this identity.

    Raises:
        Exception: of any kind, if something in it is damaged.
    """
    if not (entry / "cache.json").exists():
        return None
    content = json.loads((entry / "cache.json").read_text())
    if content["identity"] != identity:
        return None
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, check in content["arrays"].items():
        part, _, field = name.partition(".")
        parts.setdefault(part, {})[field] = _verified(entry / f"{name}.npy", check)
    return Stored(
        fields={name: field_from_json(field) for name, field in content["fields"].items()},
        train=parts["train"],
        test=parts["test"],
        val=parts.get("val"),
        histograms=parts.get("histogram"),
    )


def _verified(path: Path, check: dict) -> np.ndarray:
    array = np.load(path, mmap_mode="r")
    if list(array.shape) != check["shape"] or zlib.crc32(array) != check["crc32"]:
        raise ValueError(f"{path.name} does not match its checksum")
    return np.asarray(array)


def _warn(message: str) -> None:
    print(f"cv_jax: {message}", file=sys.stderr)
