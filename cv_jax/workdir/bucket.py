"""Work directories in a bucket of Google Cloud Storage: where objects differ from files.

All other code is the same for both: etils.epath's paths (by gcsfs in a bucket) and orbax.
"""

import importlib.util
import re
import time
from typing import IO

import fsspec
from etils.epath import Path

from cv_jax.config.errors import UserError
from cv_jax.config.paths import expand

# Seconds between two writes of a growing file in a bucket, where each write uploads all of it.
REWRITE_SECONDS = 60


def work_directory(name: str) -> Path:
    """Returns the directory of this name: gs://BUCKET/PATH in a bucket, any other on a disk.

    Raises:
        UserError: the name has another scheme, gcsfs is not installed, or ~ is unknown.
    """
    kind, found, _ = name.partition("://")
    if found and kind != "gs":
        raise UserError(f"{name}: choose a work directory on a disk, or gs://BUCKET/PATH.")
    if found and not importlib.util.find_spec("gcsfs"):
        raise UserError(f"{name} needs another package: pip install gcsfs")
    if found:  # a listings cache would miss what TensorStore and other processes write there
        fsspec.config.conf["gcs"] = {"use_listings_cache": False}
    return Path(expand(name))


def in_bucket(path: Path) -> bool:
    """Returns whether the path names an object in a bucket, not a file."""
    return str(path).startswith("gs://")


def refusal(error: Exception) -> str | None:
    """Returns the reason in an error of a bucket or its connection; None for any other error.

    gcsfs raises its own errors, those of the packages below it, and OSErrors without an errno.
    TensorStore raises ValueErrors that have a code in their text.
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
    """An object that grows: kept whole in memory, uploaded at most every REWRITE_SECONDS.

    Args:
        path: path of the object.
        content: content of the object so far.
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
        """Uploads the object if it has grown since the last upload."""
        if len(self._content) > self._written:
            self._path.write_bytes(bytes(self._content))
            self._written, self._since = len(self._content), time.monotonic()

    close = save

    def __enter__(self) -> "Growing":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_to_append(path: Path) -> IO[bytes] | Growing:
    """Opens a file to append to it; gcsfs would overwrite it."""
    if not in_bucket(path):
        return path.open("ab")
    return Growing(path, path.read_bytes() if path.exists() else b"")
