"""Says what a metric's numbers mean: their unit, which direction is better, how it is measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# The metric that ranks runs in result files of older code, which name none.
OLD_HEADLINE = "accuracy"


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

    def rank_of_runs(self, values: Sequence[float | None]) -> tuple[int, float]:
        """Returns the rank of several runs together: how many have a finite value, and their mean.

        Fewer diverged runs are always better, whatever the mean of the others.
        """
        finite = [value for value in values if value is not None and math.isfinite(value)]
        return len(finite), self.rank(float(np.mean(finite)) if finite else None)

    @property
    def scale(self) -> float:
        """The factor from a value to the number that is shown with the unit."""
        return 100.0 if self.unit == "%" else 1.0

    def label(self, name: str) -> str:
        """Returns the name of a metric with its unit: "accuracy, %"."""
        return f"{name}, {self.unit}" if self.unit else name

    def number(self, value: float) -> str:
        """Returns a value with its unit: "94.29 %", "0.3562 m"."""
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.digits(value)}{unit}"

    def digits(self, value: float, sign: str = "") -> str:
        """Returns a value without its unit: "94.29". `sign` is "+" to show a plus sign."""
        return f"{self.scale * value:{sign}.{2 if self.unit == '%' else 4}f}"

    def text(self, mean: float | None, std: float | None) -> str:
        """Returns a mean for a table: "94.29 % ± 0.20"; "diverged" where it is not finite.

        The standard deviation is left out where it is None.
        """
        if mean is None or not math.isfinite(mean):
            return "diverged"
        spread = "" if std is None else f" ± {self.digits(std)}"
        return f"{self.number(mean)}{spread}"


def is_loss(name: str) -> bool:
    """Returns whether a training metric is a loss, "loss" or "loss/...", which must stay finite."""
    return name.partition("/")[0] == "loss"


def metrics_to_json(metrics: Mapping[str, Metric], headline: str) -> dict[str, Any]:
    """Returns the JSON values that `headline_of` and `metric_of` read."""
    return {
        "headline": headline,
        "metrics": {name: metric._asdict() for name, metric in metrics.items()},
    }


def headline_of(result: Mapping[str, Any]) -> str:
    """Returns the metric that ranks runs.

    Args:
        result: the content of result.json, task.json or a record; {} counts as one of older code.
    """
    return result.get("headline", OLD_HEADLINE)


def metric_of(result: Mapping[str, Any], name: str) -> Metric:
    """Returns the meaning of a metric's numbers; `Metric()` for a name that the task does not list.

    Args:
        result: see `headline_of`. Older code lists no metrics: names that end in "accuracy" and
            "top5" are shares there, and a lower "loss" is better.
        name: of the metric.
    """
    if "metrics" in result:
        return Metric(**result["metrics"].get(name, {}))
    if name.endswith("accuracy") or name.startswith("top"):
        return Metric("%")
    return Metric(better="lower" if name == "loss" else "higher")


def headline_text(result: Mapping[str, Any], split: str) -> str:
    """Returns the headline of a split for a table, such as "94.29 % ± 0.20"; else "no accuracy"."""
    name = headline_of(result)
    numbers = (result.get(split) or {}).get(name)
    if not isinstance(numbers, dict):
        return f"no {name}"
    return metric_of(result, name).text(numbers.get("mean"), numbers.get("std"))
