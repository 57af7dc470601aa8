"""Regression: k numbers an image, such as an age or a count; squared error or Huber, MAE.

The network is trained on standardised targets. `config.method`, one of METHODS, chooses the loss.
"""

from collections.abc import Callable, Sequence
from functools import partial

import ml_collections
import numpy as np

from cv_jax.config.calls import build_one, require
from cv_jax.config.errors import UserError
from cv_jax.data import DataSpec, Examples
from cv_jax.learn.evaluations import gather
from cv_jax.learn.images import draw_image, make_read
from cv_jax.learn.losses import huber as huber_loss
from cv_jax.learn.supervised import CONSTANTS, READS, make_supervised
from cv_jax.tasks import Panel, Task, find_field
from cv_jax.tasks.classification.views import find_tta
from cv_jax.workdir.metric import Metric

PICTURES = 24  # images in a panel


def squared_error() -> Callable:
    """Returns the mean over the k targets of the squared error of the standardised target."""
    return lambda error: (error**2).mean(-1)


def huber(delta: float = 1.0) -> Callable:
    """Returns the Huber loss, linear for errors above `delta` standard deviations of train."""
    require(lambda: delta > 0, f"delta={delta} must be above 0")
    return partial(huber_loss, delta=delta)


METHODS = {f.__name__: f for f in (squared_error, huber)}


def build(config: ml_collections.ConfigDict, spec: DataSpec) -> Task:
    """Builds the task."""
    field = find_field(config, spec, "target", "values")
    if len(field.shape) != 1:
        raise UserError(
            f"The target of the data set {spec.name!r} has the shape {field.shape} and not (k,): "
            "flatten it, and make single numbers (m, 1)."
        )
    method = build_one(config.method or "squared_error", METHODS, "config.method")
    names = field.names or tuple(f"target_{i}" for i in range(field.shape[0]))

    def losses(outputs, batch, scale):
        target = (batch["target"] - scale["mean"][None]) / scale["std"][None]
        return method(outputs - target)

    network = make_supervised(config, spec, len(names), losses, scale_of(spec.sample["target"]))

    def predict(state, batch, views):
        scale = state.model_state[CONSTANTS]
        outputs = network.viewed(state, batch["image"], views)
        return {"target": outputs * scale["std"][None] + scale["mean"][None]}

    final = partial(predict, views=find_tta(config.tta))
    watch = partial(predict, views=find_tta("none"))
    count = partial(numbers, names)
    return Task(
        init=network.init,
        train_step=network.train_step,
        evals={
            "watch": gather(watch, "target", "target", count),
            "final": gather(final, "target", "target", count),
        },
        metrics=_metrics(names, field.unit, config.tta),
        headline="mae",
        preview=network.preview,
        notes=network.notes,
        needs=("image", "target"),
        reads=(*READS, "method", "tta"),
        stages=network.stages,
        features=lambda state, batch: network.apply(state, batch["image"])[1],
        predict=final,
        outputs={"target": f"{', '.join(names)}{field.unit and f', in {field.unit}'}"},
        read=make_read(spec),
        describe=partial(describe, names, field.unit),
        draw=draw_image,
        panels=make_panels(names, field.unit),
        baseline=partial(mean_of_train, names),
    )


def scale_of(target: np.ndarray) -> dict[str, np.ndarray]:
    """Returns mean and std (k,) float32 of targets (m, k); the std of a constant target is 1."""
    std = target.std(0, dtype=np.float64)
    mean = target.mean(0, dtype=np.float64)
    return {"mean": np.float32(mean), "std": np.float32(np.where(std > 0, std, 1))}


def _metrics(names, unit, tta):
    own = {
        "mae": Metric(unit, "lower", f"mean absolute error, views {tta}"),
        "rmse": Metric(unit, "lower", f"root of the mean squared error, views {tta}"),
        "r2": Metric("", "higher", "1 - squared error / squared distance from the split's mean"),
    }
    several = names if len(names) > 1 else ()
    each = {f"{kind}/{name}": metric for name in several for kind, metric in own.items()}
    return {**own, **each}


def numbers(names: Sequence[str], predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Returns MAE, RMSE and R2 as means over the k targets, and those of each target if k > 1.

    The R2 of a target that is the same for all examples is 1 for exact predictions, else 0.

    Args:
        names: the names of the k targets.
        predicted: (m, k), in the unit of the target.
        target: (m, k).
    """
    target = target.astype(np.float64)
    error = predicted - target
    squares = (error**2).sum(0)
    spread = ((target - target.mean(0)) ** 2).sum(0)
    exact = np.where(np.isfinite(squares), squares == 0, np.nan)
    each = {
        "mae": np.abs(error).mean(0),
        "rmse": np.sqrt(squares / len(error)),
        "r2": np.where(spread > 0, 1 - squares / np.where(spread > 0, spread, 1), exact),
    }
    found = {kind: float(values.mean()) for kind, values in each.items()}
    if len(names) > 1:
        for i, name in enumerate(names):
            found |= {f"{kind}/{name}": float(values[i]) for kind, values in each.items()}
    return found


def mean_of_train(names: Sequence[str], train: Examples, examples: Examples) -> dict[str, float]:
    """Returns the numbers of predicting the mean of train for every example."""
    mean = train["target"].mean(0, dtype=np.float64)
    return numbers(names, np.broadcast_to(mean, examples["target"].shape), examples["target"])


def describe(names, unit, example, prediction, back) -> dict:
    """Returns {"target": {name: number}}, and its "unit" if the target has one."""
    del example, back
    values = dict(zip(names, np.asarray(prediction["target"], np.float64).tolist(), strict=True))
    return {"target": values, **({"unit": unit} if unit else {})}


def make_panels(
    names: Sequence[str], unit: str
) -> Callable[[Examples, dict[str, np.ndarray]], list[Panel]]:
    """Returns (examples, predictions) -> panels: the images with the largest errors."""

    def shown(values):
        return ", ".join(f"{name} {x:.4g}" for name, x in zip(names, values, strict=True))

    def panels(examples, predictions):
        target, found = examples["target"], predictions["target"]
        scale = scale_of(target)["std"]
        worst = np.argsort(-np.abs((found - target) / scale).max(1), kind="stable")[:PICTURES]
        text = f"Target → prediction{unit and f', in {unit}'}; the largest error first."
        captions = tuple(f"{shown(target[i])} → {shown(found[i])}" for i in worst)
        pictures = tuple(examples["image"][worst])
        return [Panel("Its largest errors", text, pictures, captions)]

    return panels
