"""Scores how far an image is from the training images, by simple statistics of its pixels."""

from typing import Any, NamedTuple

import numpy as np

MOST = 2000  # images measured; more do not change the statistics
MOST_BYTES = 2**26  # of these images
GROUP = 100  # images converted to float32 at a time
SHARE = 0.99  # share of val whose scores do not exceed the threshold


class Typical(NamedTuple):
    """Statistics of the training images, and the largest score of a typical image.

    Attributes:
        mean, std: (4 c,) float32, over the statistics of the first 2,000 images of train, or of as
            many as have 64 MB.
        threshold: the score that 99 % of as many images of val do not exceed; without val, of
            train.
    """

    mean: np.ndarray
    std: np.ndarray
    threshold: float


def measure(train: np.ndarray, val: np.ndarray) -> Typical:
    """Measures the statistics of the images of train and val, (m, h, w, c) uint8."""
    most = max(1, min(MOST, MOST_BYTES // int(np.prod(train.shape[1:]))))
    statistics = _statistics(train[:most])
    # If all images agree (for example in alpha), the std is set to 1 % of the range.
    mean, std = statistics.mean(0), np.maximum(statistics.std(0), 0.01)
    scores = score(val[:most] if len(val) else train[:most], Typical(mean, std, 0.0))
    return Typical(mean, std, float(np.quantile(scores, SHARE)))


def score(image: np.ndarray, typical: Typical) -> np.ndarray:
    """Returns the distance of each image's statistics from those of train.

    The distance is the root mean square of (statistic - mean) / std, about 1 for an image of train.

    Args:
        image: (m, h, w, c) uint8.
        typical: the statistics of the data set.

    Returns:
        (m,) float32.
    """
    return np.sqrt((((_statistics(image) - typical.mean) / typical.std) ** 2).mean(1))


def _statistics(image: np.ndarray) -> np.ndarray:
    """Computes per channel: mean, std, mean difference of neighbours in columns and in rows."""

    def of(x):
        x = x.astype(np.float32) / np.float32(255)
        steps = [np.abs(x - np.roll(x, 1, axis)).mean((1, 2)) for axis in (1, 2)]
        return np.concatenate([x.mean((1, 2)), x.std((1, 2)), *steps], 1)

    groups = (np.asarray(image[i : i + GROUP]) for i in range(0, len(image), GROUP))
    return np.concatenate([of(group) for group in groups])


def typical_to_json(typical: Typical) -> dict[str, Any]:
    """Returns the statistics as JSON values."""
    return {
        "mean": typical.mean.tolist(),
        "std": typical.std.tolist(),
        "threshold": typical.threshold,
    }


def typical_from_json(values: dict[str, Any], channels: int) -> Typical:
    """Returns the statistics from the values of `typical_to_json`.

    Raises:
        KeyError, TypeError, ValueError: the values do not fit images of `channels` channels.
    """
    mean, std = (np.float32(values[name]).reshape(4 * channels) for name in ("mean", "std"))
    return Typical(mean, std, float(values["threshold"]))
