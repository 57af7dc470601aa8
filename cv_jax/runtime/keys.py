"""The PRNG streams of a run. The state holds no key: keys are derived from the seed and step."""

from typing import NamedTuple

import jax


class Keys(NamedTuple):
    """One PRNG key for each use of randomness: a change in one use leaves the others unchanged.

    Attributes:
        init: key of the initial parameters.
        order: key of each epoch's permutation and each example's coin (see `data.batches`).
        step: key of augmentation and the model's noise, by `fold_in(step, number of the step)`.
    """

    init: jax.Array
    order: jax.Array
    step: jax.Array


def derive_keys(seed: int) -> Keys:
    """Derives the keys of the run with this seed."""
    return Keys(*jax.random.split(jax.random.key(seed), len(Keys._fields)))
