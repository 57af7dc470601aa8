"""Plans which steps run in one dispatch, and what is due after them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_collections

from cv_jax.config import durations
from cv_jax.config.errors import UserError

# Most steps in a dispatch. Metrics are kept for each step, so this also bounds their memory.
MAX_STEPS = 512


class Intervals(NamedTuple):
    """The length of the training and the intervals of its events, in steps; 0 is never.

    `patience` is no interval: the training ends early where val has not improved for so many steps.
    """

    total: int
    log: int
    eval: int
    save: int
    histograms: int = 0
    patience: int = 0


def make_intervals(config: ml_collections.ConfigDict, num_train: int, num_val: int) -> Intervals:
    """Converts the durations of the config to steps; without val, `eval` is 0.

    Raises:
        UserError: `config.patience` is set, and val is never evaluated.
    """

    def steps(duration):
        return durations.steps(duration, config.batch_size, num_train)

    intervals = Intervals(
        total=durations.total_steps(config, num_train),
        log=steps(config.log_every),
        eval=steps(config.eval_every) if num_val else 0,
        save=steps(config.checkpoint_every),
        histograms=steps(config.histograms_every),
        patience=steps(config.patience),
    )
    if intervals.patience and not intervals.eval:
        key, value = ("eval_every", "1 epoch") if num_val else ("data.num_val", "1000")
        raise UserError(
            f"config.patience={config.patience!r} watches val, which is never evaluated: set "
            f"config.{key}, for example to {value}, or config.patience='never'."
        )
    return intervals


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
    start: int,
    intervals: Intervals,
    limit: Callable[[int], int],
    pace: Callable[[], int],
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[Chunk]:
    """Yields chunks from step `start` to the end, each up to the next event that is due.

    Args:
        start: steps already made.
        intervals: intervals of the events; the last chunk always logs and saves.
        limit: step -> the most steps that the batches allow from this step on.
        pace: () -> the number of steps that fill a dispatch.
        is_over: () -> whether the training ends early, before the next chunk.
    """
    total = intervals.total
    events = intervals.log, intervals.eval, intervals.save, intervals.histograms
    while start < total and not is_over():
        dues = [every - start % every for every in events if every]
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
