"""Reports a full disk, or a directory that is read-only or gone, in one sentence."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from etils.epath import Path

from cv_jax.config.errors import UserError
from cv_jax.workdir.bucket import in_bucket, refusal

# Errors of the storage, not of the program that writes there.
_NUMBERS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ESTALE,
}


@contextlib.contextmanager
def storage_errors(directory: Path) -> Iterator[None]:
    """Turns storage errors in `directory` into UserError; other errors pass unchanged.

    Args:
        directory: work directory of a run, with its lock.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not in_bucket(directory) and not (directory / "lock").exists():
            raise UserError(
                f"{directory} has disappeared. Restore it and run the same command to resume."
            ) from error
        if reason := _reason(error, directory):
            raise UserError(
                f"cannot write to {directory}: {reason}. Its checkpoints are intact: fix this and "
                "run the same command to resume."
            ) from error
        raise


def _reason(error: Exception, directory: Path) -> str | None:
    if in_bucket(directory):
        return refusal(error)
    if isinstance(error, OSError):
        number, where = error.errno, error.filename
    else:  # orbax passes TensorStore's errors on, with the number and the path in the text
        found = re.search(r"os_error_code='(\d+)'", str(error))
        number, where = (int(found[1]), str(error)) if found else (None, None)
    if number not in _NUMBERS:
        return None
    if where and str(directory.absolute()) not in os.path.abspath(os.fsdecode(where)):
        return None  # an error of another directory
    return os.strerror(number)
