"""Makes the console safe: a character that it cannot encode, or a full disk, stops no training."""

import errno
import io
import os
import signal
import sys
from typing import TextIO

from cv_jax.config.errors import UserError


def guard_console(results: bool = False) -> None:
    """Replaces stdin, stdout and stderr by streams that cannot fail; other streams stay.

    Characters that the console cannot encode are printed as \\xNN or \\uNNNN. Text for a console
    that is closed or full is dropped.

    Args:
        results: whether stdout is the program's result. The program then ends with SIGPIPE's exit
            code, and no message, once the reader is gone; a full stdout raises UserError.
    """
    # The next file would get a closed descriptor, and libraries print into it. Each open() takes
    # the lowest free descriptor, so the three are handled in order.
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif name != "stdin" and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _guarded(stream, results and name == "stdout"))


def _guarded(stream: TextIO, results: bool) -> TextIO:
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(stream.fileno(), results)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through,
    )


class _Descriptor(io.FileIO):
    """A file descriptor that drops bytes it cannot write, see `guard_console`."""

    def __init__(self, number: int, results: bool):
        super().__init__(number, "w", closefd=False)
        self._results = results

    def write(self, data: bytes) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            if self._results:
                self._results = False  # the rest of the buffer is written here once more
                if error.errno == errno.EPIPE:
                    sys.exit(128 + signal.SIGPIPE)
                raise UserError(
                    f"stdout cannot be written ({error.strerror}); redirect it to another file."
                ) from error
            written = None
        return len(data) if written is None else written
