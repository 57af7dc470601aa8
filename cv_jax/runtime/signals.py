"""Ctrl-C and SIGTERM: a run saves a checkpoint and prints the command that resumes it."""

import concurrent.futures
import contextvars
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
from tqdm import tqdm

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


class CutShort(Exception):
    """Raised where a StopRequest cuts an evaluation short. The run evaluates again on resuming."""


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

    def raise_if_asked(self, step: int) -> None:
        """Raises Stopped where a signal asks to stop; `step` is the last one made."""
        if signum := self():
            raise Stopped(signum, step)

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


def never() -> int:
    """Asks nothing to stop, where there is no StopRequest."""
    return 0


_threads: list[threading.Thread] = []


def call_in_thread(function: Callable[[], Any]) -> Future:
    """Begins to call function() in a thread with the context variables of this one."""
    outcome = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # raised again by result()
            outcome.set_exception(error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(call,), daemon=True)
    _threads[:] = [*(other for other in _threads if other.is_alive()), thread]
    thread.start()
    return outcome


def wait_for(outcome: Future, stop: Callable[[], int] = never, doing: str = "") -> Any:
    """Returns the result of `call_in_thread`; answers signals until it is there.

    Python calls signal handlers between two of its own instructions, and XLA compiles for tens of
    seconds in one. Where a handler raises, or `stop` asks to stop, the thread is left alone.

    Args:
        outcome: of a function that compiles a program, or waits for its result.
        stop: a StopRequest. With several processes it is not asked, since they would stop at
            different places.
        doing: what a person at a terminal is shown meanwhile, with the seconds, from one second on.

    Raises:
        CutShort: `stop` asks to stop.
    """
    seen = doing and jax.process_index() == 0 and sys.stderr.isatty()
    with tqdm(bar_format=f"{doing} {{elapsed}}", leave=False, delay=1, disable=not seen) as line:
        while not concurrent.futures.wait([outcome], timeout=0.1).done:
            line.update()  # its time; it is drawn no earlier than after `delay`
            if jax.process_count() == 1 and stop():
                raise CutShort
    return outcome.result()


def answer_signals_during(
    function: Callable[[], Any], stop: Callable[[], int] = never, doing: str = ""
) -> Any:
    """Returns function(), called in another thread; see `wait_for`."""
    return wait_for(call_in_thread(function), stop, doing)


def is_busy() -> bool:
    """Returns whether a thread of these functions is at work: Python's own end waits for XLA."""
    return any(thread.is_alive() for thread in _threads)
