"""Computes metrics of several classes at once: average precision and F1, on the host."""

import numpy as np


def average_precision(score: np.ndarray, positive: np.ndarray) -> float:
    """Computes the area under the steps of precision over recall; NaN without a positive.

        AP = sum_k (R_k - R_{k-1}) P_k

    k runs over the distinct scores, from the highest. P_k and R_k are precision and recall of the
    examples with at least that score, so that examples of one score count together. No precision
    is interpolated. scikit-learn's `average_precision_score` is the same.

    Args:
        score: (m,), higher for a more likely class.
        positive: (m,) bool.
    """
    order = np.argsort(-score, kind="stable")
    score, hits = score[order], np.cumsum(positive[order])
    if not hits[-1]:
        return float("nan")
    ends = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)  # the last of each score
    hits = hits[ends].astype(np.float64)
    return float((np.diff(hits, prepend=0) * hits / (ends + 1)).sum() / hits[-1])


def average_precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the average precision (n,) of each class; NaN for a class without a positive.

    Args:
        scores: (m, n).
        labels: (m, n) bool.
    """
    return np.array(
        [average_precision(*columns) for columns in zip(scores.T, labels.T, strict=True)]
    )


def micro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Returns 2 TP / (2 TP + FP + FN) over all examples and classes (m, n); 0 for 0 / 0."""
    right, wrong = (predicted & labels).sum(), (predicted != labels).sum()
    return float(2 * right / max(2 * right + wrong, 1))
