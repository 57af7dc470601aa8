"""Sweeps: the values of config leaves in which the runs of one program differ.

A swept leaf is a number, or a text of `config.calls` whose values differ in numbers, such as
"rotate(5)" and "rotate(10)". The numbers become arrays. While a task's functions are traced, its
config holds these arrays in place of the leaf.
"""

import functools
import itertools
from operator import getitem
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from cv_jax.config.base import flatten
from cv_jax.config.calls import parse
from cv_jax.config.errors import UserError, nearest

# Prefixes of the leaves that are read outside the training step: all runs of a program share them.
_SHARED = (
    "data.",
    "mesh.",
    "seed",
    "num_seeds",
    "sweep",
    "task",
    "init_",
    "epochs",
    "steps",
    "batch_size",
    "accumulate",
    "eval_batch_size",
    "log_every",
    "eval_every",
    "patience",
    "checkpoint_every",
    "histograms_every",
    "keep_checkpoints",
)


class Leaf(NamedTuple):
    """The v values of one swept config leaf, split into parts.

    Attributes:
        values: the values as written in the config.
        structure: pytree structure, equal for all values.
        parts: leaves of a value, in the order of `structure`; None where the values differ.
        numbers: for each part that differs, its number in each value, (v,) float32 or int32.
    """

    values: tuple[Any, ...]
    structure: Any
    parts: tuple[Any, ...]
    numbers: list[np.ndarray]


class Sweep(NamedTuple):
    """The grid of all values of all swept leaves.

    Attributes:
        leaves: {config key: Leaf}.
        settings: points of the grid, {config key: value}; the last key changes fastest. Without
            a swept leaf, the grid is one point without keys.
    """

    leaves: dict[str, Leaf]
    settings: list[dict[str, Any]]

    @property
    def values(self) -> dict[str, list[np.ndarray]]:
        """Returns each leaf's numbers at all points of the grid: {config key: [(points,), ...]}."""
        positions = itertools.product(*(range(len(leaf.values)) for leaf in self.leaves.values()))
        columns = zip(*positions, strict=True) if self.leaves else ()
        return {
            key: [numbers[list(column)] for numbers in leaf.numbers]
            for (key, leaf), column in zip(self.leaves.items(), columns, strict=True)
        }

    def apply(
        self, config: ml_collections.ConfigDict, values: dict[str, list[Any]]
    ) -> ml_collections.ConfigDict:
        """Returns the config with these numbers, usually arrays, in the swept leaves."""
        put = {}
        for key, numbers in values.items():
            numbers = iter(numbers)
            leaf = self.leaves[key]
            parts = [next(numbers) if part is None else part for part in leaf.parts]
            put[key] = jax.tree.unflatten(leaf.structure, parts)
        return with_values(config, put)


def with_values(
    config: ml_collections.ConfigDict, values: dict[str, Any]
) -> ml_collections.ConfigDict:
    """Returns a copy of the config with these leaves, of any type."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked(), copy.ignore_type():
        for key, value in values.items():
            *parents, last = key.split(".")
            functools.reduce(getitem, parents, copy)[last] = value
    return copy


def make_sweep(config: ml_collections.ConfigDict) -> Sweep:
    """Reads `config.sweep`, pairs of a key and its values.

    Raises:
        UserError: an unknown key, a leaf that cannot be swept, or values that differ in more than
            numbers.
    """
    leaves = {key: _take_apart(key, values, config) for key, values in config.sweep}
    points = itertools.product(*(leaf.values for leaf in leaves.values()))
    return Sweep(leaves, [dict(zip(leaves, point, strict=True)) for point in points])


def _take_apart(key: str, values: Any, config: ml_collections.ConfigDict) -> Leaf:
    known = flatten(config)
    if key not in known:
        raise UserError(f"config.sweep: config has no key {key!r}.{nearest(key, known)}")
    if key.startswith(_SHARED):
        raise refusal(key, "all runs of a program share it")
    if not isinstance(values, tuple | list) or len(values) < 2:
        raise UserError(f"config.sweep.{key}={values!r}: give two or more values: (0.1, 0.2).")
    try:
        taken = [jax.tree.flatten(parse(v) if isinstance(v, str) else v) for v in values]
    except (UserError, ValueError) as error:  # ValueError: dict keys that cannot be sorted
        raise refusal(key, str(error)) from error
    structure = taken[0][1]
    if any(other != structure for _, other in taken):
        raise refusal(key, "its values differ in more than numbers")
    parts, numbers = [], []
    for column in zip(*(leaves for leaves, _ in taken), strict=True):
        if all(part == column[0] for part in column):
            parts.append(column[0])
            continue
        if not all(isinstance(part, int | float) and not isinstance(part, bool) for part in column):
            raise refusal(key, f"{column[0]!r} is not a number")
        whole = all(isinstance(part, int) for part in column)
        if whole and any(abs(part) >= 2**31 for part in column):
            raise refusal(key, f"{max(column, key=abs)} does not fit into 32 bits")
        parts.append(None)
        numbers.append(np.array(column, np.int32 if whole else np.float32))
    if not numbers:
        raise UserError(
            f"config.sweep.{key}={values!r}: all values are equal; give different ones."
        )
    return Leaf(tuple(values), structure, tuple(parts), numbers)


def refusal(key: str, reason: str) -> UserError:
    """Returns the error of a leaf that cannot be swept."""
    return UserError(
        f"config.{key} cannot be swept: {reason}. Run train.py once for each value and compare "
        "the runs with python -m cv_jax.tools.compare."
    )


def num_runs(config: ml_collections.ConfigDict) -> int:
    """Returns the number of runs: sweep settings times seeds."""
    return len(make_sweep(config).settings) * config.num_seeds


def run_values(config: ml_collections.ConfigDict, sweep: Sweep) -> list[dict[str, Any]]:
    """Returns the swept values and seed of each run, such as {"optim.lr": 0.1, "seed": 3}."""
    seeds = range(config.seed, config.seed + config.num_seeds)
    return [{**setting, "seed": seed} for setting in sweep.settings for seed in seeds]


def run_names(config: ml_collections.ConfigDict, sweep: Sweep) -> list[str]:
    """Returns the name of each run, such as "optim.lr=0.1 seed=3"."""
    return [run_name(values) for values in run_values(config, sweep)]


def run_name(values: dict[str, Any]) -> str:
    """Returns the name of the run with these values, see `run_values`."""
    return " ".join(f"{key}={value}" for key, value in values.items())
