"""Tasks, one file or folder each; what a task must offer, and how it is found by its name.

Imports every room but train, trained and tools. A new task is a new file here with a function
`build(config, spec) -> Task`.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import NamedTuple

import ml_collections

from cv_jax.config.errors import UserError, nearest
from cv_jax.learn.evaluations import Probe
from cv_jax.workdir.metric import Metric


class Task(NamedTuple):
    """A task as a value: pure functions for one seed, without device axes.

    A batch is a dict of arrays with a leading axis b: `image` (b, h, w, c) uint8, `label` (b,)
    int32, and in training `index`, `epoch` and `coin` (see `data.batches`), in evaluation `mask`.
    Metrics are (sum, count) pairs, so that any division of the examples gives the same means.

    Attributes:
        init: key -> TrainState.
        train_step: (state, batch, key) -> (state, {metric: (sum, count)}).
        evals: name -> ((state, batch) -> {metric: (sum, count)}), or name -> Probe. "watch" is what
            validation during the training uses, "final" what the result is made of.
        metrics: name -> unit, direction and protocol of what `evals` and `train_step` measure. A
            metric that is not listed is a plain number without a unit.
        headline: name of the metric that ranks checkpoints, settings and runs.
        preview: (batch, key) -> (b, h, w, c) float32 in [0, 1], augmented images.
        notes: lines that the log shows at the start.
        features: (state, image) -> what the network sees in images (b, h, w, c), uint8 or float32
            in [0, 1], by name; "pooled" are features (b, d).
        predict: (state, image, tta) -> (logits (b, n), features by name), what evaluation sees in
            images (b, h, w, c), uint8 or float32 in [0, 1]; `tta` is a name of `views.TTA`, and
            the features are those of the images as they are. None for a task without classes.
        stages: the steps from which on a train_step costs something else, the first is 0.
        warn: ({metric: (r,) values of one row}, names of the r runs) -> lines for the log. A value
            is NaN where a run has none. None: no warnings.
    """

    init: Callable
    train_step: Callable
    evals: dict[str, Callable | Probe]
    metrics: dict[str, Metric]
    headline: str
    preview: Callable
    notes: list[str]
    features: Callable
    predict: Callable | None = None
    stages: tuple[int, ...] = (0,)
    warn: Callable | None = None


def build_task(config: ml_collections.ConfigDict, spec: NamedTuple) -> Task:
    """Builds the task that `config.task` names, a file in this folder, for data such as `spec`."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    if config.task not in names:
        raise UserError(
            f"config.task={config.task!r} is unknown.{nearest(config.task, names)} "
            f"There are: {', '.join(names)}."
        )
    return importlib.import_module(f"{__name__}.{config.task}").build(config, spec)
