"""One program at a time in a work directory."""

import fcntl
import os
import socket
from pathlib import Path

from cv_jax.errors import UserError


class Lock:
    """Makes a directory this process's, until it is closed, forgotten, or the process ends.

    It is flock's: the operating system lets go of it however its owner ends, kill -9 included, so
    that none is ever left behind. It holds between processes of one machine, and on a shared file
    system where that passes flock on.

    Raises:
        UserError: another process has it, or nothing can be written there.
    """

    def __init__(self, directory: Path):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # Without a buffer, which a full disk would make fail once more when it is closed.
            self._file = (directory / "lock").open("ab+", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
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
        """Lets go of the directory."""
        if hasattr(self, "_file"):
            self._file.close()

    __del__ = close
