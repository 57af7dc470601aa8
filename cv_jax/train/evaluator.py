"""Exact evaluation: every example counts once, whatever the batch size and the device count."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cv_jax.data import Dataset, Split
from cv_jax.data.batches import padded_batches
from cv_jax.learn.evaluations import Probe
from cv_jax.runtime.clock import Clock
from cv_jax.runtime.mesh import (
    batch_sharding,
    num_sharing,
    put,
    replicated,
)


def sum_batches(evaluate: Callable[[dict], dict], batches: Iterable[dict]) -> dict:
    """Adds up {metric: (sum, count)} over batches, on the host in float64.

    A dispatch for each, so that a signal waits for two batches at most: one is computed while the
    numbers of the one before are fetched.
    """
    fetched, dispatched = [], None
    for batch in batches:
        before, dispatched = dispatched, evaluate(batch)
        if before is not None:
            fetched.append(jax.device_get(before))
    fetched.append(jax.device_get(dispatched))
    return jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *fetched)


class Evaluator:
    """Evaluates splits; each goes to the devices once, and each program is compiled once.

    Args:
        evals: by name, see `programs.Programs`.
        own: of the runs.
        data: its attributes are the splits.
        batch_size: examples at a time, rounded up to a multiple of the devices that share them.
        mesh: where.
        clock: counts "eval", and "compile" apart from it.
    """

    def __init__(
        self,
        evals: dict[str, Callable | Probe],
        own: Any,
        data: Dataset,
        batch_size: int,
        mesh: Mesh,
        clock: Clock,
    ):
        self._evals = evals
        self._own = own
        self._data = data
        self._batch_size = batch_size
        self._mesh = mesh
        self._clock = clock
        self._batches: dict[str, list[dict]] = {}
        self._programs: dict[tuple, Callable] = {}
        self._fitted: tuple[str, int, Any] | None = None

    def __call__(self, name: str, state: Any, split: str) -> dict:
        """Returns {metric: (sum, count)} of all runs, on the host; {} for an empty split."""
        arrays = getattr(self._data, split)
        if not len(arrays.label):
            return {}
        with self._clock("eval"):
            evaluation = self._evals[name]
            if isinstance(evaluation, Probe):
                fitted = self._fit(name, evaluation, state)
                evaluate = partial(self._call, evaluation.score, state, fitted)
            else:
                evaluate = partial(self._call, evaluation, state)
            if split not in self._batches:
                self._batches[split] = self._lay_out(arrays)
            return sum_batches(evaluate, self._batches[split])

    def _fit(self, name: str, probe: Probe, state: Any) -> Any:
        """What `probe` learns of train, once for all splits that are evaluated in this state."""
        step = int(state.step)
        if self._fitted is None or self._fitted[:2] != (name, step):
            self._fitted = None  # gives its memory back first
            image, label = self._data.train
            labelled = np.flatnonzero(label >= 0)[: probe.limit]
            batches = self._lay_out(Split(image[labelled], label[labelled]))
            features = [self._call(probe.embed, state, batch) for batch in batches]
            features = jnp.concatenate(features, axis=1)[:, : len(labelled)]
            self._fitted = name, step, self._call(probe.fit, features, label[labelled])
        return self._fitted[2]

    def _lay_out(self, split: Split) -> list[dict]:
        sharing = num_sharing(self._mesh)
        batch_size = min(self._batch_size, len(split.label))
        batch_size = -(-batch_size // sharing) * sharing
        return put(padded_batches(split, batch_size), batch_sharding(self._mesh))

    def _call(self, function: Callable, *args: Any) -> Any:
        """Returns function(own, *args), compiled when arguments of new shapes or dtypes come."""
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple((x.shape, x.dtype) for x in leaves)
        program = (function, structure, shapes)  # splits with batches of one shape share it
        if program not in self._programs:
            with self._clock("compile"):
                jitted = jax.jit(function, out_shardings=replicated(self._mesh))
                self._programs[program] = jitted.lower(self._own, *args).compile()
        return self._programs[program](self._own, *args)
