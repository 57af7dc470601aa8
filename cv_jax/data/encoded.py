"""Images that stay encoded, as files or records, and are decoded when a batch needs them.

`Encoded` looks like an array (m, h, w, c) uint8 of a split. What it returns is a function of its
arguments: neither the number of threads nor that of processes changes a pixel.
"""

import os
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.data.fields import Examples, decoded, take
from cv_jax.data.read_image import read_bytes

# Broken files that are named on the console; more are only counted.
MOST_NAMED = 20


class Source(Protocol):
    """Encoded images by position. Threads read it at once."""

    def __len__(self) -> int: ...

    def read(self, position: int) -> bytes:
        """Returns the encoded image. Raises UserError if it cannot be read."""

    def example(self, position: int) -> tuple[bytes, dict[str, Any]]:
        """Returns the encoded image, and fields that are stored with it, such as its label."""

    def name(self, position: int) -> str:
        """Returns the name of the file or record, for messages."""


class Files(NamedTuple):
    """Image files below a directory."""

    root: Path
    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, position: int) -> bytes:
        path = os.path.join(self.root, self.paths[position])
        try:
            return read_bytes(path)
        except UserError as error:
            if os.path.isdir(path):
                raise UserError("it is a directory") from error
            raise

    def example(self, position: int) -> tuple[bytes, dict[str, Any]]:
        return self.read(position), {}

    def name(self, position: int) -> str:
        return self.paths[position]


class Row(NamedTuple):
    """What the crop of an image depends on: the run's key (64 bits), the epoch, the position."""

    key: int
    epoch: int
    position: int

    def generator(self) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self.key, counter=[*self[1:], 0, 0]))


@dataclass
class Decoding:
    """How the images of a data set are decoded, and those that could not be.

    Attributes:
        shape: (h, w, c) of every decoded image, or (h, w) of a mask.
        fit: encoded image -> uint8 of this shape, the crop of evaluation.
        crop: (encoded image, generator) -> (h, w, c) uint8, a random crop; None: `fit` also in
            training.
        stops: whether a broken image stops the run.
        num_workers: number of threads that decode.
        fill: the value of all pixels of a broken image, and of padding.
        broken: {name of a broken image: what is wrong}.
    """

    shape: tuple[int, int, int]
    fit: Callable[[bytes], np.ndarray]
    crop: Callable[[bytes, np.random.Generator], np.ndarray] | None = None
    stops: bool = False
    num_workers: int = 1
    fill: int = 0
    broken: dict[str, str] = field(default_factory=dict)

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.num_workers, "decode")

    @cached_property
    def _lock(self) -> Any:
        return threading.Lock()

    def note(self, name: str, error: UserError, instead: str) -> None:
        """Writes once to stderr which image is broken; raises UserError if the run has to stop."""
        if self.stops:
            raise UserError(
                f"{name} cannot be decoded: {error}. Repair or remove it, or set "
                "config.data.on_error='replace'."
            ) from error
        with self._lock:
            new = name not in self.broken
            self.broken.setdefault(name, str(error))
            if not new or len(self.broken) > MOST_NAMED:
                return
        more = " Further ones are only counted." if len(self.broken) == MOST_NAMED else ""
        print(f"cv_jax: {name} cannot be decoded: {error}. {instead}{more}", file=sys.stderr)


