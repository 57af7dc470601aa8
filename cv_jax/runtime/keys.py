"""The random streams of a run. Nothing random is kept in a state: keys are derived when needed."""

from typing import NamedTuple

import jax


class Keys(NamedTuple):
    """One key for each use of randomness, so that a change in one leaves the others as they were.

    Attributes:
        init: initial parameters.
        order: the permutation of each epoch, and each example's coin (see `data.batches`).
        step: augmentation and the model's own noise; `fold_in(step, number of the step)`.
    """

    init: jax.Array
    order: jax.Array
    step: jax.Array


def derive_keys(seed: int) -> Keys:
    """Derives the streams of the run with this seed."""
    return Keys(*jax.random.split(jax.random.key(seed), len(Keys._fields)))
