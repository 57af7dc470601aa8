"""Tries the values of a sweep before anything is compiled."""

import jax
import ml_collections

from cv_jax.config.errors import UserError
from cv_jax.config.rules import check
from cv_jax.config.sweep import Sweep, refusal, with_values
from cv_jax.data import DataSpec
from cv_jax.tasks import build_task


def check_sweep(
    sweep: Sweep, config: ml_collections.ConfigDict, spec: DataSpec, batch: dict
) -> None:
    """Tries each swept leaf: by each value, and as an array in the training step.

    Args:
        batch: of training, as ShapeDtypeStructs.

    Raises:
        UserError: a value that is wrong, or a leaf that a program cannot have as an array.
    """
    if sweep.leaves and not spec.num_val:
        raise UserError(
            "config.sweep chooses the best setting on val: hold images out with "
            "config.data.num_val."
        )
    for key, leaf in sweep.leaves.items():
        for value in leaf.values:
            one = with_values(config, {key: value})
            check(one)
            build_task(one, spec)
        _try(key, sweep, config, spec, batch)


def _try(key, sweep, config, spec, batch):
    def program(numbers, batch):
        task = build_task(sweep.apply(config, {key: numbers}), spec)
        state = task.init(jax.random.key(0))
        return task.train_step(state, batch, jax.random.key(0))

    numbers = [numbers[0] for numbers in sweep.leaves[key].numbers]
    try:
        jax.eval_shape(program, numbers, batch)
    except (TypeError, UserError) as error:  # its values by themselves are right
        raise refusal(key, "it decides what the program is, not only a number in it") from error
