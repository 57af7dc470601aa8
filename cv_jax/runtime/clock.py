"""Measures what a run spends its seconds on, and how many steps fill a dispatch."""

import contextlib
import time
from collections.abc import Iterator

from cv_jax.runtime.processes import Largest

# How long a dispatch should take: a person, or a signal, waits no longer for the next sign of life.
SECONDS_PER_CHUNK = 0.5


# What each clock of a run counts. The public rule for the time to an accuracy is the sum of init,
# train and eval, of a run without images held out.
CLOCKS = {
    "data": "reading and decoding the data set",
    "compile": "tracing and compiling, and drawing the initial parameters",
    "init": "building the task, with the parameters that it takes from images (whitening)",
    "train": "training steps, from the first on, with all that the host does between them",
    "eval": "evaluation: on val during the training, and the final one with its views",
    "save": "waiting for checkpoints, not writing them in the background",
}


class Clock:
    """Wall-clock seconds of a run by what they were spent on, see CLOCKS.

    Only one thing runs at a time: while another one does, "train" stands still.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(CLOCKS, 0.0)
        self._running: list[str] = []
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the body's time for `name`, and for nothing else."""
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
        """Adds what an earlier start of the same run has spent."""
        for name, value in seconds.items():
            self.seconds[name] += value

    def read(self) -> dict[str, float]:
        """The seconds up to now."""
        self._switch()
        return {name: round(value, 3) for name, value in self.seconds.items()}


class Pace:
    """Watches how long a step takes, and says how many make a dispatch of pleasant length."""

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self._slowest = Largest()
        self._mark = time.perf_counter()

    def __call__(self) -> int:
        seconds = self._slowest(self.seconds_per_step)
        return max(1, int(SECONDS_PER_CHUNK / seconds)) if seconds else 1

    def resume(self) -> None:
        """Begins to count after a pause."""
        self._mark = time.perf_counter()

    def finished(self, num_steps: int) -> float:
        """Notes that so many steps are done since the mark; returns the seconds they took."""
        seconds = time.perf_counter() - self._mark
        self._mark += seconds
        self.seconds_per_step = seconds / num_steps
        return seconds
