"""Exact evaluation: every example counts once, whatever the batch size and the device count."""

import collections
import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from cv_jax.data import Dataset, Examples
from cv_jax.data.batches import padded_batches, streams
from cv_jax.data.dataset import example_shapes
from cv_jax.data.fields import num_examples, take
from cv_jax.learn.evaluations import Collected, Probe
from cv_jax.runtime.clock import SLOW_SECONDS, Clock
from cv_jax.runtime.mesh import batch_sharding, num_sharing, put, replicated
from cv_jax.runtime.processes import broadcast
from cv_jax.runtime.signals import (
    CutShort,
    answer_signals_during,
    call_in_thread,
    never,
    wait_for,
)
from cv_jax.workdir.numbers import means


def compute(
    function: Callable[[dict], Any], batches: Iterable[dict], stop: Callable[[], int] = never
) -> Iterator[Any]:
    """Yields function(batch) of each batch, when the devices have computed it.

    The next batch is dispatched before the host waits for one, so that the devices never wait. Only
    the first batch, and slow ones, are not followed by another: several processes look at a signal
    between two batches only.

    Raises:
        CutShort: `stop` asks to stop. It is asked before each batch, and while one is computed.
    """
    dispatched, ahead = collections.deque(), 0
    for batch in batches:
        if stop():
            raise CutShort
        dispatched.append(function(batch))
        while len(dispatched) > ahead:
            start = time.perf_counter()
            result = _wait(dispatched.popleft(), stop)
            ahead = int(time.perf_counter() - start < SLOW_SECONDS)
            yield result
    yield from (_wait(result, stop) for result in dispatched)


def _wait(result: Any, stop: Callable[[], int]) -> Any:
    return answer_signals_during(partial(jax.block_until_ready, result), stop)


def sum_batches(
    evaluate: Callable[[dict], dict], batches: Iterable[dict], stop: Callable[[], int] = never
) -> dict:
    """Adds up {metric: (sum, count)} over batches, on the host in float64; see `compute`."""
    fetched = [jax.device_get(sums) for sums in compute(evaluate, batches, stop)]
    return jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *fetched)


