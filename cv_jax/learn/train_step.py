"""The training step: how a batch becomes a change of the parameters."""

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
from cv_jax.learn.accumulation import make_gradient
from cv_jax.learn.losses import Loss
from cv_jax.models import compute_dtype
from cv_jax.models.layers import frozen_statistics
from cv_jax.optim.optimizers import Optimizer, make_optimizer
from cv_jax.optim.selection import Select
from cv_jax.optim.state import TrainState
from cv_jax.workdir.metric import is_loss

# (state, batch, key) -> (state, {metric: (sum, count)})
Step = Callable[[TrainState, dict, jax.Array], tuple[TrainState, dict]]


class Stage(NamedTuple):
    """A part of the training in which every step does the same work.

    Attributes:
        start: the stage's first step.
        size: pixels a side of the images; None: unchanged.
    """

    start: int
    size: int | None


class Training(NamedTuple):
    """The optimizer and the step of a task.

    Attributes:
        tx: the optimizer.
        train_step, stages: see `tasks.Task`.
        notes: lines that the log shows at the start.
    """

    tx: optax.GradientTransformation
    train_step: Step
    stages: tuple[int, ...]
    notes: list[str]


def make_training(
    config: ml_collections.ConfigDict,
    spec: DataSpec,
    params: Any,
    loss: Callable[..., tuple[Loss, tuple[Any, dict]]] | None = None,
    select: Select | None = None,
    finish: Callable[[TrainState], TrainState] = lambda state: state,
    update: Callable[[Optimizer, Stage], Step] | None = None,
    prepare: Callable[[dict, jax.Array], dict] | None = None,
) -> Training:
    """Builds the step that `config.optim` and `config.progressive_resizing` describe.

    Args:
        config: the run's config.
        spec: describes the data set.
        params: the parameters as ShapeDtypeStructs.
        loss: (params, model_state, batch, key, size) -> (Loss, (model_state, metrics)), with
            images of `size` pixels a side (None: unchanged). See `gradient_step`.
        select: chooses the examples of a batch to train on; None: all.
        finish: changes the new state at the end of each step.
        update: (optimizer, stage) -> step, instead of `loss`, for a task with an update of its
            own, for example of two networks. `apply_gradients` is the building block.
        prepare: (batch, key) -> the batch for `loss`, see `gradient_step`. A task without it must
            not read `config.accumulate`.
    """
    total_steps = durations.total_steps(config, spec.num_train)
    sizes = make_stages(config.progressive_resizing, total_steps)
    to_steps = partial(durations.steps, batch_size=config.batch_size, num_train=spec.num_train)
    optimizer = make_optimizer(config.optim, params, total_steps, config.batch_size, to_steps)
    starts = tuple(sorted({*(stage.start for stage in sizes), *optimizer.ends}))
    stages = [Stage(start, size_at(sizes, start)) for start in starts]

    def follow_gradient(optimizer, stage):
        def loss_of_stage(params, model_state, batch, key):
            params = optimizer.stop_gradients(params, stage.start)
            with frozen_statistics(optimizer.frozen):
                return loss(params, model_state, batch, key, stage.size)

        return gradient_step(loss_of_stage, optimizer.tx, select, prepare, config.accumulate)

    update = update or follow_gradient
    steps = [_then(finish, update(optimizer, stage)) for stage in stages]

    def train_step(
        state: TrainState, batch: dict, key: jax.Array, stage: int | None = None
    ) -> tuple[TrainState, dict]:
        if stage is None:
            number = jnp.searchsorted(jnp.array(starts), state.step, side="right") - 1
            new, metrics = jax.lax.switch(number, steps, state, batch, key)
        else:
            new, metrics = steps[stage](state, batch, key)
        if config.optim.skip_nonfinite:
            new, metrics = keep_if_finite(state, new, metrics)
        rates = {name: (rate, jnp.float32(1)) for name, rate in optimizer.lr(state.step).items()}
        return new, {**metrics, **rates}

    notes = [
        f"model   {config.model}: {_num_values(params):,} parameters",
        _dtype_note(compute_dtype(config.dtype)),
        optimizer.report,
    ]
    if len(sizes) > 1:
        shown = [f"{s.size or 'all'} from step {s.start}" for s in sizes]
        notes.append(f"pixels  a side: {', '.join(shown)}")
    if config.accumulate > 1:
        notes.append(
            f"batch   accumulates {config.accumulate} microbatches a step; batch normalisation, "
            "where there is some, sees one at a time"
        )
    notes += _long_warmups(config.optim, to_steps, total_steps)
    return Training(optimizer.tx, train_step, starts, notes)


