"""Selections: which examples of a batch a step trains on.

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
    """Of every `of` successive examples of a batch, the `keep` whose last loss was highest.

    The losses cost nothing, as each is from the step that last trained on its example. What is left
    out keeps its loss of then, so that it is back as soon as the others' have fallen below. The
    groups make the choice independent of the number of devices that share a batch; where they do
    not divide over the devices evenly, a device trains on more than its share.

    After A. Jiang et al., "Accelerating Deep Learning by Focusing on the Biggest Losers",
    https://arxiv.org/abs/1910.00762, who compute the losses anew.
    """
    if not 0 < keep <= of:
        raise ValueError(f"{keep} of {of} cannot be kept")

    def select(batch: dict, last_loss: jax.Array) -> dict:
        index = batch["rows"]["index"]
        size = len(index)
        if size % of:
            raise UserError(
                f"config.select='hardest({keep}, of={of})' needs a config.batch_size that is a "
                f"multiple of {of}, not {size}."
            )
        losses = last_loss[index].reshape(-1, of)
        chosen = jnp.sort(jax.lax.top_k(losses, keep)[1], axis=1)  # in the order of the batch

        def take(x):
            groups = x.reshape(-1, of, *x.shape[1:])
            return jax.vmap(lambda group, i: group[i])(groups, chosen).reshape(-1, *x.shape[1:])

        return jax.tree.map(take, batch)

    return select


SELECTIONS = {"hardest": hardest}
