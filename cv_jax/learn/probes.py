"""Measures frozen features: nearest-neighbour and linear accuracy, retrieval, spread and rank.

A probe takes features and not parameters, so it never changes the network. It sees labels of
training images only after the features were learned. Without labels, it looks an image's corner up
among the other corners of all images.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cv_jax.data import DataSpec
from cv_jax.learn.evaluations import Collected, Probe
from cv_jax.learn.losses import unit
from cv_jax.learn.metrics import answer_metrics, nan_unless
from cv_jax.learn.retrieval import CORNER, corner, found_again
from cv_jax.workdir.metric import Metric

NEIGHBOURS, TEMPERATURE = 200, 0.1
RIDGE = 1e-2
# Training images that a probe is fitted on during the training: seconds each time.
WATCHED = 5_000
# Below this spread, see `spread_and_rank`, features do not tell images apart.
COLLAPSED = 0.05


def step_metrics(losses: jax.Array, features: jax.Array) -> dict:
    """Returns the metrics of a training step, from its losses (b,) and its features (m, d)."""
    spread, rank = spread_and_rank(jax.lax.stop_gradient(features))
    one = jnp.float32(1)
    return {
        "loss": (losses.sum(), jnp.float32(len(losses))),
        "feature_spread": (spread, one),
        "feature_rank": (rank, one),
    }


def warn_of_collapse(values: dict[str, np.ndarray], names: Sequence[str]) -> list[str]:
    """Returns a line for each run whose features are equal for all images; see `Task.warn`."""
    spreads = values.get("feature_spread", ())
    return [
        f"{name}: the features collapse, they are nearly equal for all images"
        for name, spread in zip(names, spreads, strict=False)
        if spread < COLLAPSED
    ]


class Probes(NamedTuple):
    """How a task without labels is measured.

    Attributes:
        evals, metrics, headline, baseline: see `tasks.Task`.
        note: a line for the log.
    """

    evals: dict[str, Probe | Collected]
    metrics: dict[str, Metric]
    headline: str
    note: str
    baseline: Callable | None = None


_OF_ALL = {
    "loss": Metric(better="lower"),
    "feature_spread": Metric(protocol="near 0 if all images have the same features"),
    "feature_rank": Metric(protocol="near 1 if all images have the same features"),
}


def make_probes(measure: Callable, spec: DataSpec) -> Probes:
    """Builds the evaluations "watch" and "final" of features.

    Args:
        measure: (state, batch) -> (features (b, d) float32, {metric: (b,)} of the same forward
            pass).
        spec: describes the data set. Labels are used if there are any.
    """
    return _with_labels(measure, spec) if "label" in spec.fields else _without_labels(measure)


class Learned(NamedTuple):
    """The probe fitted on m labelled images.

    Attributes:
        features: (m, d), features of length 1.
        label: (m,) classes.
        weights: (d, n) of the linear classifier.
        bias: (n,) of the linear classifier.
        spread, rank: (), see `spread_and_rank`.
    """

    features: jax.Array
    label: jax.Array
    weights: jax.Array
    bias: jax.Array
    spread: jax.Array
    rank: jax.Array


def _with_labels(measure: Callable, spec: DataSpec) -> Probes:
    """Builds the probes of classes.

    Metrics: accuracy, top5, per_class_accuracy and confusion of the k nearest neighbours;
    linear_accuracy; feature_spread and feature_rank; the means of `measure`. Every sum is NaN
    where a feature, the fitted probe or a value of `measure` is not finite.
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
        sums = {name: (values * weight).sum() for name, values in more.items()}
        finite = [jnp.isfinite(x).all() for x in (features, *learned, *sums.values())]
        metrics = {
            **answer_metrics(votes, label, weight),
            "linear_accuracy": answer_metrics(linear, label, weight)["accuracy"],
            "feature_spread": (learned.spread * count, count),
            "feature_rank": (learned.rank * count, count),
            **{name: (total, count) for name, total in sums.items()},
        }
        return nan_unless(jnp.stack(finite).all(), metrics)

    return Probes(
        evals={"watch": Probe(embed, fit, score, WATCHED), "final": Probe(embed, fit, score)},
        metrics={
            "accuracy": Metric("%", protocol=f"{NEIGHBOURS} nearest neighbours of the features"),
            "top5": Metric("%", protocol=f"five most voted of {NEIGHBOURS} nearest neighbours"),
            "linear_accuracy": Metric("%", protocol="ridge regression on the features"),
            **_OF_ALL,
        },
        headline="accuracy",
        note="probes  accuracy is of the nearest neighbours, linear_accuracy of ridge regression",
    )


