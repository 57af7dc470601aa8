"""Owns the work directory of a program: every file of a run is written through it."""

import contextlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import ml_collections
import numpy as np
from etils.epath import Path

from cv_jax.config.plan import Intervals
from cv_jax.config.sweep import make_sweep, run_names
from cv_jax.data import Dataset
from cv_jax.data.encoded import num_broken
from cv_jax.runtime.clock import Clock
from cv_jax.runtime.processes import lost_process_ends_this, on_process_0
from cv_jax.workdir.adopt import adopt_workdir
from cv_jax.workdir.checkpoints import Checkpoints
from cv_jax.workdir.log import Log
from cv_jax.workdir.metric import Metric
from cv_jax.workdir.patience import Patience
from cv_jax.workdir.result import (
    check_data,
    finished_result,
    write_data,
    write_environment,
    write_result,
)
from cv_jax.workdir.storage import storage_errors


class Measures(Protocol):
    """What a work directory knows of a task, see `tasks.Task`."""

    metrics: Mapping[str, Metric]
    headline: str
    warn: Callable | None
    baseline: Callable | None


class Workdir:
    """A work directory, locked for this program while it is entered.

    Entering writes config.json and data.json. Leaving waits until all checkpoints are written.

    Args:
        path: a directory, or a folder of a bucket.
        config: the config of the runs.
        data: the splits.
        task: what is measured, and which metric ranks.
        intervals: the length of the training and its patience, in steps.
        clock: of the program; counts "save".

    Attributes:
        changes: a line for each leaf of the config that changed since the runs started.
        val_is_due: whether the restored checkpoint was saved when a signal had cut its evaluation
            on val short.

    Raises:
        UserError: the directory is in use, holds runs of another config, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        config: ml_collections.ConfigDict,
        data: Dataset,
        task: Measures,
        intervals: Intervals,
        clock: Clock,
    ):
        self._path, self._config, self._data, self._task = path, config, data, task
        self._intervals, self._clock = intervals, clock
        self._sweep = make_sweep(config)
        self._metric = task.metrics.get(task.headline, Metric())
        self._patience = Patience(intervals.patience, self._metric)
        self._window: dict[str, Any] = {}
        self._start_step = 0
        self.changes: list[str] = []
        self.val_is_due = False

    def __enter__(self) -> "Workdir":
        with contextlib.ExitStack() as stack:
            stack.enter_context(storage_errors(self._path))
            self._checkpoints = stack.enter_context(
                Checkpoints(self._path, self._config.keep_checkpoints, self._metric)
            )
            # Ends before the checkpoints wait for the lost process.
            stack.enter_context(lost_process_ends_this())
            changes = on_process_0(partial(adopt_workdir, self._path, self._config))
            self.changes = changes or []
            if self._checkpoints.exist():
                on_process_0(partial(check_data, self._path, self._data.spec))
            write_data(self._path, self._data)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> bool | None:
        return self._stack.__exit__(*exc)

    def restore(self, like: Any) -> Any | None:
        """Returns the state of the newest checkpoint; None where there is none.

        The clock goes on from the seconds of the checkpoint.

        Args:
            like: a TrainState of ShapeDtypeStructs with shardings.
        """
        restored = self._checkpoints.restore_latest(like)
        if restored is None:
            return None
        state, progress = restored
        self._clock.add(progress["seconds"])
        self._window = progress["window"]
        if "patience" in progress:  # which older code did not save
            self._patience.restore(progress["patience"])
        self.val_is_due = progress.get("val_is_due", False)
        self._start_step = int(state.step)
        return state

    def finished(self) -> dict[str, Any] | None:
        """Returns the result of a complete training; None where steps are left."""
        return finished_result(self._path, self._start_step, self._resumed_intervals().total)

    def _resumed_intervals(self) -> Intervals:
        """Returns the intervals; of a run that has ended early, the total is the steps it made."""
        if not self.is_over():
            return self._intervals
        return self._intervals._replace(total=min(self._start_step, self._intervals.total))

    def write_environment(self) -> None:
        """Writes env.json, or checks that a resumed run finds the environment of its start."""
        resumes = self._start_step > 0
        on_process_0(partial(write_environment, self._path, goes_on=resumes))

    def open_log(self) -> Log:
        """Opens the log. The work directory closes it."""
        self._log = self._stack.enter_context(
            Log(
                self._path,
                self._config,
                self._data.spec,
                run_names(self._config, self._sweep),
                self._start_step,
                self._resumed_intervals(),
                self._task.metrics,
                self._task.headline,
                self._window,
                self._task.warn,
                self.val_is_due,
                now=partial(self._clock.now, "train"),
            )
        )
        return self._log

    def evals(self, step: int, val: Mapping[str, np.ndarray] | None) -> None:
        """Logs the evaluation on val at a step, see `save`; `is_over` takes it into account."""
        self._log.evals(step, "val", val)
        self._patience.add(step, (val or {}).get(self._task.headline))

    def is_over(self) -> bool:
        """Returns whether the training ends early, as `config.patience` says."""
        return self._patience.is_over()

    def end(self, step: int) -> int:
        """Takes the number of steps made, and returns it. Prints a line if the run ended early."""
        self._steps = step
        if self._steps < self._intervals.total:
            self._log.line(
                f"stopped early at step {step:,}: no improvement on val since step "
                f"{self._patience.improved:,}; the result is of step {step:,}"
            )
        return step

    def save(self, state: Any, val: Mapping[str, np.ndarray] | None) -> None:
        """Saves a checkpoint.

        Args:
            state: a TrainState of all runs.
            val: the evaluation on val at this step. {} where none was due; None where a signal cut
                it short, so that it is due when the run resumes.
        """
        self._log.save()
        progress = {
            "seconds": self._clock.read(),
            "window": self._log.window(),
            "patience": self._patience.to_json(),
        }
        if val is None:
            progress["val_is_due"] = True
        with self._clock("save"):
            self._checkpoints.save(state, progress, (val or {}).get(self._task.headline))

    def catch_up(self, val: Mapping[str, np.ndarray] | None) -> None:
        """Takes the evaluation on val that was due; None where it was cut short once more."""
        if val is not None:
            self.evals(self._start_step, val)
            self._log.row()
            self._checkpoints.rank(self._start_step, val.get(self._task.headline))

    def write_result(self, sums: dict[str, dict], flops: dict[str, int]) -> dict[str, Any]:
        """Writes and returns the result. Call after leaving, when the last checkpoint is whole.

        Args:
            sums: split -> {metric: (sum, count)} of the final evaluation.
            flops: of the "training" of a run, and of its final "evaluation".
        """
        broken = num_broken(self._data.train, self._data.val, self._data.test)
        if broken:
            images = "images" if broken > 1 else "image"
            print(f"cv_jax: {broken:,} {images} could not be decoded in this run", file=sys.stderr)
        with storage_errors(self._path):
            return write_result(
                self._path,
                self._config,
                self._data.spec,
                self._sweep.settings,
                self._steps,
                sums,
                flops,
                self._clock.read(),
                self._task.metrics,
                self._task.headline,
                self._baseline(sums),
                self._stopped_early(),
                broken,
            )

    def _stopped_early(self) -> dict[str, int] | None:
        if self._steps == self._intervals.total:
            return None
        return {"planned_steps": self._intervals.total, "last_improved": self._patience.improved}

    def _baseline(self, sums: dict[str, dict]) -> dict[str, dict[str, float]] | None:
        """Returns split -> {metric: number} of the task's trivial predictor, where it has one."""
        if self._task.baseline is None:
            return None
        numbers = {}
        for split in (split for split, of_split in sums.items() if of_split):
            found = self._task.baseline(self._data.train, getattr(self._data, split))
            numbers[split] = {name: float(value) for name, value in found.items()}
        return numbers