def num_cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Encoded:
    """The images or masks of a split. `encoded[positions]` is a part; `np.asarray` decodes.

    The pixels of a broken one are `decoding.fill`, and it is named on stderr; `read_training`
    replaces it.

    Args:
        source: all images of the data set.
        decoding: how to decode them.
        positions: (m,) the split's images in the source; -1 is padding.
        digests: (len(source),) uint64, equal for equal files.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, source: Source, decoding: Decoding, positions: np.ndarray, digests: np.ndarray
    ):
        self.source, self.decoding = source, decoding
        self.positions, self._digests = np.asarray(positions, np.int64), digests

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.positions), *self.decoding.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape))

    @property
    def digests(self) -> np.ndarray:
        """Returns (m,) uint64, equal for equal files."""
        return self._digests[self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, part: Any) -> Any:
        """Returns the images at positions or of a slice; an index gives one image, decoded."""
        rows, rest = (part[0], part[1:]) if isinstance(part, tuple) else (part, ())
        if any(other != slice(None) for other in rest):
            return np.asarray(self[rows])[(slice(None), *rest)]
        if isinstance(rows, int | np.integer):
            return np.asarray(self[np.array([rows])])[0]
        return Encoded(self.source, self.decoding, self.positions[rows], self._digests)

    def padded(self, count: int) -> "Encoded":
        """Returns the images with `count` rows of padding after them."""
        positions = np.pad(self.positions, (0, count), constant_values=-1)
        return Encoded(self.source, self.decoding, positions, self._digests)

    def fingerprint(self) -> int:
        """Returns a checksum of which files are in the split, and of their contents."""
        return zlib.crc32(self.digests, zlib.crc32(self.positions))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy

        def decode(row, out):
            if self.positions[row] >= 0:
                out[...] = self._decoded(row)

        images = self._in_threads(decode)
        return images if dtype is None else images.astype(dtype, copy=False)

    def astype(self, dtype: Any) -> np.ndarray:
        """Returns the decoded images, converted."""
        return np.asarray(self).astype(dtype)

    def read_training(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Decodes an image for each row, cropped at random if the data set's images are.

        A broken image is replaced by the next one of the split.

        Returns:
            images (k, h, w, c) uint8, and the positions (k,) in the split that they come from.
        """
        used = np.array([row.position for row in rows], np.int64)

        def decode(i, out):
            for _ in range(len(self)):
                try:
                    data = self.source.read(self.positions[used[i]])
                    crop = self.decoding.crop
                    out[...] = crop(data, rows[i].generator()) if crop else self.decoding.fit(data)
                    return
                except UserError as error:
                    broken = self._name(used[i])
                    used[i] = (used[i] + 1) % len(self)
                    next_one = self._name(used[i])
                    self.decoding.note(broken, error, f"{next_one} takes its place.")
            raise UserError("None of the training images can be decoded: check config.data.dir.")

        images = self._in_threads(decode, len(rows))
        return images, used

    def _decoded(self, row: int) -> np.ndarray | int:
        try:
            return self.decoding.fit(self.source.read(self.positions[row]))
        except UserError as error:
            black = "It is evaluated as a black image."
            instead = "All its pixels are ignored." if self.decoding.fill else black
            self.decoding.note(self._name(row), error, instead)
            return self.decoding.fill

    def _name(self, row: int) -> str:
        return self.source.name(self.positions[row])

    def _in_threads(self, decode: Callable[[int, np.ndarray], None], count: int = -1) -> np.ndarray:
        """Returns (count, h, w, c) uint8, whose row i decode(i, row) has filled."""
        count = len(self) if count < 0 else count
        images = np.full((count, *self.decoding.shape), self.decoding.fill, np.uint8)
        size = max(1, count // (8 * self.decoding.num_workers))  # a task costs some 20 us

        def decode_part(start):
            for i in range(start, min(start + size, count)):
                decode(i, images[i])

        list(self.decoding.pool.map(decode_part, range(0, count, size)))  # raises their errors
        return images


def read_training(examples: Examples, positions: np.ndarray, key: int, epoch: int) -> Examples:
    """Reads training examples at `positions` for an epoch of the run with this key.

    Encoded images and masks are decoded; where an image is replaced, the other fields are its
    replacement's.
    """
    encoded = [name for name, x in examples.items() if isinstance(x, Encoded) and x.ndim == 4]
    if not encoded:
        return decoded(take(examples, positions))
    rows = [Row(key, epoch, int(position)) for position in positions]
    images, used = examples[encoded[0]].read_training(rows)
    others = {name: x for name, x in examples.items() if name != encoded[0]}
    found = {**decoded(take(others, used)), encoded[0]: images}
    return {name: found[name] for name in examples}


def num_broken(*splits: Examples) -> int:
    """Returns the number of images of these splits that could not be decoded during the run."""
    decodings = [x.decoding for split in splits for x in split.values() if isinstance(x, Encoded)]
    return len({name for decoding in decodings for name in decoding.broken})
