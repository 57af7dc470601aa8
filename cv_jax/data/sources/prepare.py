"""Downloads and prepares data sets through TFDS, CIFAR without TensorFlow.

TFDS's own builder does the work, with its URLs, checksums, ids, splits and file names. This module
replaces parts of TFDS meanwhile: the time limits of all downloads, and for CIFAR the two steps
that use TensorFlow (unpacking the archive, and encoding arrays as PNG).
"""

import contextlib
import importlib.util
import io
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import promise
import requests
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import download_manager, downloader, util
from tensorflow_datasets.image_classification import cifar

from cv_jax.config.errors import UserError, nearest
from cv_jax.data.sources.location import find_prepared

_WITHOUT_TENSORFLOW = ("cifar10", "cifar100")

# Seconds that a server may take to accept a connection, and to send more bytes.
_TIMEOUT = (10, 20)


def prepare(name: str, data_dir: Path) -> None:
    """Downloads a data set and prepares it in `data_dir` with TFDS, in the format array_record.

    Leaves only the prepared data set behind; nothing after a failure or Ctrl-C.

    Args:
        name: a TFDS name: "NAME" or "NAME/CONFIG".
        data_dir: TFDS's data directory; created if missing.

    Raises:
        UserError: the name is unknown, a file cannot be fetched, a download has the wrong
            checksum, or the data set needs TensorFlow and TensorFlow is not installed.
    """
    _check_can_prepare(name, data_dir)
    print(f"Downloading and preparing {name} in {data_dir}", file=sys.stderr)
    hint = (
        "Set --config.data.dir or TFDS_DATA_DIR to a directory with a prepared copy, "
        "or train on configs/digits.py, which needs no download."
    )
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        _download_and_prepare(name, data_dir)
    except ConnectionError as error:
        raise UserError(f"{name} is not prepared in {data_dir}, and {error}. {hint}") from error
    except download_manager.NonMatchingChecksumError as error:
        url = re.search(r"Artifact (\S+),", str(error))[1]
        expected, got = re.findall(r"checksum='(\w+)'", str(error))
        raise UserError(
            f"{name} is not prepared in {data_dir}, and {url} sent another file than expected: "
            f"its SHA-256 is {got} instead of {expected}. {hint}"
        ) from error
    except Exception as error:  # from TFDS, the disk or the archive
        if find_prepared(name, data_dir):
            return  # another process was faster
        raise UserError(f"TFDS cannot prepare {name} in {data_dir}: {error}. {hint}") from error
    finally:
        with contextlib.suppress(OSError):
            (data_dir / _family(name)).rmdir()  # if it is empty


def _family(name: str) -> str:
    return re.split("[/:]", name)[0]


def _check_can_prepare(name: str, data_dir: Path) -> None:
    known = tfds.list_builders(with_community_datasets=False)
    if _family(name) not in known:
        raise UserError(
            f"Unknown data set {name!r}.{nearest(_family(name), [*known, 'digits'])} "
            "Set config.data.name to 'digits', which needs no download, or to the TFDS name of an "
            "image-classification data set. For your own data, write a function that returns "
            "cv_jax.data.Stored and set --config.data.name=MODULE:FUNCTION."
        )
    if _family(name) in _WITHOUT_TENSORFLOW or importlib.util.find_spec("tensorflow"):
        return
    raise UserError(
        f"{name} is not prepared in {data_dir}, and TFDS needs TensorFlow to prepare it. "
        "Run once, here or on another machine from which you copy that directory:\n"
        "  pip install tensorflow\n"
        '  python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{data_dir}')"
        ".download_and_prepare(file_format='array_record')\""
    )


def _download_and_prepare(name: str, data_dir: Path) -> None:
    tfds.display_progress_bar(sys.stderr.isatty())
    builder = tfds.builder(name, data_dir=data_dir)
    config = tfds.download.DownloadConfig(
        manual_dir=data_dir / "downloads" / "manual",  # where TFDS's instructions say
        try_download_gcs=False,
    )
    with (
        tempfile.TemporaryDirectory(prefix="incomplete.", dir=data_dir) as download_dir,
        contextlib.redirect_stdout(io.StringIO()),  # hides TFDS's messages
        _replaced_parts(_family(name)),
    ):
        builder.download_and_prepare(
            download_dir=download_dir, download_config=config, file_format="array_record"
        )


@contextlib.contextmanager
def _replaced_parts(family: str) -> Iterator[None]:
    """Replaces parts of TFDS by those of this module."""
    parts = [
        (downloader, "MAX_RETRIES", 0),  # ten, with growing waits, would take minutes
        (downloader, "_open_url", partial(downloader._open_url, timeout=_TIMEOUT)),
        (download_manager, "get_downloader", _Downloader),
    ]
    if family in _WITHOUT_TENSORFLOW:
        parts += [
            (download_manager.DownloadManager, "download_and_extract", _download_and_extract),
            (cifar, "_load_data", _load_images),
        ]
    with contextlib.ExitStack() as stack:
        for owner, attribute, ours in parts:
            stack.enter_context(mock.patch.object(owner, attribute, ours))
        yield


class _Downloader(downloader._Downloader):
    """TFDS's downloader in the caller's thread, so that Ctrl-C stops it at once."""

    def download(self, url, destination_path, verify=True):
        try:
            return promise.Promise.resolve(self._sync_download(url, destination_path, verify))
        except (requests.RequestException, util.DownloadError) as error:
            raise ConnectionError(f"{url} cannot be fetched: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Returns the reason that the operating system or the server gave."""
    while error.__context__ is not None:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error)


def _download_and_extract(manager: download_manager.DownloadManager, url: str) -> str:
    archive = manager.download(url)
    directory = f"{archive}.extracted"
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    return directory


def _load_images(path: str, num_labels: int = 1) -> Iterator[tuple[np.ndarray, Image.Image]]:
    """Yields the examples of a binary CIFAR file: labels, then the planes red, green and blue.

    TFDS encodes a Pillow image as PNG without TensorFlow.
    """
    for row in np.fromfile(path, np.uint8).reshape(-1, num_labels + 3072):
        pixels = row[num_labels:].reshape(3, 32, 32).transpose(1, 2, 0)
        yield row[:num_labels], Image.fromarray(pixels)
