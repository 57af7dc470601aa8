"""The loop's parts: which steps run in one dispatch, the dispatch, and the clock."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from cv_jax import durations
from cv_jax.data.batches import Batches
from cv_jax.mesh import replicated
from cv_jax.processes import Largest

# The most steps in a dispatch; their metrics are kept step by step, so it bounds that memory too.
MAX_STEPS = 512
# How long a dispatch should take: a person, or a signal, waits no longer for the next sign of life.
SECONDS_PER_CHUNK = 0.5


class Intervals(NamedTuple):
    """The length of the training and how often what happens, in steps; 0 is never."""

    total: int
    log: int
    eval: int
    save: int
    histograms: int = 0


def make_intervals(config: ml_collections.ConfigDict, num_train: int, num_val: int) -> Intervals:
    """Converts the durations of the config to steps; without val there is nothing to evaluate."""

    def steps(duration):
        return durations.steps(duration, config.batch_size, num_train)

    return Intervals(
        total=durations.total_steps(config, num_train),
        log=steps(config.log_every),
        eval=steps(config.eval_every) if num_val else 0,
        save=steps(config.checkpoint_every),
        histograms=steps(config.histograms_every),
    )


class Chunk(NamedTuple):
    """The steps from `start` up to `end`, run in one dispatch, and what is due after them."""

    start: int
    end: int
    logs: bool
    evals: bool
    saves: bool
    histograms: bool = False

    @property
    def num_steps(self) -> int:
        return self.end - self.start


def plan_chunks(
    start: int, intervals: Intervals, limit: Callable[[int], int], pace: Callable[[], int]
) -> Iterator[Chunk]:
    """Yields chunks from step `start` to the end, each up to the next thing that is due.

    Args:
        start: steps already made.
        intervals: what is due when; the end logs and saves in any case.
        limit: step -> the most steps that the batches allow from there on.
        pace: () -> the steps that make a dispatch of pleasant length.
    """
    total = intervals.total
    while start < total:
        dues = [every - start % every for every in intervals[1:] if every]
        end = start + min(total - start, *dues, limit(start), pace(), MAX_STEPS)
        yield Chunk(
            start,
            end,
            logs=end == total or durations.due(end, intervals.log),
            evals=durations.due(end, intervals.eval),
            saves=end == total or durations.due(end, intervals.save),
            histograms=durations.due(end, intervals.histograms),
        )
        start = end


def make_train_chunk(train_step: Callable, batches: Batches) -> Callable:
    """Builds the function that makes many steps in one dispatch.

    Returns:
        train_chunk(state, feed, key, num_steps) -> (state, metrics), of one run. The number of
        steps is an argument and not a shape: one compiled program serves every chunk. Metrics are
        (sum, count) pairs of arrays whose row i belongs to the i-th step.
    """

    train_step = jax.jit(train_step)  # so that it is traced once, for its shapes and for the loop

    def train_chunk(state, feed, key, num_steps):
        def one_step(i, carry):
            state, rows = carry
            batch = batches.pick(feed, state.step)
            state, metrics = train_step(state, batch, jax.random.fold_in(key, state.step))
            return state, jax.tree.map(lambda row, value: row.at[i].set(value), rows, metrics)

        _, shapes = jax.eval_shape(train_step, state, batches.shapes, key)
        rows = jax.tree.map(lambda x: jnp.zeros((MAX_STEPS, *x.shape), x.dtype), shapes)
        return jax.lax.fori_loop(0, num_steps, one_step, (state, rows))

    return train_chunk


def compile_train_chunk(
    train_chunk: Callable, own: Any, state: Any, batches: Batches, mesh: Mesh, clock: "Clock"
) -> Callable:
    """`programs.Programs.train_chunk` compiled: another shape is an error, not a retrace.

    The state stays laid out as it is; every device knows the metrics.
    """
    with clock("compile"):
        feed = batches.feed(int(state.step), 1)
        layout = jax.tree.map(lambda x: x.sharding, state)
        jitted = jax.jit(train_chunk, donate_argnums=1, out_shardings=(layout, replicated(mesh)))
        return jitted.lower(own, state, feed, np.int32(1)).compile()


# What each clock of a run counts. The public rule for the time to an accuracy is the sum of init,
# train and eval, of a run without images held out.
CLOCKS = {
    "data": "reading and decoding the data set",
    "compile": "tracing and compiling, and drawing the initial parameters",
    "init": "building the task, with the parameters that it takes from images (whitening)",
    "train": "training steps, from the first on, with all that the host does between them",
    "eval": "evaluation: on val during the training, and the final one with its views",
    "save": "waiting for checkpoints, not writing them in the background",
}


class Clock:
    """Wall-clock seconds of a run by what they were spent on, see CLOCKS.

    Only one thing runs at a time: while another one does, "train" stands still.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(CLOCKS, 0.0)
        self._running: list[str] = []
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the body's time for `name`, and for nothing else."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def add(self, seconds: dict[str, float]) -> None:
        """Adds what an earlier start of the same run has spent."""
        for name, value in seconds.items():
            self.seconds[name] += value

    def read(self) -> dict[str, float]:
        """The seconds up to now."""
        self._switch()
        return {name: round(value, 3) for name, value in self.seconds.items()}


class Pace:
    """Watches how long a step takes, and says how many make a dispatch of pleasant length."""

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self._slowest = Largest()
        self._mark = time.perf_counter()

    def __call__(self) -> int:
        seconds = self._slowest(self.seconds_per_step)
        return max(1, int(SECONDS_PER_CHUNK / seconds)) if seconds else 1

    def resume(self) -> None:
        """Begins to count after a pause."""
        self._mark = time.perf_counter()

    def finished(self, num_steps: int) -> float:
        """Notes that so many steps are done since the mark; returns the seconds they took."""
        seconds = time.perf_counter() - self._mark
        self._mark += seconds
        self.seconds_per_step = seconds / num_steps
        return seconds
