"""Metrics of classification as (sum, count) pairs over the examples of weight 1."""

import jax
import jax.numpy as jnp

from cv_jax.learn.losses import cross_entropy

# Bins of the reliability diagram, as in C. Guo et al., arXiv 1706.04599.
CONFIDENCE_BINS = 15


def classification_metrics(logits: jax.Array, label: jax.Array, weight: jax.Array) -> dict:
    """Computes the metrics of a batch.

    Args:
        logits: (b, n) float32.
        label: (b,) int32 in [0, n).
        weight: (b,) float32, 1 for an example and 0 for padding.

    Returns:
        {metric: (sum, count)}: loss (cross-entropy, nats), the metrics of `answer_metrics`, and
        calibration. The sum of calibration is (3, 15): for each of 15 bins of equal width of the
        confidence (the predicted class's probability), the number of examples, the number of
        correct ones, and the sum of their confidences. Every sum is NaN where a logit or the loss
        is not finite, see `nan_unless`.
    """
    count = weight.sum()
    losses = cross_entropy(logits, jax.nn.one_hot(label, logits.shape[-1]))
    correct = (logits.argmax(-1) == label).astype(weight.dtype)
    confidence = jax.nn.softmax(logits).max(-1)
    bins = jnp.minimum((confidence * CONFIDENCE_BINS).astype(jnp.int32), CONFIDENCE_BINS - 1)
    binned = jnp.stack([jnp.ones_like(weight), correct, confidence]) * weight[None]
    loss = (losses * weight).sum()
    metrics = {
        "loss": (loss, count),
        **answer_metrics(logits, label, weight),
        "calibration": (binned @ jax.nn.one_hot(bins, CONFIDENCE_BINS), count),
    }
    return nan_unless(jnp.isfinite(logits).all() & jnp.isfinite(loss), metrics)


def nan_unless(finite: jax.Array, metrics: dict) -> dict:
    """Returns the (sum, count) pairs with NaN for every sum unless `finite` () is True.

    A diverged run has no accuracy: the argmax of NaN is class 0, which looks like a prediction.
    The counts stay.
    """
    return {name: (jnp.where(finite, x, jnp.nan), count) for name, (x, count) in metrics.items()}


def answer_metrics(scores: jax.Array, label: jax.Array, weight: jax.Array) -> dict:
    """Computes how often the predicted class, that of the highest score, is the label.

    Args:
        scores: (b, n), higher for a more likely class.
        label, weight: see `classification_metrics`.

    Returns:
        {metric: (sum, count)}: accuracy; top5 if n > 5; per_class_accuracy, whose sum and count
        are (n,); confusion, whose sum is the (n, n) matrix of counts, rows labels and columns
        predictions.
    """
    n = scores.shape[-1]
    answer = scores.argmax(-1)
    confusion = (jax.nn.one_hot(label, n) * weight[:, None]).T @ jax.nn.one_hot(answer, n)
    count = weight.sum()

    def hits(correct):
        return (correct.astype(weight.dtype) * weight).sum(), count

    metrics = {
        "accuracy": hits(answer == label),
        "per_class_accuracy": (jnp.diagonal(confusion), confusion.sum(1)),
        "confusion": (confusion, count),
    }
    if n > 5:
        metrics["top5"] = hits((jax.lax.top_k(scores, 5)[1] == label[:, None]).any(-1))
    return metrics
