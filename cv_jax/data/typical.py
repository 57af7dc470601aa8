"""Scores how unlike the training images an image is, by simple statistics of its pixels."""

from typing import Any, NamedTuple

import numpy as np

MOST = 2000  # images that are measured: more say no more
GROUP = 100  # of them at a time, in float32
SHARE = 0.99  # of val, which is like train


class Typical(NamedTuple):
    """What the images of a data set are like.

    Attributes:
        mean, std: (4 c,) float32, of the statistics of the first 2,000 images of train.
        threshold: the score that 99 % of the first 2,000 images of val do not exceed; of train
            where there is no val.
    """

    mean: np.ndarray
    std: np.ndarray
    threshold: float


def measure(train: np.ndarray, val: np.ndarray) -> Typical:
    """Returns what images are like, from those of train and val: (m, h, w, c) uint8."""
    statistics = _statistics(train[:MOST])
    # Where all images agree, as in the alpha of opaque ones, 1 % of the range is a difference.
    mean, std = statistics.mean(0), np.maximum(statistics.std(0), 0.01)
    scores = score(val[:MOST] if len(val) else train[:MOST], Typical(mean, std, 0.0))
    return Typical(mean, std, float(np.quantile(scores, SHARE)))


def score(image: np.ndarray, typical: Typical) -> np.ndarray:
    """Returns how far the statistics of images are from those of train.

    It is the root mean square of (statistic - mean) / std, about 1 for an image of train.

    Args:
        image: (m, h, w, c) uint8.
        typical: of the data set.

    Returns:
        (m,) float32.
    """
    return np.sqrt((((_statistics(image) - typical.mean) / typical.std) ** 2).mean(1))


def _statistics(image: np.ndarray) -> np.ndarray:
    """Of each channel: mean, std, and mean difference of neighbours in a column and in a row."""

    def of(x):
        x = x.astype(np.float32) / np.float32(255)
        steps = [np.abs(x - np.roll(x, 1, axis)).mean((1, 2)) for axis in (1, 2)]
        return np.concatenate([x.mean((1, 2)), x.std((1, 2)), *steps], 1)

    return np.concatenate([of(image[i : i + GROUP]) for i in range(0, len(image), GROUP)])


def typical_to_json(typical: Typical) -> dict[str, Any]:
    """Returns the values as JSON has them."""
    return {
        "mean": typical.mean.tolist(),
        "std": typical.std.tolist(),
        "threshold": typical.threshold,
    }


def typical_from_json(values: dict[str, Any], channels: int) -> Typical:
    """Returns what `typical_to_json` was given.

    Raises:
        KeyError, TypeError, ValueError: the values are not those of so many channels.
    """
    mean, std = (np.float32(values[name]).reshape(4 * channels) for name in ("mean", "std"))
    return Typical(mean, std, float(values["threshold"]))
