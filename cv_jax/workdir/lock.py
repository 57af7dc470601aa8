"""Locks a work directory: one program at a time."""

import fcntl
import os
import socket

from etils.epath import Path

from cv_jax.config.errors import UserError
from cv_jax.workdir.bucket import in_bucket, refusal


class Lock:
    """Locks a directory for this process, until the lock is closed or deleted, or the process ends.

    The lock is flock's: the operating system releases it however its owner ends, kill -9 included.
    It excludes processes of one machine, and of several on a shared file system that supports
    flock. A bucket has no locks: there the file only names the last program that started, and
    shows that the bucket can be written.

    Raises:
        UserError: another process holds the lock, or nothing can be written in the directory.
    """

    def __init__(self, directory: Path):
        path = directory / "lock"
        me = f"process {os.getpid()} on {socket.gethostname()}"
        if in_bucket(directory):
            _write_object(path, me)
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # Without a buffer: on a full disk, closing it would fail a second time.
            self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 (it stays open)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(0)
            self._file.write(me.encode())
        except BlockingIOError as error:
            self._file.seek(0)
            owner = self._file.read().decode(errors="replace") or "another process"
            raise UserError(
                f"{directory} is in use by {owner}; wait for it, stop it, or choose another "
                "--workdir."
            ) from error
        except OSError as error:
            raise UserError(
                f"Nothing can be written in {directory} ({error.strerror}); choose another "
                "--workdir."
            ) from error

    def close(self) -> None:
        """Releases the directory."""
        if hasattr(self, "_file"):
            self._file.close()

    __del__ = close


def _write_object(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except Exception as error:
        if (reason := refusal(error)) is None:
            raise
        if isinstance(error, FileNotFoundError):
            reason = f"there is no bucket {path.parts[2]}"
        raise UserError(
            f"Nothing can be written in {path.parent} ({reason}); choose another --workdir."
        ) from error