class Evaluator:
    """Evaluates splits in batches. Each function is compiled once for each shape of a batch.

    Args:
        evals: by name, see `programs.Programs`.
        own: keys and swept values of the runs.
        data: the splits.
        config: of the runs; `eval_batch_size` is rounded up to a multiple of the devices that
            share a batch. With `data.stream` batches go to the devices one at a time; else each
            split is copied there once.
        mesh: devices that share the batches.
        clock: counts "eval", and "compile" apart from it.
        stop: a StopRequest, which cuts evaluations short between batches and while they compile.
    """

    def __init__(
        self,
        evals: dict[str, Callable | Probe | Collected],
        own: Any,
        data: Dataset,
        config: ml_collections.ConfigDict,
        mesh: Mesh,
        clock: Clock,
        stop: Callable[[], int] = never,
    ):
        self._evals = evals
        self._own = own
        self._data = data
        self._batch_size = config.eval_batch_size
        self._streams = streams(config, data.train)
        self._mesh = mesh
        self._clock = clock
        self._stop = stop
        self._batches: dict[str, list[dict]] = {}
        self._programs: dict[tuple, Future] = {}
        self._fitted: tuple[str, int, Any] | None = None

    def compile(self, state: Any) -> None:
        """Begins to compile the evaluations, in threads, for states of these shapes.

        They are ready when the training first needs them. A Probe is compiled when it is used.

        Args:
            state: a state of all runs as ShapeDtypeStructs with shardings.
        """
        for name, split in (("watch", "val"), ("final", "test")):
            evaluation, examples = self._evals[name], getattr(self._data, split)
            if num_examples(examples) and not isinstance(evaluation, Probe):
                if isinstance(evaluation, Collected):
                    evaluation = evaluation.predict
                self._compiled(evaluation, state, self._batch_shapes(examples))

    def _batch_shapes(self, examples: Examples) -> dict:
        size = self._batch_size_of(examples)
        shapes = {**example_shapes(self._data.spec.fields, size), "rows": {}}
        shapes["rows"]["weight"] = jax.ShapeDtypeStruct((size,), jnp.float32)
        sharding = batch_sharding(self._mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )

    def watch(self, state: Any) -> dict[str, np.ndarray] | None:
        """Returns the means on val that are watched during training; None where it is cut short."""
        try:
            return means(self("watch", state, "val"))
        except CutShort:
            return None

    def final(self, state: Any) -> dict[str, dict] | None:
        """Returns the sums of the final evaluation, by split; None where it is cut short."""
        try:
            return {split: self("final", state, split) for split in ("val", "test")}
        except CutShort:
            return None

    def __call__(self, name: str, state: Any, split: str) -> dict:
        """Returns {metric: (sum, count)} of all runs, on the host; {} for an empty split.

        Raises:
            CutShort: a signal asks to stop.
        """
        examples = getattr(self._data, split)
        if not num_examples(examples):
            return {}
        with self._clock("eval"):
            evaluation = self._evals[name]
            if isinstance(evaluation, Collected):
                return self._collect(evaluation, state, split)
            if isinstance(evaluation, Probe):
                fitted = self._fit(name, evaluation, state)
                evaluate = partial(self._call, evaluation.score, state, fitted)
            else:
                evaluate = partial(self._call, evaluation, state)
            return sum_batches(evaluate, self._batches_of(split), self._stop)

    def _collect(self, evaluation: Collected, state: Any, split: str) -> dict:
        """Folds the predictions of each run on process 0; all processes return its numbers."""
        examples = getattr(self._data, split)
        num_runs = len(jax.tree.leaves(state.params)[0])
        folds = [evaluation.start() for _ in range(num_runs)]
        start = 0
        predict = partial(self._call, evaluation.predict, state)
        for predictions in compute(predict, self._batches_of(split), self._stop):
            predictions = jax.device_get(predictions)
            part = take(examples, slice(start, start + num_rows(predictions)))
            start += num_examples(part)
            if jax.process_index() == 0:
                for run in range(num_runs):
                    own = {k: x[run, : num_examples(part)] for k, x in predictions.items()}
                    folds[run] = evaluation.add(folds[run], own, part)
        numbers = None
        if jax.process_index() == 0:
            finished = [evaluation.finish(fold) for fold in folds]
            numbers = {name: [float(of_run[name]) for of_run in finished] for name in finished[0]}
        numbers = json.loads(broadcast(json.dumps(numbers)))
        return {name: (np.array(values), np.ones(num_runs)) for name, values in numbers.items()}

    def _fit(self, name: str, probe: Probe, state: Any) -> Any:
        """Returns what `probe` learns of train, once for all splits evaluated in this state."""
        step = int(state.step)
        if self._fitted is None or self._fitted[:2] != (name, step):
            self._fitted = None  # gives its memory back first
            train = self._data.train
            known = train.get("labelled", np.ones(num_examples(train), bool))
            labelled = take(train, np.flatnonzero(known)[: probe.limit])
            embed = partial(self._call, probe.embed, state)
            features = list(compute(embed, self._lay_out(labelled), self._stop))
            features = jnp.concatenate(features, axis=1)[:, : num_examples(labelled)]
            self._fitted = name, step, self._call(probe.fit, features, labelled["label"])
        return self._fitted[2]

    def _batches_of(self, split: str) -> Iterable[dict]:
        if self._streams:
            return self._lay_out(getattr(self._data, split))
        if split not in self._batches:
            self._batches[split] = list(self._lay_out(getattr(self._data, split)))
        return self._batches[split]

    def _lay_out(self, examples: Examples) -> Iterator[dict]:
        batch_size = self._batch_size_of(examples)
        for batch in padded_batches(examples, self._data.spec.fields, batch_size):
            yield put(batch, batch_sharding(self._mesh))

    def _batch_size_of(self, examples: Examples) -> int:
        sharing = num_sharing(self._mesh)
        return -(-min(self._batch_size, num_examples(examples)) // sharing) * sharing

    def _call(self, function: Callable, *args: Any) -> Any:
        """Returns function(own, *args), compiled when arguments of new shapes or dtypes come."""
        coming = self._compiled(function, *args)
        if not coming.done():
            with self._clock("compile"):
                wait_for(coming, self._stop, "compiling the evaluation")
        return coming.result()(self._own, *args)

    def _compiled(self, function: Callable, *args: Any) -> Future:
        """Returns the program for arguments of these shapes, which a thread begins to compile."""
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple((x.shape, x.dtype) for x in leaves)
        program = (function, structure, shapes)  # splits with batches of one shape share it
        if program not in self._programs:
            jitted = jax.jit(function, out_shardings=replicated(self._mesh))
            self._programs[program] = call_in_thread(
                lambda: jitted.lower(self._own, *args).compile()
            )
        return self._programs[program]


def num_rows(predictions: dict) -> int:
    """Returns the rows of predictions (r, b, ...) of r runs."""
    return next(iter(predictions.values())).shape[1]
