"""Computes the gradient of a batch, whole or in microbatches, which need less memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cv_jax.config.errors import UserError
from cv_jax.learn.losses import Loss

# (params, model_state, batch, key) -> (gradient of the mean loss, Loss, (model_state, metrics))
Gradient = Callable[[Any, Any, dict, jax.Array], tuple[Any, Loss, tuple[Any, dict]]]


def make_gradient(loss: Callable[..., tuple[Loss, tuple[Any, dict]]], accumulate: int) -> Gradient:
    """Returns the function that computes the gradient of sum / count over a batch.

    Args:
        loss: (params, model_state, batch, key) -> (Loss, (model_state, {metric: (sum, count)})).
            The count must not depend on the parameters.
        accumulate: the number of microbatches, see `accumulated_gradient`; 1: the batch is whole.
    """
    if accumulate > 1:
        return accumulated_gradient(loss, accumulate)

    def gradient(params, model_state, batch, key):
        def mean_loss(params):
            found, aux = loss(params, model_state, batch, key)
            return found.mean(), (found, aux)

        grads, (found, aux) = jax.grad(mean_loss, has_aux=True)(params)
        return grads, found, aux

    return gradient


def accumulated_gradient(
    loss: Callable[..., tuple[Loss, tuple[Any, dict]]], accumulate: int
) -> Gradient:
    """Returns the function that computes the gradient one microbatch after the other.

        gradient = sum_i d total_i / d params / sum_i count_i

    This is the gradient of the whole batch if the loss of an example depends on that example alone.
    With batch normalisation, each microbatch is normalised by itself and moves the averages:
    microbatch i + 1 begins with the `model_state` of microbatch i. Microbatch i has the key
    `fold_in(key, i)`, so dropout draws other numbers than for the whole batch.

    Args:
        loss: see `make_gradient`.
        accumulate: the number of microbatches.
    """

    def gradient(params, model_state, batch, key):
        def add(carry, microbatch):
            grads, model_state = carry
            i, rows = microbatch

            def total_loss(params):
                found, aux = loss(params, model_state, rows, jax.random.fold_in(key, i))
                return found.total, (found, aux)

            more, (found, (model_state, metrics)) = jax.grad(total_loss, has_aux=True)(params)
            return (jax.tree.map(jnp.add, grads, more), model_state), (found, metrics)

        parts = jax.tree.map(lambda x: cut(x, accumulate), batch)
        start = jax.tree.map(jnp.zeros_like, params), model_state
        numbered = jnp.arange(accumulate), parts
        (grads, model_state), (found, metrics) = jax.lax.scan(add, start, numbered)
        each = None if found.each is None else join(found.each)
        found = Loss(found.total.sum(), found.count.sum(), each)
        count = jnp.where(found.count > 0, found.count, 1)
        grads = jax.tree.map(lambda grad: grad / count, grads)
        return grads, found, (model_state, jax.tree.map(lambda x: x.sum(0), metrics))

    return gradient


def cut(x: jax.Array, accumulate: int) -> jax.Array:
    """Cuts an array (b, ...) into microbatches (accumulate, b / accumulate, ...).

    Microbatch i has the rows i, i + accumulate, ... A device has successive rows of the batch, so
    that each device has an equal share of every microbatch and no row moves between devices.

    Raises:
        UserError: `accumulate` does not divide b.
    """
    b, *shape = x.shape
    if b % accumulate:
        raise UserError(
            f"config.accumulate={accumulate} does not divide the {b} examples that a step trains "
            f"on: set a divisor of {b}, or another config.batch_size."
        )
    return x.reshape(b // accumulate, accumulate, *shape).swapaxes(0, 1)


def join(parts: jax.Array) -> jax.Array:
    """Joins microbatches into the batch (b, ...): the inverse of `cut`."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])
