"""Decides when a training ends early, because its headline on val no longer improves."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cv_jax.workdir.metric import Metric


class Patience:
    """Remembers when the headline on val was best, for each run of a program.

    A program ends early when none of its runs has improved for `steps` steps. A run that has
    diverged does not improve. The decision depends only on the evaluations, which are equal in all
    processes, and on `to_json`, which every checkpoint holds: a resumed run decides the same.

    Args:
        steps: the longest time without an improvement; 0: the training never ends early.
        metric: the meaning of the headline.

    Attributes:
        last: the step of the last evaluation.
        improved: the step at which a run improved last, the latest of all runs.
    """

    def __init__(self, steps: int, metric: Metric):
        self._steps, self._metric = steps, metric
        self._best: list[tuple[int, float | None]] = []  # (step, headline) of each run
        self.last = 0

    @property
    def improved(self) -> int:
        return max((step for step, _ in self._best), default=0)

    def add(self, step: int, headline: np.ndarray | None) -> None:
        """Takes the headline (r,) on val of each run at a step; None where it was not evaluated."""
        if headline is None:
            return
        self.last = step
        values = [float(value) for value in headline]
        best = self._best or [(0, None)] * len(values)
        self._best = [
            (step, value) if self._metric.rank(value) > self._metric.rank(most) else (since, most)
            for (since, most), value in zip(best, values, strict=True)
        ]

    def is_over(self) -> bool:
        """Returns whether the training ends at the step of the last evaluation."""
        return 0 < self._steps <= self.last - self.improved

    def to_json(self) -> dict[str, Any]:
        """Returns what a resumed run must know, as JSON values."""
        return {"last": self.last, "best": self._best}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Takes the values of `to_json`."""
        self.last = values["last"]
        self._best = [(step, value) for step, value in values["best"]]
