"""Turns (sum, count) pairs into means."""

import math

import jax
import numpy as np


def means(metrics: dict) -> dict:
    """Returns the mean of each (sum, count) pair, on the host in float64; NaN for a count of 0.

    A count with fewer axes than its sum, such as a number for a matrix, is that of every element.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            name: _over(np.asarray(total, np.float64), np.asarray(count, np.float64))
            for name, (total, count) in jax.device_get(metrics).items()
        }


def _over(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return total / count.reshape(count.shape + (1,) * (total.ndim - count.ndim))


def finite_mean(values: np.ndarray) -> float:
    """Returns the mean of the finite values (r,); NaN where none is finite."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan
