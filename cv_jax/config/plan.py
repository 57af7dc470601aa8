"""Plans which steps run in one dispatch, and what is due after them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_collections

from cv_jax.config import durations

# Most steps in a dispatch. Metrics are kept for each step, so this also bounds their memory.
MAX_STEPS = 512


class Intervals(NamedTuple):
    """The length of the training and the intervals of its events, in steps; 0 is never."""

    total: int
    log: int
    eval: int
    save: int
    histograms: int = 0


def make_intervals(config: ml_collections.ConfigDict, num_train: int, num_val: int) -> Intervals:
    """Converts the durations of the config to steps; without val, `eval` is 0."""

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
    """The steps from `start` up to `end`, run in one dispatch, and the events due after them."""

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
    """Yields chunks from step `start` to the end, each up to the next event that is due.

    Args:
        start: steps already made.
        intervals: intervals of the events; the last chunk always logs and saves.
        limit: step -> the most steps that the batches allow from this step on.
        pace: () -> the number of steps that fill a dispatch.
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
