"""Tasks, one file or folder each; what a task must offer, and how it is found by its name.

Imports every room but train, trained and tools. A new task is a new file here with a function
`build(config, spec) -> Task`, or a function of your own that config.task names: "module:function".
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError, describe
from cv_jax.config.names import find
from cv_jax.data import DataSpec
from cv_jax.learn.evaluations import Collected, Probe
from cv_jax.workdir.metric import Metric


class Task(NamedTuple):
    """A task as a value: pure functions for one seed, without device axes.

    A batch is a dict of arrays (b, ...): the fields of the data set, such as `image` and `label`;
    and `rows`, what it says of its rows: in training `index`, `epoch` and `coin`, see
    `data.batches`; in evaluation `weight`, 1 for a row that counts and 0 for padding. A batch to
    predict has only the fields `inputs`. Metrics in training and evaluation are
    (sum, count) pairs, so that any division of the examples gives the same means.

    Attributes:
        init: key -> TrainState.
        train_step: (state, batch, key) -> (state, {metric: (sum, count)}).
        evals: by name, (state, batch) -> {metric: (sum, count)}, a Probe, or Collected. "watch" is
            the evaluation on val during the training, "final" the one of the result.
        metrics: what the numbers of `evals` mean, by name.
        headline: the metric that ranks runs.
        preview: (batch, key) -> the batch as the training step sees it, augmented.
        notes: lines that the log shows at the start.
        needs: fields that the data set must have.
        reads: those of OPTIONAL that have an effect.
        stages: the steps from which on a train_step costs something else; the first is 0.
        features: (state, batch) -> features by name; "pooled" are (b, d). None: there are none.
        predict: (state, batch) -> predictions by name, arrays (b, ...), as evaluation has them.
            None for a task that predicts nothing, such as self-supervision.
        inputs: the fields that `predict` and `features` take.
        outputs: what each prediction is, in words, by name.
        read: the bytes of a file -> [(example, back)]: examples without an axis of rows, and the
            way back to the file's own coordinates.
        describe: (example, prediction, back) -> JSON values, in the file's own coordinates.
        draw: (example, prediction, back) -> a picture (h, w, 3) uint8. Prediction and back are
            None for an example of the data set.
        explain: (state, batch) -> {"saliency": (b, h, w), "features": {name: (b, h, w, c)}}, what
            a prediction rests on; None: there is nothing to show.
        panels: (examples, predictions) of test -> Panels for a report; None: there are none.
        baseline: (train, examples) -> {metric: number} of a trivial predictor; None: there is none.
        warn: {metric: (r,)}, names of the runs -> lines for the log; None: there are none.
    """

    init: Callable
    train_step: Callable
    evals: dict[str, Callable | Probe | Collected]
    metrics: dict[str, Metric]
    headline: str
    preview: Callable
    notes: list[str]
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    stages: tuple[int, ...] = (0,)
    features: Callable | None = None
    predict: Callable | None = None
    inputs: tuple[str, ...] = ("image",)
    outputs: Mapping[str, str] = MappingProxyType({})
    read: Callable | None = None
    describe: Callable | None = None
    draw: Callable | None = None
    explain: Callable | None = None
    panels: Callable | None = None
    baseline: Callable | None = None
    warn: Callable | None = None


def draw_all(task: Task, examples: dict[str, Any]) -> np.ndarray:
    """Returns pictures (m, h, w, 3) uint8 of examples (m, ...) by field, without predictions."""
    count = len(next(iter(examples.values())))
    rows = [{name: np.asarray(x)[i] for name, x in examples.items()} for i in range(count)]
    return np.stack([task.draw(row, None, None) for row in rows])


class Panel(NamedTuple):
    """A part of a report about predictions.

    Attributes:
        title: of the part; "" for none.
        text: a paragraph.
        pictures: (h, w, c) arrays, uint8 or in [0, 1].
        captions: one for each picture.
    """

    title: str
    text: str = ""
    pictures: tuple[Any, ...] = ()
    captions: tuple[str, ...] = ()


# Leaves of the config that only some tasks read; the others refuse a value that has no effect.
OPTIONAL = (
    "data.keep_unlabelled",
    "label_smoothing",
    "method",
    "progressive_resizing",
    "select",
    "tta",
)


def build_task(config: ml_collections.ConfigDict, spec: DataSpec) -> Task:
    """Builds the task that `config.task` names, for data such as `spec`.

    Raises:
        UserError: there is no such task, it does not fit the data, or the config has a value
            without an effect.
    """
    names = {module.name: module.name for module in pkgutil.iter_modules(__path__)}
    if config.task in names:
        build = importlib.import_module(f"{__name__}.{config.task}").build
    else:
        build = find(config.task, names, "config.task")
    task = build(config, spec)
    if not isinstance(task, Task):
        raise UserError(
            f"config.task={config.task!r} returned {describe(task)} and not cv_jax.tasks.Task."
        )
    if problem := _problem(config, spec, task):
        raise UserError(problem)
    return task


def _problem(config: ml_collections.ConfigDict, spec: DataSpec, task: Task) -> str | None:
    for name in task.needs:
        if name not in spec.fields:
            return (
                f"config.task={config.task!r} needs the field {name!r}, and the data set "
                f"{spec.name!r} has {', '.join(spec.fields)}: choose another config.data.name."
            )
    default = base_config()
    for key in OPTIONAL:
        value, unused = (_leaf(c, key) for c in (config, default))
        if key not in task.reads and value != unused:
            return (
                f"config.{key}={value!r} has no effect on config.task={config.task!r}: set it to "
                f"{unused!r}."
            )
    if task.headline not in task.metrics:
        return (
            f"config.task={config.task!r}: its headline {task.headline!r} is none of its metrics."
        )
    return None


def _leaf(config: ml_collections.ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config
