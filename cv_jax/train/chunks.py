"""Many steps in one dispatch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from cv_jax.config.plan import MAX_STEPS
from cv_jax.data.batches import Batches
from cv_jax.runtime.mesh import replicated


def make_train_chunk(train_step: Callable, batches: Batches) -> Callable:
    """Builds the function that makes many steps in one dispatch.

    Returns:
        train_chunk(state, feed, key, num_steps) -> (state, metrics), of one run. The number of
        steps is an argument and not a shape: one compiled program serves every chunk. Metrics are
        (sum, count) pairs of arrays whose row i belongs to the i-th step.
    """

    train_step = jax.jit(train_step)  # so that it is traced once, for its shapes and for the loop

    def train_chunk(state, feed, key, num_steps):
        def next_step(state):
            batch = batches.pick(feed, state.step)
            return train_step(state, batch, jax.random.fold_in(key, state.step))

        def one_step(i, carry):
            state, rows = carry
            state, metrics = next_step(state)
            return state, jax.tree.map(lambda row, value: row.at[i].set(value), rows, metrics)

        _, shapes = jax.eval_shape(next_step, state)
        rows = jax.tree.map(lambda x: jnp.zeros((MAX_STEPS, *x.shape), x.dtype), shapes)
        return jax.lax.fori_loop(0, num_steps, one_step, (state, rows))

    return train_chunk


def lower_train_chunk(
    train_chunk: Callable, own: Any, state: Any, feed: Any, mesh: Mesh
) -> Lowered:
    """Lowers one of `programs.Programs.train_chunks`, for arguments of these shapes alone.

    The state, of which the shapes are enough, stays laid out as it is; every device knows the
    metrics.
    """
    layout = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(train_chunk, donate_argnums=1, out_shardings=(layout, replicated(mesh)))
    return jitted.lower(own, state, feed, np.int32(1))
