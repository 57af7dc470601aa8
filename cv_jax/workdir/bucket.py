"""A work directory in a bucket of Google Cloud Storage, and what an object cannot do as a file can.

All else is the same code for both: etils.epath's paths, by gcsfs in a bucket, and orbax.
"""

import importlib.util
import re
import time
from typing import IO

import fsspec
from etils.epath import Path

from cv_jax.config.errors import UserError
from cv_jax.config.paths import expand

# How old a file that grows may be in a bucket, where each addition writes all of it again.
REWRITE_SECONDS = 60


def work_directory(name: str) -> Path:
    """Returns the directory of this name: gs://BUCKET/PATH in a bucket, any other on a disk.

    Raises:
        UserError: it is another kind of place, gcsfs is not installed, or ~ is not known.
    """
    kind, found, _ = name.partition("://")
    if found and kind != "gs":
        raise UserError(f"{name}: a work directory is one of a disk, or gs://BUCKET/PATH.")
    if found and not importlib.util.find_spec("gcsfs"):
        raise UserError(f"{name} needs a package more: pip install gcsfs")
    if found:  # TensorStore and other processes write there too, which a cache would not see
        fsspec.config.conf["gcs"] = {"use_listings_cache": False}
    return Path(expand(name))


def in_bucket(path: Path) -> bool:
    """Whether the path is that of an object, not of a file."""
    return str(path).startswith("gs://")


def refusal(error: Exception) -> str | None:
    """What a bucket, or the way to it, refuses in this error; None where it is about another thing.

    gcsfs raises its own errors, those of packages below it, and OSErrors without the number that
    the system's have; TensorStore raises ValueErrors that have a code in their text.
    """
    text = " ".join(str(error).split())[:200]
    plain = isinstance(error, OSError) and error.errno is None
    if plain and isinstance(error, FileNotFoundError):
        return f"not found: {text}"
    package = type(error).__module__.partition(".")[0]
    of_client = package in ("aiohttp", "fsspec", "gcsfs", "google", "requests")
    of_tensorstore = re.search(r"\[(http_response|curl)_code=", str(error))
    return text if plain or of_client or of_tensorstore else None


class Growing:
    """An object that grows: all of it is kept, and written again at most every REWRITE_SECONDS.

    Args:
        path: of the object.
        content: what it has already.
    """

    def __init__(self, path: Path, content: bytes = b""):
        self._path, self._content = path, bytearray(content)
        self._written, self._since = len(content), time.monotonic()

    def write(self, data: bytes) -> None:
        self._content += data

    def flush(self) -> None:
        if time.monotonic() - self._since > REWRITE_SECONDS:
            self.save()

    def save(self) -> None:
        """Writes what has come since the last time."""
        if len(self._content) > self._written:
            self._path.write_bytes(bytes(self._content))
            self._written, self._since = len(self._content), time.monotonic()

    close = save

    def __enter__(self) -> "Growing":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_to_append(path: Path) -> IO[bytes] | Growing:
    """Opens a file for more of it; gcsfs would begin it anew."""
    if not in_bucket(path):
        return path.open("ab")
    return Growing(path, path.read_bytes() if path.exists() else b"")