def _without_labels(measure: Callable) -> Probes:
    """Builds the probe of data without classes: does a part of an image find the image?

    Metrics: retrieval, see `found_again`; feature_spread and feature_rank of all images of the
    split; the means of `measure`.
    """

    def predict(state, batch):
        features, more = measure(state, batch)
        first, second = (
            measure(state, {**batch, "image": corner(batch["image"], last)})[0]
            for last in (False, True)
        )
        return {**more, "features": features, "first": first, "second": second}

    def add(fold, predictions, examples):
        del examples
        return [*fold, predictions]

    def finish(fold):
        whole = {name: np.concatenate([part[name] for part in fold]) for name in fold[0]}
        finite = all(np.isfinite(x).all() for x in whole.values())
        features, first, second = (whole.pop(name) for name in ("features", "first", "second"))
        spread, rank = spread_and_rank(jnp.asarray(features))
        found = {
            "retrieval": found_again(first, second),
            "feature_spread": float(spread),
            "feature_rank": float(rank),
            **{name: float(values.mean()) for name, values in whole.items()},
        }
        return found if finite else dict.fromkeys(found, float("nan"))

    def chance(train, examples):
        del train
        return {"retrieval": 1 / len(examples["image"])}

    evaluation = Collected(predict, list, add, finish)
    share = f"{CORNER:.0%} of both sides"
    return Probes(
        evals={"watch": evaluation, "final": evaluation},
        metrics={
            "retrieval": Metric("%", protocol=f"upper left by lower right corner, {share}"),
            **_OF_ALL,
        },
        headline="retrieval",
        note="probes  no labels: retrieval finds an image by its lower right corner",
        baseline=chance,
    )


def neighbour_votes(query: jax.Array, features: jax.Array, label: jax.Array, n: int) -> jax.Array:
    """Returns the votes of the nearest neighbours for each class, (b, n) float32 of sum 1.

    The 200 nearest features by cosine similarity s (all, if there are fewer) vote for their class
    with the weight exp(s / 0.1), as in Z. Wu et al., https://arxiv.org/abs/1805.01978, section
    3.4, and most work since.

    Args:
        query: (b, d) features of length 1.
        features: (m, d) features of length 1.
        label: (m,) int32, the class of each of `features`.
        n: number of classes.
    """
    s, nearest = jax.lax.top_k(query @ features.T, min(NEIGHBOURS, len(features)))
    weight = jax.nn.softmax(s / TEMPERATURE)
    return (weight[..., None] * jax.nn.one_hot(label[nearest], n)).sum(1)


def ridge(features: jax.Array, label: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Fits a linear classifier on frozen features by least squares, in closed form.

        W = (X^T X / m + 0.01 I)^-1 X^T Y / m

    X are the features scaled to mean 0 and std 1 per dimension, Y the one-hot labels minus their
    mean.

    Args:
        features: (m, d) float32.
        label: (m,) int32.
        n: number of classes.

    Returns:
        weights (d, n) and bias (n,): features @ weights + bias is highest for the predicted class.
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
    """Computes the spread and the effective rank of features; both are low after a collapse.

    Args:
        features: (m, d).

    Returns:
        spread: the standard deviation of the features scaled to length 1, averaged over
            dimensions, times sqrt(d): 0 if all are equal, 1 if they cover the sphere evenly
            (X. Chen and K. He, https://arxiv.org/abs/2011.10566, section 4.1).
        rank: the number of dimensions that the features fill, (sum_i l_i)^2 / sum_i l_i^2 of the
            eigenvalues l_i of their covariance: between 1 and d.
    """
    m, d = features.shape
    spread = unit(features).std(0).mean() * d**0.5
    centered = features - features.mean(0, keepdims=True)
    cov = centered.T @ centered / m
    rank = jnp.trace(cov) ** 2 / jnp.maximum((cov**2).sum(), 1e-30)
    return spread, jnp.maximum(rank, 1)  # the rank of a single point is 0 / 0
