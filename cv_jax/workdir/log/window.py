"""Sums the metrics of training steps from one row of the log to the next."""

import math
from typing import Any

import numpy as np


class Window:
    """The (sum, count) pairs (2, r) over all steps since the last row, and their seconds."""

    def __init__(self, sums: dict[str, Any] | None = None) -> None:
        self._sums = {name: np.array(pair) for name, pair in (sums or {}).items()}
        self._num_examples = 0
        self._seconds = 0.0

    def add(self, rows: dict[str, tuple], num_examples: int, seconds: float) -> None:
        # Step by step in float64, so that the mean does not depend on the lengths of chunks.
        for name, pair in rows.items():
            pair = np.stack(pair)
            sums = self._sums.setdefault(name, np.zeros(pair.shape[:2]))
            for step in range(pair.shape[2]):
                sums += pair[:, :, step]
        self._num_examples += num_examples
        self._seconds += seconds

    def sums(self) -> dict[str, Any]:
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def skipped(self) -> tuple[int, int]:
        """Returns the number of skipped steps and of all steps, both summed over the runs."""
        skipped, steps = self._sums.get("skipped", np.zeros((2, 1))).sum(axis=1)
        return int(skipped), int(steps)

    def means(self, examples: str) -> dict[str, np.ndarray]:
        """Returns the mean (r,) of each metric, and the speed (1,) of all runs together."""
        values = {name: divide(total, count) for name, (total, count) in self._sums.items()}
        speed = self._num_examples / self._seconds if self._seconds else math.nan
        return {**values, f"{examples}_per_second": np.array([speed])}


def divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns total / count, NaN where the count is 0."""
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
