"""Multi-label classification: which of n classes are true of an image?

The loss is binary cross-entropy, the headline mean average precision.
"""

from collections.abc import Callable, Sequence
from functools import partial

import ml_collections
import numpy as np

from cv_jax.data import DataSpec, Examples
from cv_jax.learn.evaluations import gather
from cv_jax.learn.images import draw_image, make_read
from cv_jax.learn.losses import binary_cross_entropy
from cv_jax.learn.ranking import average_precisions, micro_f1
from cv_jax.learn.supervised import READS, make_supervised
from cv_jax.tasks import Panel, Task, find_field
from cv_jax.tasks.classification.saliency import explain
from cv_jax.tasks.classification.views import find_tta
from cv_jax.workdir.metric import Metric

MISTAKES = 24  # images


def build(config: ml_collections.ConfigDict, spec: DataSpec) -> Task:
    """Builds the task."""
    names = find_field(config, spec, "labels", "labels").names

    def losses(logits, batch, constants):
        del constants
        return binary_cross_entropy(logits, batch["labels"], config.label_smoothing)

    network = make_supervised(config, spec, len(names), losses)

    def predict(state, batch, views):
        return {"logits": network.viewed(state, batch["image"], views)}

    views = find_tta(config.tta)
    final = partial(predict, views=views)
    protocol = f"mean over the classes with a positive, all points, views {config.tta}"
    return Task(
        init=network.init,
        train_step=network.train_step,
        evals={
            "watch": gather(partial(predict, views=find_tta("none")), "logits", "labels", numbers),
            "final": gather(final, "logits", "labels", numbers),
        },
        metrics={
            "loss": Metric(better="lower"),
            "mAP": Metric("%", protocol=protocol),
            "micro_f1": Metric("%", protocol=f"probability 0.5 or more, views {config.tta}"),
        },
        headline="mAP",
        preview=network.preview,
        notes=network.notes,
        needs=("image", "labels"),
        reads=(*READS, "label_smoothing", "tta"),
        stages=network.stages,
        features=lambda state, batch: network.apply(state, batch["image"])[1],
        predict=final,
        outputs={"logits": "in the order of the class names; their sigmoid is the probabilities"},
        read=make_read(spec),
        describe=partial(describe, names),
        draw=draw_image,
        explain=partial(explain, network.apply, partial(network.viewed, views=views)),
        panels=make_panels(names),
        baseline=frequencies,
    )


def numbers(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns loss (without smoothing), mAP and micro-F1; NaN where a logit is not finite.

    Args:
        logits: (m, n).
        labels: (m, n) bool.
    """
    if not np.isfinite(logits).all():
        return dict.fromkeys(("loss", "mAP", "micro_f1"), float("nan"))
    logits = logits.astype(np.float64)
    precisions = average_precisions(logits, labels)
    known = precisions[labels.any(0)]
    return {
        "loss": np.logaddexp(0, np.where(labels, -logits, logits)).sum(1).mean(),
        "mAP": known.mean() if len(known) else float("nan"),
        "micro_f1": micro_f1(logits >= 0, labels),
    }


def frequencies(train: Examples, examples: Examples) -> dict[str, float]:
    """Returns the numbers of predicting for every image how often train has each class."""
    labels = train["labels"]
    share = (labels.sum(0) + 0.5) / (len(labels) + 1)  # never 0 or 1, whose logits are infinite
    logits = np.log(share) - np.log1p(-share)
    return numbers(np.broadcast_to(logits, examples["labels"].shape), examples["labels"])


def describe(names, example, prediction, back) -> dict:
    """Returns {"classes": those of probability 0.5 or more, "probabilities": highest first}."""
    del example, back
    shares = _probabilities(prediction["logits"])
    probabilities = {names[i]: float(shares[i]) for i in np.argsort(-shares, kind="stable")}
    classes = [name for name, share in probabilities.items() if share >= 0.5]
    return {"classes": classes, "probabilities": probabilities}


def make_panels(
    names: Sequence[str],
) -> Callable[[Examples, dict[str, np.ndarray]], list[Panel]]:
    """Returns (examples, predictions) -> panels: the precision of each class, and mistakes."""

    def panels(examples, predictions):
        labels, logits = examples["labels"], predictions["logits"]
        precisions = average_precisions(logits, labels)
        each = ", ".join(
            f"{name} {'no example' if np.isnan(x) else f'{100 * x:.1f} %'}"
            for name, x in sorted(zip(names, precisions, strict=True), key=lambda pair: pair[1])
        )
        text = f"Of the first {len(labels):,} test images, the worst class first: {each}."
        return [Panel("Average precision of each class", text), *_mistakes(names, examples, logits)]

    return panels


def _mistakes(names, examples, logits):
    shares, labels = _probabilities(logits), examples["labels"]
    error = np.abs(shares - labels).max(1)
    worst = np.argsort(-error, kind="stable")[:MISTAKES]
    worst = worst[error[worst] > 0.5]
    if not len(worst):
        return []
    captions = []
    for i in worst:
        n = np.abs(shares[i] - labels[i]).argmax()
        known = "true" if labels[i, n] else "not true"
        captions.append(f"{names[n]} {100 * shares[i, n]:.0f}\N{NO-BREAK SPACE}%, {known}")
    text = "Images with the class whose probability is furthest from the label."
    pictures = tuple(examples["image"][worst])
    return [Panel("Its most confident mistakes", text, pictures, tuple(captions))]


def _probabilities(logits):
    return 1 / (1 + np.exp(-np.clip(np.asarray(logits, np.float64), -700, 700)))
