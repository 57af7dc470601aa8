"""Keeps decoded data sets between runs, in `cache_dir()`/data; CV_JAX_CACHE moves it.

An entry is a directory: arrays as .npy files, and cache.json with a checksum of each array.
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

# Part of every identity. Raise it when decoding starts to give other arrays.
FORMAT = 3


def cached(
    directory: Path,
    read: Callable[[Path], Stored],
    settings: str = "",
    identity: Callable[[], str] | None = None,
) -> Stored:
    """Returns `read(directory)`; later calls map the arrays from the cache into memory.

    The key of an entry is the directory's path, `settings` and `identity`. Every call verifies the
    entry's checksums. A damaged entry is written again, with a warning on stderr. If the cache
    cannot be written, a line on stderr says so, and the data is used without it.

    Args:
        directory: a prepared data set, .../NAME[/CONFIG]/VERSION.
        read: decodes the data set.
        settings: other settings that `read` depends on, as text; each text has its own entry.
        identity: returns a text that changes when the data change; None: the names, sizes and
            times of all files below the directory. `read` may change the text, by a file that it
            writes.
    """
    path = directory.resolve()
    key = _digest(f"{path}\0{settings}" if settings else str(path))[:12]
    entry = cache_dir() / "data" / f"{path.parent.name}-{path.name}-{key}"

    def now():
        return _digest(f"{FORMAT} {identity()}") if identity else _identity(path)

    before = now()
    try:
        if found := _load(entry, before):
            return found
    except Exception as error:  # any damage: the entry is not trusted
        _warn(f"the cache {entry} is damaged ({error}): decoding again.")
    stored = read(directory)
    try:
        _save(entry, now() if identity else before, stored)
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
            stat = path.stat() if path.exists() else path.lstat()  # a broken link
            facts.append((str(path.relative_to(directory)), stat.st_size, stat.st_mtime_ns))
    return _digest(repr((FORMAT, sorted(facts))))


def _arrays(stored: Stored) -> dict[str, np.ndarray]:
    """Returns the arrays by their names in the entry: SPLIT.FIELD and histogram.FIELD."""
    parts = {"train": stored.train, "test": stored.test, "val": stored.val}
    parts["histogram"] = stored.histograms
    return {
        f"{part}.{name}": array
        for part, arrays in parts.items()
        for name, array in (arrays or {}).items()
    }


def _save(entry: Path, identity: str, stored: Stored) -> None:
    """Writes an entry; cache.json comes last, so that a reader finds a whole entry or none."""
    entry.mkdir(parents=True, exist_ok=True)
    checks = {}
    for name, array in _arrays(stored).items():
        checks[name] = {"crc32": zlib.crc32(array), "shape": array.shape}
        with replaced(entry / f"{name}.npy") as file:
            np.save(file, array)
    fields = {name: field_to_json(field) for name, field in stored.fields.items()}
    content = {"identity": identity, "fields": fields, "arrays": checks, "notes": stored.notes}
    with replaced(entry / "cache.json") as file:
        file.write(json.dumps(content, indent=2).encode())


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Yields a temporary file, which replaces `path` once it is written completely."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(entry: Path, identity: str) -> Stored | None:
    """Maps an entry into memory; None if no entry has this identity.

    Raises:
        Exception: of any type, if the entry is damaged.
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
        notes=tuple(content.get("notes", ())),
    )


def _verified(path: Path, check: dict) -> np.ndarray:
    array = np.load(path, mmap_mode="r")
    if list(array.shape) != check["shape"] or zlib.crc32(array) != check["crc32"]:
        raise ValueError(f"{path.name} does not match its checksum")
    return np.asarray(array)


def _warn(message: str) -> None:
    print(f"cv_jax: {message}", file=sys.stderr)
