"""What an evaluation measures, as (sum, count) pairs over the examples that count."""

import jax
import jax.numpy as jnp

from cv_jax.learn.losses import cross_entropy

# Bins of the reliability diagram, as in C. Guo et al., arXiv 1706.04599.
CONFIDENCE_BINS = 15


def classification_metrics(logits: jax.Array, label: jax.Array, weight: jax.Array) -> dict:
    """Metrics of a batch.

    Args:
        logits: (b, n) float32.
        label: (b,) int32 in [0, n).
        weight: (b,) float32, 1 for an example that counts and 0 for padding.

    Returns:
        loss (cross-entropy, nats); those of `answer_metrics`; calibration, whose sum is (3, 15): of
        the examples whose confidence (the probability of the answer) lies in each of 15 bins of
        equal width, the number, how many are right, and the sum of the confidences. Every sum is
        NaN where a logit or the loss is not finite, see `nan_unless`.
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

    A run that has diverged has no accuracy: the argmax of NaN is class 0, which looks like an
    answer. The counts stay.
    """
    return {name: (jnp.where(finite, x, jnp.nan), count) for name, (x, count) in metrics.items()}


def answer_metrics(scores: jax.Array, label: jax.Array, weight: jax.Array) -> dict:
    """Which answers are right: that of an example is the class of its highest score.

    Args:
        scores: (b, n).
        label, weight: see `classification_metrics`.

    Returns:
        accuracy, top5 where n > 5, per_class_accuracy ((n,) pairs); confusion, whose sum is the
        (n, n) matrix of counts, rows the labels, columns the answers.
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
