"""Weights of the classes in a classifier's loss, for classes that are not equally frequent."""

from collections.abc import Sequence

import jax
import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.data import DataSpec


def make_class_weights(
    text: str, spec: DataSpec, counts: Sequence[int] | None = None
) -> np.ndarray | None:
    """Returns the weights (n,) float32 of the classes; None for "".

    Args:
        text: the value of `config.class_weights`: "", "balanced" for `balanced_weights`, or "sqrt"
            for their square roots.
        spec: describes the data set.
        counts: the number of training examples of each class; None: those of the field `label`.

    Raises:
        UserError: the numbers of labels in train are not known.
    """
    if not text:
        return None
    counts = spec.label_counts if counts is None else counts
    if not counts:
        raise UserError(
            f"config.class_weights={text!r} needs the number of training examples of each class, "
            f"which is not known for the data set {spec.name!r}: set config.class_weights=''."
        )
    weights = balanced_weights(counts)
    return np.sqrt(weights) if text == "sqrt" else weights


def balanced_weights(label_counts: Sequence[int]) -> np.ndarray:
    """Returns the weight of each class, w_i = m / (n m_i), where train has m_i of m examples.

    All n classes then have the same total weight. A class without examples has weight 0.
    """
    counts = np.array(label_counts, np.float64)
    weights = counts.sum() / (len(counts) * np.maximum(counts, 1))
    return np.where(counts > 0, weights, 0).astype(np.float32)


def example_weights(class_weights: np.ndarray | None, label: jax.Array) -> jax.Array | None:
    """Returns the weight of each example, sum_n y_n w_n, (b,); None without class weights.

    Args:
        class_weights: w, (n,) float32.
        label: y, (b, n), one-hot or mixed probabilities.
    """
    if class_weights is None:
        return None
    return (label * class_weights[None]).sum(-1)
