"""Defines the contract of a task, and finds a task by its name. One file or folder a task.

Imports every room but train, trained and tools. A new task is a new file here with a function
`build(config, spec) -> Task`, or your own function, named by config.task: "module:function".
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError, describe
from cv_jax.config.names import find
from cv_jax.data import DataSpec
from cv_jax.data.fields import Field, num_examples, take
from cv_jax.learn.evaluations import Collected, Probe
from cv_jax.workdir.metric import Metric


class Task(NamedTuple):
    """A task as a value: pure functions for one seed, without device axes.

    A batch is a dict of arrays (b, ...): the fields of the data set, such as `image` and `label`,
    and `rows`, a dict of facts about each row. In training `rows` has `index`, `epoch` and `coin`,
    see `data.batches`; in evaluation `weight`, 1 for an example and 0 for padding. A batch to
    predict has only the fields `inputs`. Metrics in training and evaluation are (sum, count)
    pairs, so that any division of the examples gives the same means.

    Attributes:
        init: key -> TrainState.
        train_step: (state, batch, key) -> (state, {metric: (sum, count)}).
        evals: {name: evaluation}: (state, batch) -> {metric: (sum, count)}, a Probe, or Collected.
            "watch" runs on val during the training, "final" gives the result.
        metrics: {metric of `evals`: its unit, direction and protocol}.
        headline: the metric that ranks runs.
        preview: (batch, key) -> the augmented batch, as the training step sees it.
        notes: lines that the log shows at the start.
        needs: fields that the data set must have.
        reads: the keys of OPTIONAL that have an effect on the task.
        stages: the first step of each stage, ascending from 0. The FLOPs of a train_step are
            constant within a stage, and each stage is a program of its own. With several stages,
            train_step takes `stage` as a fourth argument: the number of the stage that the step
            is in. None: any step, with all stages in one program.
        features: (state, batch) -> features by name; "pooled" are (b, d). None: no features.
        predict: (state, batch) -> predictions by name, arrays (b, ...), as in evaluation.
            None for a task that predicts nothing, such as self-supervision.
        inputs: the fields that `predict` and `features` take.
        outputs: {name of a prediction: its description in words}.
        read: the bytes of a file -> [(example, back)]. An example has no axis of rows; `back` maps
            its coordinates to those of the file.
        join: [(example, prediction, back)] of one file -> (example, prediction, back) of the whole
            file. None: the examples of a file stay apart.
        describe: (example, prediction, back) -> JSON values, in the file's own coordinates.
        draw: (example, prediction, back) -> a picture (h, w, 3) uint8. Prediction and back are
            None for an example of the data set.
        mask: (prediction, back) -> a Pillow image of the file's size, whose pixels are classes;
            None for a task without masks.
        at_threshold: the least score that counts -> {"describe": ..., ...}, the attributes of the
            task that depend on it; None for a task whose predictions have no score.
        explain: (state, batch) -> {"saliency": (b, h, w), "features": {name: (b, h, w, c)}} that
            explain a prediction; None: no explanation.
        panels: (examples, predictions) of test -> Panels for a report; None: no panels.
        baseline: (train, examples) -> {metric: number} of a trivial predictor; None: no baseline.
        warn: ({metric: (r,)}, names of the runs) -> warnings for the log; None: no warnings.
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
    join: Callable | None = None
    describe: Callable | None = None
    draw: Callable | None = None
    mask: Callable | None = None
    at_threshold: Callable | None = None
    explain: Callable | None = None
    panels: Callable | None = None
    baseline: Callable | None = None
    warn: Callable | None = None


def step_of_stage(task: Task, stage: int) -> Callable:
    """Returns the task's train_step for the steps of one stage, jitted: it is traced once."""
    if len(task.stages) == 1:
        return jax.jit(task.train_step)
    return partial(jax.jit(task.train_step, static_argnames="stage"), stage=stage)


def draw_all(task: Task, examples: dict[str, Any]) -> np.ndarray:
    """Returns pictures (m, h, w, 3) uint8 of examples (m, ...) by field, without predictions."""
    arrays = {name: np.asarray(x) for name, x in examples.items()}
    rows = [take(arrays, i) for i in range(num_examples(arrays))]
    return np.stack([task.draw(row, None, None) for row in rows])


class Panel(NamedTuple):
    """A part of a report about predictions.

    Attributes:
        title: the panel's title; "" for no title.
        text: a paragraph.
        pictures: (h, w, c) arrays, uint8 or in [0, 1].
        captions: one caption for each picture.
    """

    title: str
    text: str = ""
    pictures: tuple[Any, ...] = ()
    captions: tuple[str, ...] = ()


# Config keys that only some tasks read. For any other task a value without effect is an error.
OPTIONAL = (
    "accumulate",
    "class_weights",
    "data.keep_unlabelled",
    "data.normalize_by",
    "label_smoothing",
    "method",
    "progressive_resizing",
    "select",
    "tta",
)


def build_task(config: ml_collections.ConfigDict, spec: DataSpec) -> Task:
    """Builds the task that `config.task` names, for data that `spec` describes.

    Raises:
        UserError: the task does not exist or does not fit the data, or a config value has no
            effect on the task.
    """
    names = {module.name: module.name for module in pkgutil.iter_modules(__path__)}
    if config.task in names:
        build = importlib.import_module(f"{__name__}.{config.task}").build
    else:
        build = find(config.task, names, "config.task")
    task = build(config, spec)
    if not isinstance(task, Task):
        raise UserError(
            f"config.task={config.task!r} returned {describe(task)}: return a cv_jax.tasks.Task."
        )
    if problem := _problem(config, spec, task):
        raise UserError(problem)
    return task


def _problem(config: ml_collections.ConfigDict, spec: DataSpec, task: Task) -> str | None:
    for name in task.needs:
        if name not in spec.fields:
            return _missing(config, spec, name)
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
            f"config.task={config.task!r}: the headline {task.headline!r} is not one of the task's "
            f"metrics. Choose one of: {', '.join(task.metrics)}."
        )
    return None


def _missing(config: ml_collections.ConfigDict, spec: DataSpec, name: str) -> str:
    return (
        f"config.task={config.task!r} needs the field {name!r}, and the data set "
        f"{spec.name!r} has {', '.join(spec.fields)}: choose another config.task, or data that "
        "have the field."
    )


def find_field(config: ml_collections.ConfigDict, spec: DataSpec, name: str, kind: str) -> Field:
    """Returns the field of this name, for a task that needs it to be built.

    Raises:
        UserError: the data set has no such field, or the field is of another kind.
    """
    if name not in spec.fields:
        raise UserError(_missing(config, spec, name))
    field = spec.fields[name]
    if field.kind != kind:
        raise UserError(
            f"config.task={config.task!r} needs the field {name!r} of the kind {kind!r}, and that "
            f"of the data set {spec.name!r} is of the kind {field.kind!r}: rename the field."
        )
    return field


def _leaf(config: ml_collections.ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config
