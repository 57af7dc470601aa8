"""The training step that a config describes, whatever the task: optimizer, stages, guards."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from cv_jax.augment.resizing import make_stages, size_at
from cv_jax.config import durations
from cv_jax.data import DataSpec
from cv_jax.learn import update
from cv_jax.models.layers import frozen_statistics
from cv_jax.optim.optimizers import make_optimizer
from cv_jax.optim.selection import Select
from cv_jax.optim.state import TrainState


class Steps(NamedTuple):
    """How a task trains.

    Attributes:
        tx: the optimizer.
        train_step, stages: see `tasks.Task`.
        notes: lines that the log shows at the start.
    """

    tx: optax.GradientTransformation
    train_step: Callable
    stages: tuple[int, ...]
    notes: list[str]


def make_steps(
    config: ml_collections.ConfigDict,
    spec: DataSpec,
    params: Any,
    forward: Callable,
    select: Select | None = None,
    finish: Callable[[TrainState], TrainState] = lambda state: state,
) -> Steps:
    """Builds what `config.optim` and `config.progressive_resizing` say for these parameters.

    Args:
        config: of the run.
        spec: of the data.
        params: the parameters as ShapeDtypeStructs.
        forward: (params, model_state, batch, key, size) -> (losses (b,), (model_state, metrics)),
            as for `update.make_train_step`, with images of `size` pixels a side (None: all).
        select: see `update.make_train_step`.
        finish: what each step does last with the new state.
    """
    total_steps = durations.total_steps(config, spec.num_train)
    sizes = make_stages(config.progressive_resizing, total_steps)
    to_steps = partial(durations.steps, batch_size=config.batch_size, num_train=spec.num_train)
    optimizer = make_optimizer(config.optim, params, total_steps, config.batch_size, to_steps)

    def step_from(start):
        size = size_at(sizes, start)

        def forward_from(params, model_state, batch, key):
            params = optimizer.stop_gradients(params, start)
            with frozen_statistics(optimizer.frozen):
                return forward(params, model_state, batch, key, size)

        train_step = update.make_train_step(forward_from, optimizer.tx, select)

        def finished(state, batch, key):
            state, metrics = train_step(state, batch, key)
            return finish(state), metrics

        return finished

    stages = tuple(sorted({*(stage.start for stage in sizes), *optimizer.ends}))
    step = update.in_stages(stages, [step_from(start) for start in stages])
    if config.optim.skip_nonfinite:
        step = update.skip_nonfinite(step)

    def train_step(state, batch, key):
        rates = {name: (rate, jnp.float32(1)) for name, rate in optimizer.lr(state.step).items()}
        state, metrics = step(state, batch, key)
        return state, {**metrics, **rates}

    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    notes = [f"model   {config.model}: {num_params:,} parameters", optimizer.report]
    if len(sizes) > 1:
        shown = [f"{s.size or 'all'} from step {s.start}" for s in sizes]
        notes.append(f"pixels  a side: {', '.join(shown)}")
    warmups = {"optim.warmup": config.optim.warmup}
    for group, settings in config.optim.groups.items():
        if "warmup" in settings:
            warmups[f"optim.groups.{group}.warmup"] = settings["warmup"]
    for key, warmup in warmups.items():
        if (num_steps := to_steps(warmup)) >= total_steps:
            notes.append(
                f"warmup  config.{key} is {num_steps:,} steps and the training {total_steps:,}: "
                "the learning rate never reaches its peak"
            )
    return Steps(optimizer.tx, train_step, stages, notes)