def gradient_step(
    loss: Callable[..., tuple[Loss, tuple[Any, dict]]],
    tx: optax.GradientTransformation,
    select: Select | None = None,
    prepare: Callable[[dict, jax.Array], dict] | None = None,
    accumulate: int = 1,
) -> Step:
    """Builds the step that follows the gradient of the loss over the whole batch, sum / count.

    Args:
        loss: (params, model_state, batch, key) -> (Loss, (model_state, {metric: (sum, count)})).
        tx: the optimizer.
        select: chooses the examples of a batch to train on; None: all.
        prepare: (batch, key) -> the batch for `loss`, once for the whole batch: what augmentation
            draws then does not depend on `accumulate`. None: unchanged.
        accumulate: the number of microbatches that the batch is cut into, see `make_gradient`.
    """
    gradient = make_gradient(loss, accumulate)

    def step(state: TrainState, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        if select:
            batch = select(batch, state.last_loss)
        prepared = prepare(batch, key) if prepare else batch
        grads, found, aux = gradient(state.params, state.model_state, prepared, key)
        model_state, metrics = aux
        params, opt_state = apply_gradients(tx, grads, state)
        last_loss = None
        if select:
            last_loss = state.last_loss.at[batch["rows"]["index"]].set(found.each)
        return TrainState(state.step + 1, params, model_state, opt_state, last_loss), metrics

    return step


def apply_gradients(
    tx: optax.GradientTransformation, grads: Any, state: TrainState
) -> tuple[Any, Any]:
    """Returns new parameters and optimizer state, with the learning rates of `state.step`."""
    update = optax.with_extra_args_support(tx).update
    updates, opt_state = update(grads, state.opt_state, state.params, step=state.step)
    return optax.apply_updates(state.params, updates), opt_state


def _then(finish: Callable[[TrainState], TrainState], step: Step) -> Step:
    def whole(state, batch, key):
        new, metrics = step(state, batch, key)
        return finish(new), metrics

    return whole


def keep_if_finite(state: TrainState, new: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    """Returns the new state, or the old one if a loss or the new state is not finite.

    Losses are the metrics "loss" and "loss/...". A skipped step counts: `step`, the batches and
    the learning rate advance. Its metrics are (0, 0). The metric "skipped" is (1, 1) for a skipped
    step and (0, 1) for any other. A gradient that is not finite makes the new parameters not
    finite, so checking these is enough. `last_loss` starts at infinity and is not checked.
    """
    losses = [pair for name, pair in metrics.items() if is_loss(name)]
    checked = (losses, new.params, new.model_state, new.opt_state)
    finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(checked)]).all()
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    kept = kept.replace(step=new.step)  # the same in all runs
    metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0), metrics)
    skipped = jnp.where(finite, jnp.float32(0), jnp.float32(1))
    return kept, {**metrics, "skipped": (skipped, jnp.float32(1))}


def _dtype_note(dtype: jnp.dtype) -> str:
    """Returns the note that says where the compute dtype is used, and where float32."""
    if dtype == jnp.float32:
        return "dtype   float32"
    return (
        f"dtype   {dtype.name} in the layers of the model; float32 for parameters, gradients, "
        "optimizer, statistics of normalisation, logits and losses"
    )


def _num_values(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _long_warmups(
    optim: ml_collections.ConfigDict, to_steps: Callable[[str], int], total_steps: int
) -> list[str]:
    """Returns a note for each warm-up that does not end before the training does."""
    warmups = {"optim.warmup": optim.warmup}
    for group, settings in optim.groups.items():
        if "warmup" in settings:
            warmups[f"optim.groups.{group}.warmup"] = settings["warmup"]
    return [
        f"warmup  config.{key} is {to_steps(warmup):,} steps and the training {total_steps:,}: "
        "the learning rate never reaches its peak"
        for key, warmup in warmups.items()
        if to_steps(warmup) >= total_steps
    ]
