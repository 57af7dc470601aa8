"""The training state: all arrays that change in training."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """All that changes in training, arrays only: a checkpoint holds this state and nothing else.

    Attributes:
        step: () int32, number of training steps made.
        params: the parameters that the optimizer trains.
        model_state: the model's other collections, such as batch statistics.
        opt_state: the optimizer's state, with the averaged parameters where `optim.ema` > 0.
        last_loss: (m,) float32, the loss of each training example when it was last trained on;
            None unless `config.select` needs it.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    last_loss: jax.Array | None = None


# The axis of runs in a state of several runs; `step` has none, since all runs make the same step.
RUN_AXES = TrainState(step=None, params=0, model_state=0, opt_state=0, last_loss=0)


def init_state(
    params: Any, model_state: Any, tx: optax.GradientTransformation, last_loss_of: int = 0
) -> TrainState:
    """Returns the state before the first step; `last_loss_of` examples have a last loss."""
    last_loss = jnp.full(last_loss_of, jnp.inf) if last_loss_of else None
    return TrainState(jnp.int32(0), params, model_state, tx.init(params), last_loss)
