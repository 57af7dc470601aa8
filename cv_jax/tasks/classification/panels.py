"""Builds the report's panels about a classifier's predictions: its most confident mistakes."""

from collections.abc import Callable, Sequence

import numpy as np

from cv_jax.data import Examples
from cv_jax.tasks import Panel

MISTAKES = 24  # images


def make_panels(names: Sequence[str]) -> Callable[[Examples, dict[str, np.ndarray]], list[Panel]]:
    """Returns (examples, predictions) -> panels. `names` are the class names."""

    def panels(examples, predictions):
        label = examples["label"]
        answer, confidence = _answers(predictions["logits"])
        right = int((answer == label).sum())
        summary = (
            f"The network predicts the right class for {right:,} of the first {len(label):,} test "
            f"images ({100 * right / len(label):.2f} %), without test-time augmentation."
        )
        worst = worst_mistakes(answer, confidence, label, MISTAKES)
        percent = [f"{100 * x:.0f}\N{NO-BREAK SPACE}%" for x in confidence]
        captions = [f"{names[label[i]]} → {names[answer[i]]}, {percent[i]}" for i in worst]
        mistakes = Panel(
            "Its most confident mistakes",
            "Label → predicted class, and its probability.",
            tuple(examples["image"][worst]),
            tuple(captions),
        )
        return [Panel("", summary), *([mistakes] if len(worst) else [])]

    return panels


def _answers(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the most probable class (m,) of logits (m, n), and its probability (m,)."""
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return shares.argmax(-1), shares.max(-1)


def worst_mistakes(
    answer: np.ndarray, confidence: np.ndarray, label: np.ndarray, most: int
) -> np.ndarray:
    """Returns the positions of wrong predictions, the most confident first, `most` at most."""
    wrong = np.flatnonzero(answer != label)
    return wrong[np.argsort(-confidence[wrong], kind="stable")][:most]
