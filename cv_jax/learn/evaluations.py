"""What an evaluation can be, beside sums of a batch: a Probe, or Collected predictions."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Probe(NamedTuple):
    """An evaluation of features, by what can be learned from those of labelled training images.

    Attributes:
        embed: (state, batch) -> features (b, d).
        fit: (features (m, d), label (m,)), of m training images -> what was learned of them.
        score: (state, what was learned, batch) -> {metric: (sum, count)}.
        limit: so many labelled training images at most, the first ones; None: all.
    """

    embed: Callable
    fit: Callable
    score: Callable
    limit: int | None = None


class Collected(NamedTuple):
    """An evaluation of all predictions together, such as average precision or a median.

    Each example is predicted once, whatever the devices. Process 0 folds the predictions on the
    host, in the order of the examples, one fold for each run.

    Attributes:
        predict: (state, batch) -> {name: (b, ...)}; traced, for one run.
        start: () -> an empty fold.
        add: (fold, predictions, examples) -> fold, of some examples: NumPy arrays by name, without
            padding. The examples have all fields of the data set.
        finish: fold -> {metric: number}.
    """

    predict: Callable[[Any, dict], dict]
    start: Callable[[], Any]
    add: Callable[[Any, dict, dict], Any]
    finish: Callable[[Any], dict[str, float]]
