"""The console: what it cannot encode is escaped; one that is closed or full ends no training."""

import errno
import io
import os
import signal
import sys
from typing import TextIO

from cv_jax.config.errors import UserError


def guard_console(results: bool = False) -> None:
    """Replaces stdin, stdout and stderr where they can fail; anything else in their place stays.

    Characters that the console cannot encode are printed as \\xNN or \\uNNNN. Text for a console
    that is closed or full is dropped.

    Args:
        results: stdout is what the program is for. It then ends where nobody reads on, quietly and
            with the exit code that SIGPIPE gives, and raises UserError where stdout is full.
    """
    # A closed descriptor would become that of the next file, and libraries print into it. Each
    # open() takes the lowest one that is free, so they are gone through in order.
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
    """A file descriptor that drops what it cannot write, see `guard_console`."""

    def __init__(self, number: int, results: bool):
        super().__init__(number, "w", closefd=False)
        self._results = results

    def write(self, data: bytes) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            if self._results:
                self._results = False  # what is left in the buffer comes here once more
                if error.errno == errno.EPIPE:
                    sys.exit(128 + signal.SIGPIPE)
                raise UserError(
                    f"stdout cannot be written ({error.strerror}); send it to another place."
                ) from error
            written = None
        return len(data) if written is None else written
