"""What storage refuses, in one sentence: a full disk, a place that is read-only or gone."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from etils.epath import Path

from cv_jax.config.errors import UserError
from cv_jax.workdir.bucket import in_bucket, refusal

# What is the matter with a place, and not with the program that writes there.
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
    """Makes a UserError of what storage refuses in `directory`; every other error stays itself.

    Args:
        directory: a run's, which holds its lock.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not in_bucket(directory) and not (directory / "lock").exists():
            raise UserError(
                f"{directory} was there and is gone; once it is back, the same command goes on."
            ) from error
        if reason := _reason(error, directory):
            raise UserError(
                f"{directory} cannot be used any further: {reason}. The checkpoints there are "
                "kept; once that is mended, the same command goes on."
            ) from error
        raise


def _reason(error: Exception, directory: Path) -> str | None:
    if in_bucket(directory):
        return refusal(error)
    if isinstance(error, OSError):
        number, where = error.errno, error.filename
    else:  # TensorStore's, which orbax passes on: the number and the path stand in the text
        found = re.search(r"os_error_code='(\d+)'", str(error))
        number, where = (int(found[1]), str(error)) if found else (None, None)
    if number not in _NUMBERS:
        return None
    if where and str(directory.absolute()) not in os.path.abspath(os.fsdecode(where)):
        return None  # another place's
    return os.strerror(number)
