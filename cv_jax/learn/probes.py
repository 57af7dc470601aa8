"""What frozen features are worth: their neighbours, a linear classifier on them, their spread.

They see the labels of training images only after the features were learned, and never change the
network: they take features and not parameters.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cv_jax.data import DataSpec
from cv_jax.learn.evaluations import Probe
from cv_jax.learn.losses import unit
from cv_jax.learn.metrics import answer_metrics, nan_unless
from cv_jax.workdir.metric import Metric

NEIGHBOURS, TEMPERATURE = 200, 0.1
RIDGE = 1e-2
# Training images that are learned from while the training goes on: that takes seconds.
WATCHED = 5_000
# The spread of features, see `spread_and_rank`, below which they say nothing of an image.
COLLAPSED = 0.05
# What tasks without labels measure.
METRICS = {
    "loss": Metric(better="lower"),
    "accuracy": Metric("%", protocol=f"{NEIGHBOURS} nearest neighbours of the features"),
    "top5": Metric("%", protocol=f"five most voted of {NEIGHBOURS} nearest neighbours"),
    "linear_accuracy": Metric("%", protocol="ridge regression on the features"),
    "feature_spread": Metric(protocol="near 0 where all images look the same to the network"),
    "feature_rank": Metric(protocol="near 1 where all images look the same to the network"),
}
HEADLINE = "accuracy"


def step_metrics(losses: jax.Array, features: jax.Array) -> dict:
    """What a training step says: its losses (b,), and whether its features (m, d) collapse."""
    spread, rank = spread_and_rank(jax.lax.stop_gradient(features))
    one = jnp.float32(1)
    return {
        "loss": (losses.sum(), jnp.float32(len(losses))),
        "feature_spread": (spread, one),
        "feature_rank": (rank, one),
    }


def warn_of_collapse(values: dict[str, np.ndarray], names: Sequence[str]) -> list[str]:
    """Returns a line for each run whose features are the same for all images; see `Task.warn`."""
    spreads = values.get("feature_spread", ())
    return [
        f"{name}: its features collapse, all images look alike to it"
        for name, spread in zip(names, spreads, strict=False)
        if spread < COLLAPSED
    ]


class Learned(NamedTuple):
    """Of m labelled images.

    Attributes:
        features: (m, d) of length 1; label: (m,).
        weights: (d, n), bias: (n,) of the linear classifier.
        spread, rank: (), see `spread_and_rank`.
    """

    features: jax.Array
    label: jax.Array
    weights: jax.Array
    bias: jax.Array
    spread: jax.Array
    rank: jax.Array


def make_probes(measure: Callable, spec: DataSpec) -> dict[str, Probe]:
    """The evaluations "watch" and "final" of a task without labels.

    Metrics: accuracy, that of the k nearest neighbours, with top5, per_class_accuracy and
    confusion as in classification; linear_accuracy; feature_spread and feature_rank. Every sum is
    NaN where a feature, what was learned or a sum of `measure` is not finite.

    Args:
        measure: (state, batch) -> (features (b, d) float32, {metric: (sum, count)}), the latter
            what the same pass of the network gives beside.
        spec: of the data.
    """
    n = spec.num_classes

    def embed(state, batch):
        return measure(state, batch)[0]

    def fit(features, label):
        spread, rank = spread_and_rank(features)
        return Learned(unit(features), label, *ridge(features, label, n), spread, rank)

    def score(state, learned, batch):
        features, more = measure(state, batch)
        label, weight = batch["label"], batch["rows"]["weight"]
        votes = neighbour_votes(unit(features), learned.features, learned.label, n)
        linear = features @ learned.weights + learned.bias[None]
        count = weight.sum()
        sums = [total for total, _ in more.values()]
        finite = [jnp.isfinite(x).all() for x in (features, *learned, *sums)]
        metrics = {
            **answer_metrics(votes, label, weight),
            "linear_accuracy": answer_metrics(linear, label, weight)["accuracy"],
            "feature_spread": (learned.spread * count, count),
            "feature_rank": (learned.rank * count, count),
            **more,
        }
        return nan_unless(jnp.stack(finite).all(), metrics)

    return {"watch": Probe(embed, fit, score, WATCHED), "final": Probe(embed, fit, score)}


NOTE = "probes  accuracy is that of the nearest neighbours, linear_accuracy of ridge regression"


def neighbour_votes(query: jax.Array, features: jax.Array, label: jax.Array, n: int) -> jax.Array:
    """The votes of the nearest neighbours for each class, (b, n) float32 of sum 1.

    The 200 features nearest by cosine similarity s (all, where there are fewer) vote for their
    class with the weight exp(s / 0.1), as in Z. Wu et al., https://arxiv.org/abs/1805.01978,
    section 3.4, and most work since.

    Args:
        query: (b, d) of length 1.
        features: (m, d) of length 1; label: (m,) int32.
        n: classes.
    """
    s, nearest = jax.lax.top_k(query @ features.T, min(NEIGHBOURS, len(features)))
    weight = jax.nn.softmax(s / TEMPERATURE)
    return (weight[..., None] * jax.nn.one_hot(label[nearest], n)).sum(1)


def ridge(features: jax.Array, label: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The linear classifier of least squares on frozen features, in closed form.

        W = (X^T X / m + 0.01 I)^-1 X^T Y / m

    with X the features brought to mean 0 and std 1 per dimension, and Y the one-hot labels less
    their mean.

    Args:
        features: (m, d) float32; label: (m,) int32; n: classes.

    Returns:
        weights (d, n) and bias (n,): features @ weights + bias is highest for the answer.
    """
    m, d = features.shape
    mean = features.mean(0, keepdims=True)
    std = jnp.sqrt(((features - mean) ** 2).mean(0, keepdims=True) + 1e-12)
    x = (features - mean) / std
    y = jax.nn.one_hot(label, n)
    y_mean = y.mean(0, keepdims=True)
    gram = x.T @ x / m + RIDGE * jnp.eye(d)
    weights = jnp.linalg.solve(gram, x.T @ (y - y_mean) / m) / std.T
    return weights, (y_mean - mean @ weights)[0]


def spread_and_rank(features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How far features are from having collapsed.

    Args:
        features: (m, d).

    Returns:
        spread: the standard deviation of the features, brought to length 1, in the mean over
            dimensions, times sqrt(d): 0 where all are the same, 1 where they are everywhere on
            the sphere (X. Chen and K. He, https://arxiv.org/abs/2011.10566, section 4.1).
        rank: the dimensions that the features fill, (sum_i l_i)^2 / sum_i l_i^2 of the
            eigenvalues l_i of their covariance: between 1 and d.
    """
    m, d = features.shape
    spread = unit(features).std(0).mean() * d**0.5
    centered = features - features.mean(0, keepdims=True)
    cov = centered.T @ centered / m
    rank = jnp.trace(cov) ** 2 / jnp.maximum((cov**2).sum(), 1e-30)
    return spread, jnp.maximum(rank, 1)  # of a single point it is 0 / 0
