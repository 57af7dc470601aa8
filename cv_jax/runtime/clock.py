"""Measures the seconds of each part of a run, and the number of steps that fill a dispatch."""

import contextlib
import time
from collections.abc import Callable, Iterator

from cv_jax.runtime.processes import Largest

# Target duration of a dispatch: the next log line, or the answer to a signal, comes this late.
SECONDS_PER_CHUNK = 0.5
# A step or batch that takes longer is not dispatched ahead: a signal waits for one, not for two.
SLOW_SECONDS = 5.0


# Clock -> what it counts. The published time to an accuracy is the sum of init, train and eval of
# a run that holds no images out.
CLOCKS = {
    "data": "reading and decoding the data set",
    "compile": "tracing, compiling, and drawing the initial parameters",
    "init": "building the task, including parameters computed from images (whitening)",
    "train": "training steps, including the host's work between them",
    "eval": "evaluation: on val during training, and the final one with its views",
    "save": "waiting for checkpoints; writing in the background is not counted",
}


class Clock:
    """Wall-clock seconds of a run by activity, see CLOCKS.

    Only the innermost clock runs: "train" stands still while another clock is entered inside it.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(CLOCKS, 0.0)
        self._running: list[str] = []
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the body's time for `name` alone."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def add(self, seconds: dict[str, float]) -> None:
        """Adds the seconds of an earlier start of the same run."""
        for name, value in seconds.items():
            self.seconds[name] += value

    def now(self, name: str) -> float:
        """Returns the seconds of one activity up to now."""
        self._switch()
        return self.seconds[name]

    def read(self) -> dict[str, float]:
        """Returns the seconds up to now, by clock."""
        self._switch()
        return {name: round(value, 3) for name, value in self.seconds.items()}


class Pace:
    """Measures the seconds of a step; a call returns the number of steps that fill a dispatch.

    Args:
        now: the seconds that training has taken up to now, without what comes between the steps.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds_per_step = 0.0
        self._slowest = Largest()
        self._now = now
        self._mark = now()

    def __call__(self) -> int:
        seconds = self._slowest(self.seconds_per_step)
        return max(1, int(SECONDS_PER_CHUNK / seconds)) if seconds else 1

    @property
    def is_slow(self) -> bool:
        """Tells whether a step takes more than SLOW_SECONDS, or is not measured yet."""
        return not 0 < self.seconds_per_step <= SLOW_SECONDS

    def finished(self, num_steps: int) -> float:
        """Records that `num_steps` steps are done since the last mark; returns their seconds."""
        seconds = self._now() - self._mark
        self._mark += seconds
        self.seconds_per_step = seconds / num_steps
        return seconds
