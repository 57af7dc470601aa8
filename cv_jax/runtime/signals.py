"""Ctrl-C and SIGTERM: a run saves a checkpoint and prints the command that resumes it."""

import os
import signal
import sys
import threading
from typing import Any

from cv_jax.runtime.processes import Largest


class Stopped(KeyboardInterrupt):
    """Raised when a signal stops the program, after saving.

    Derives from KeyboardInterrupt so that `except Exception` does not catch it.
    """

    def __init__(self, signum: int, step: int | None = None):
        after = "" if step is None else f" after step {step}"
        super().__init__(f"{signal.Signals(signum).name}{after}")
        self.signum = signum
        self.exit_code = 128 + signum


def raise_when_signalled() -> None:
    """Installs signal handlers: SIGINT and SIGTERM raise Stopped; a second SIGTERM kills.

    In the training loop, StopRequest's handlers replace these. The program ends after the
    checkpoint that is being written in the background.
    """
    usual = sys.unraisablehook

    def once_more(unraisable: Any) -> None:
        """Sends the signal again where Python dropped Stopped, which it does in a destructor."""
        if isinstance(unraisable.exc_value, Stopped):
            _set_handlers()
            threading.Timer(0.01, os.kill, (os.getpid(), unraisable.exc_value.signum)).start()
        else:
            usual(unraisable)

    sys.unraisablehook = once_more
    _set_handlers()


def _set_handlers() -> None:
    def stop(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Stopped(signum)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request; the second stops the program at once.

    A signal to any process stops all processes, at the same call.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._of_any = Largest()

    def __call__(self) -> int:
        """Returns the number of the signal that asks to stop, or 0."""
        return int(self._of_any(self._signum))

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        for signum in self._before:
            signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: Any) -> None:
        self._signum = signum
        self.__exit__()

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
