"""The training state, and the one function that turns it into the next."""

from bisect import bisect_right
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from cv_jax.optim.selection import Select
from cv_jax.optim.state import TrainState


def make_train_step(
    forward: Callable, tx: optax.GradientTransformation, select: Select | None = None
) -> Callable:
    """Builds `train_step(state, batch, key) -> (state, metrics)`, pure and without device axes.

    Args:
        forward: (params, model_state, batch, key) -> (losses (b,), (model_state, metrics)), where
            metrics are (sum, count) pairs. The gradient is that of the mean loss over the batch.
        tx: the optimizer.
        select: which examples of the batch to train on; None: all.
    """

    def train_step(state: TrainState, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        if select:
            batch = select(batch, state.last_loss)

        def mean_loss(params):
            losses, aux = forward(params, state.model_state, batch, key)
            return losses.mean(), (losses, aux)

        grads, (losses, aux) = jax.grad(mean_loss, has_aux=True)(state.params)
        model_state, metrics = aux
        updates, opt_state = tx.update(grads, state.opt_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)
        last_loss = state.last_loss.at[batch["index"]].set(losses) if select else None
        return TrainState(state.step + 1, params, model_state, opt_state, last_loss), metrics

    return train_step


def in_stages(starts: Sequence[int], train_steps: Sequence[Callable]) -> Callable:
    """One train_step made of several: the i-th takes the steps from starts[i] on; starts[0] is 0.

    All are compiled into one program, which looks at `state.step`. Where that is a Python int, only
    the train_step of its stage is traced.
    """

    def train_step(state: TrainState, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        if isinstance(state.step, int):
            return train_steps[bisect_right(starts, state.step) - 1](state, batch, key)
        stage = jnp.searchsorted(jnp.array(starts), state.step, side="right") - 1
        return jax.lax.switch(stage, train_steps, state, batch, key)

    return train_step


def skip_nonfinite(train_step: Callable) -> Callable:
    """The train_step without those steps whose loss or new state is not finite.

    Such a step leaves the state as it was, but counts: `step` goes up, so that the batches and the
    learning rate go on. Its metrics are (0, 0); the metric "skipped" is (1, 1) for it, and (0, 1)
    for all others. A gradient that is not finite makes what it trains so. `last_loss`, infinite at
    the start, follows from the losses.
    """

    def guarded(state: TrainState, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        new, metrics = train_step(state, batch, key)
        looked_at = (metrics["loss"], new.params, new.model_state, new.opt_state)
        finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(looked_at)]).all()
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        state = state.replace(step=new.step)  # the same in all runs
        metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0), metrics)
        skipped = jnp.where(finite, jnp.float32(0), jnp.float32(1))
        return state, {**metrics, "skipped": (skipped, jnp.float32(1))}

    return guarded
