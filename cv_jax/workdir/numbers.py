"""Turns (sum, count) pairs into means."""

import math

import jax
import numpy as np


def means(metrics: dict) -> dict:
    """(sum, count) pairs to means, on the host in float64; NaN where nothing was counted.

    A count of fewer axes than its sum, such as a number for a matrix, counts for the whole of it.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            name: _over(np.asarray(total, np.float64), np.asarray(count, np.float64))
            for name, (total, count) in jax.device_get(metrics).items()
        }


def _over(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return total / count.reshape(count.shape + (1,) * (total.ndim - count.ndim))


def finite_mean(values: np.ndarray) -> float:
    """The mean over the runs whose value is finite; NaN where there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan
