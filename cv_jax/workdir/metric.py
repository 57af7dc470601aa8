"""Says what a metric's numbers mean: their unit, which direction is better, how it is measured."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Metric(NamedTuple):
    """What the numbers of a metric mean.

    Attributes:
        unit: "%" for shares in [0, 1], which are shown times 100; else as it is shown, such as
            "nats" or "px"; "" for plain numbers.
        better: "higher" or "lower".
        protocol: how it is measured, such as "eleven points, difficult boxes ignored".
    """

    unit: str = ""
    better: str = "higher"
    protocol: str = ""

    def rank(self, value: float | None) -> float:
        """Returns a number that is higher for a better value; -inf where `value` is not finite."""
        if value is None or not math.isfinite(value):
            return -math.inf
        return value if self.better == "higher" else -value

    def best(self, values: Sequence[float | None]) -> int:
        """Returns the position of the best value, the first of equal ones."""
        return max(range(len(values)), key=lambda i: self.rank(values[i]))
