"""Two kinds of evaluation beside sums over batches: Probe and Collected."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Probe(NamedTuple):
    """An evaluation of features by a predictor that is fitted on labelled training images.

    Attributes:
        embed: (state, batch) -> features (b, d).
        fit: (features (m, d), label (m,)) of m training images -> the fitted predictor.
        score: (state, fitted predictor, batch) -> {metric: (sum, count)}.
        limit: the most labelled training images to fit on, the first of train; None: all.
    """

    embed: Callable
    fit: Callable
    score: Callable
    limit: int | None = None


class Collected(NamedTuple):
    """An evaluation of all predictions together, such as average precision or a median.

    Each example is predicted once, on any number of devices. Process 0 folds the predictions on
    the host, in the order of the examples, one fold for each run.

    Attributes:
        predict: (state, batch) -> {name: (b, ...)}; traced, for one run.
        start: () -> an empty fold.
        add: (fold, predictions, examples) -> fold. Predictions and examples are NumPy arrays by
            name, without padding. The examples have all fields of the data set.
        finish: fold -> {metric: number}.
    """

    predict: Callable[[Any, dict], dict]
    start: Callable[[], Any]
    add: Callable[[Any, dict, dict], Any]
    finish: Callable[[Any], dict[str, float]]


def gather(
    predict: Callable[[Any, dict], dict],
    prediction: str,
    field: str,
    finish: Callable[[np.ndarray, np.ndarray], dict[str, float]],
) -> Collected:
    """Returns the evaluation of one prediction of all examples beside one of their fields.

    Args:
        predict: see `Collected`.
        prediction: the name of a prediction (b, ...).
        field: the name of a field.
        finish: (predictions (m, ...), values of the field (m, ...)) -> {metric: number}.
    """

    def add(fold, predictions, examples):
        return [*fold, (predictions[prediction], examples[field])]

    def finish_all(fold):
        return finish(*(np.concatenate(parts) for parts in zip(*fold, strict=True)))

    return Collected(predict, list, add, finish_all)
