"""Selections: the examples of a batch that a step trains on.

A selection is a function (batch, last_loss) -> batch of fewer examples. last_loss (m,) holds the
loss that each example of train had when it was last trained on, and infinity before; `index` of the
batch's rows finds it. `config.select` names a selection; "" is all examples. A new selection is a
function and a line of SELECTIONS.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cv_jax.config.calls import build_one
from cv_jax.config.errors import UserError

Select = Callable[[dict, jax.Array], dict]


def make_select(text: str) -> Select | None:
    """Builds the selection that a spec such as "hardest(10, of=16)" names; None for ""."""
    return build_one(text, SELECTIONS, "config.select") if text.strip() else None


def hardest(keep: int, *, of: int) -> Select:
    """Keeps, of every `of` successive examples of a batch, the `keep` with the highest last loss.

    The losses cost nothing: each is from the step that last trained on its example. Skipped
    examples keep their old loss and are picked again once the others' losses drop below it. Groups
    make the choice independent of the number of devices that share a batch. If the groups do not
    divide evenly over the devices, some devices train on more examples than others.

    After A. Jiang et al., "Accelerating Deep Learning by Focusing on the Biggest Losers",
    https://arxiv.org/abs/1910.00762, who compute the losses again.
    """
    if not 0 < keep <= of:
        raise ValueError(f"keep={keep} must be from 1 to of={of}")

    def select(batch: dict, last_loss: jax.Array) -> dict:
        index = batch["rows"]["index"]
        size = len(index)
        if size % of:
            raise UserError(
                f"config.batch_size={size} must be a multiple of {of} for "
                f"config.select='hardest({keep}, of={of})'."
            )
        losses = last_loss[index].reshape(-1, of)
        chosen = jnp.sort(jax.lax.top_k(losses, keep)[1], axis=1)  # in the order of the batch

        def take(x):
            groups = x.reshape(-1, of, *x.shape[1:])
            return jax.vmap(lambda group, i: group[i])(groups, chosen).reshape(-1, *x.shape[1:])

        return jax.tree.map(take, batch)

    return select


SELECTIONS = {"hardest": hardest}
