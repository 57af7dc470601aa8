"""Several trainings in one program: seeds, and the settings of a sweep.

A run is one seed in one setting. All that differs between runs are arrays with a leading axis over
them; a task, the batches and the loop are written for one run, and `Runs` maps them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from cv_jax.config.sweep import Sweep, make_sweep, run_names
from cv_jax.optim.state import RUN_AXES, TrainState
from cv_jax.runtime.keys import Keys, derive_keys
from cv_jax.runtime.mesh import (
    check_batch_size,
    make_mesh,
    parameter_sharding,
    put,
    replicated,
    run_sharding,
)


class Own(NamedTuple):
    """What each run has of its own beside its state, with the axis of runs.

    Attributes:
        keys: its random streams.
        values: the swept numbers, see `sweep.Sweep`; none where nothing is swept.
    """

    keys: Keys
    values: dict[str, list[jax.Array]]


class Runs(NamedTuple):
    """The runs of a program, and how functions of one run are mapped over them.

    Attributes:
        names: of each.
        own: of each.
        mode: how a device treats the runs that are its: "batched", all at once by jax.vmap, or
            "in_turn", one after the other, each in the arithmetic of a single run.
        mesh: its axis "seed" divides the number of runs.
        sweep: the settings in which the runs differ.
    """

    names: list[str]
    own: Own
    mode: str
    mesh: Mesh
    sweep: Sweep

    def __call__(
        self, function: Callable, in_axes: Any, out_axes: Any, replaces: int | None = None
    ) -> Callable:
        """The function of all runs.

        Args:
            function: of one run.
            in_axes, out_axes: as for jax.vmap, of 0 and None.
            replaces: the argument that the first output takes the place of, memory included.
        """
        sides = self.mesh.shape["seed"]
        local = len(self.names) // sides
        if local == 1:
            mapped = _alone(function, in_axes, out_axes)
        elif self.mode == "batched":
            mapped = jax.vmap(function, in_axes, out_axes)
        else:
            mapped = _in_turn(function, in_axes, out_axes, replaces, local)
        if sides == 1:
            return mapped
        return jax.shard_map(
            mapped,
            mesh=self.mesh,
            in_specs=_specs(in_axes),
            out_specs=_specs(out_axes),
            axis_names={"seed"},
            check_vma=False,
        )

    def state_sharding(self, state: TrainState) -> TrainState:
        """The layout of a state of all runs, of which only the shapes are looked at."""
        shared, own = replicated(self.mesh), run_sharding(self.mesh)

        def divided(x):
            return parameter_sharding(self.mesh, x.shape)

        layout = _map_axes(lambda axis: shared if axis is None else own, RUN_AXES)
        return layout.replace(
            params=jax.tree.map(divided, state.params),
            opt_state=jax.tree.map(divided, state.opt_state),
        )

    @property
    def notes(self) -> list[str]:
        """Lines that the log shows at the start."""
        if len(self.names) == 1:
            return []
        sides = self.mesh.shape["seed"]
        each = f", each {len(self.names) // sides} {self.mode}" if len(self.names) > sides else ""
        where = f"over {sides} devices{each}" if sides > 1 else self.mode
        return [f"runs    {len(self.names)}: {self.names[0]} ... {self.names[-1]}; {where}"]


def make_runs(config: ml_collections.ConfigDict) -> Runs:
    """Returns the runs of each setting with each seed: (setting 0, seed 0), (0, 1), ..., (1, 0).

    Raises:
        UserError: the swept values, the number of runs or the batch size do not fit the devices.
    """
    sweep = make_sweep(config)
    seeds = range(config.seed, config.seed + config.num_seeds)
    names = run_names(config, sweep)
    mesh = make_mesh(len(names), config.mesh)
    check_batch_size(config.batch_size, mesh, config.accumulate)
    keys = jax.tree.map(lambda *keys: jnp.stack(keys), *map(derive_keys, seeds))
    keys = jax.tree.map(lambda keys: jnp.tile(keys, len(sweep.settings)), keys)
    values = jax.tree.map(lambda x: np.repeat(x, len(seeds)), sweep.values)
    own = put(Own(keys, values), run_sharding(mesh))
    mode = config.seeds.mode
    if mode == "auto":
        mode = "in_turn" if jax.default_backend() == "cpu" else "batched"
    return Runs(names, own, mode, mesh, sweep)


def _alone(function, in_axes, out_axes):
    def mapped(*args):
        out = function(*take_run(args, in_axes, 0))
        return _by_axis(lambda x: x[None], lambda x: x, out_axes, out)

    return mapped


def _in_turn(function, in_axes, out_axes, replaces, count):
    function = jax.jit(function)  # so that it is traced once, for its shapes and for the loop

    def mapped(*args):
        def one(i, args):
            return function(*take_run(args, in_axes, i))

        shapes = jax.eval_shape(one, 0, args)
        out = _by_axis(
            lambda x: jnp.zeros((count, *x.shape), x.dtype),
            lambda x: jnp.zeros(x.shape, x.dtype),
            out_axes,
            shapes,
        )
        if replaces is not None:
            out = (args[replaces], *out[1:])

        def body(i, out):
            given = list(args)
            if replaces is not None:  # what all runs share is read as it was before the first
                given[replaces] = _by_axis(
                    lambda old, new: new,
                    lambda old, new: old,
                    in_axes[replaces],
                    args[replaces],
                    out[0],
                )
            new = one(i, tuple(given))
            return _by_axis(lambda rows, x: rows.at[i].set(x), lambda _, x: x, out_axes, out, new)

        return jax.lax.fori_loop(0, count, body, out)

    return mapped


def take_run(trees: Any, axes: Any, i: Any) -> Any:
    """What is run i's of trees with these axes."""
    return _by_axis(lambda x: x[i], lambda x: x, axes, trees)


def _by_axis(mapped: Callable, shared: Callable, axes: Any, *trees: Any) -> Any:
    """Applies `mapped` to the leaves of trees that have an axis of runs, `shared` to the others."""

    def apply(axis, *subtrees):
        return jax.tree.map(shared if axis is None else mapped, *subtrees)

    return jax.tree.map(apply, axes, *trees, is_leaf=lambda axis: axis is None)


def _specs(axes):
    return _map_axes(lambda axis: PartitionSpec() if axis is None else PartitionSpec("seed"), axes)


def _map_axes(f: Callable, axes: Any) -> Any:
    return jax.tree.map(f, axes, is_leaf=lambda axis: axis is None)
