"""Writes training progress to the console, metrics.jsonl and TensorBoard.

Numbers have a leading axis of runs. The console and `values` of metrics.jsonl show means over the
runs that have not diverged. Only process 0 writes; every process checks the loss.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils.epath import Path
from jax.sharding import Mesh
from tqdm import tqdm

from cv_jax.config.plan import Chunk, Intervals
from cv_jax.config.sweep import make_sweep, run_values
from cv_jax.data import DataSpec
from cv_jax.runtime.clock import Pace
from cv_jax.workdir.bucket import Growing, open_to_append
from cv_jax.workdir.files import write_json
from cv_jax.workdir.log.confusion import draw_confusion
from cv_jax.workdir.log.divergence import Divergence
from cv_jax.workdir.log.records import json_line, open_jsonl
from cv_jax.workdir.log.table import Table
from cv_jax.workdir.log.tensorboard import Board, count_values, image_grid
from cv_jax.workdir.log.window import Window, divide
from cv_jax.workdir.metric import Metric, is_loss, metrics_to_json
from cv_jax.workdir.numbers import finite_mean, means
from cv_jax.workdir.result import device_name, examples_word


class Log:
    """The log of one program.

    The metrics of a chunk are fetched while the next chunk runs, so that the device never waits.
    They are fetched at once where a row, an evaluation or a checkpoint is due, and where steps are
    slow, so that a signal waits for one step and not for two.

    Args:
        workdir: the work directory.
        config: the config of the runs.
        spec: the facts about their data.
        names: names of the runs.
        start_step: steps already made. Records of later steps, which an earlier start wrote after
            its last checkpoint, are removed.
        intervals: the length of the training, in steps.
        metrics, headline: what the task measures and which metric ranks, see `tasks.Task`.
        window: the value of `window()` at `start_step`, where a run resumes.
        warn: see `tasks.Task`.
        val_is_due: whether val is to be evaluated at `start_step`, again.
    """

    def __init__(
        self,
        workdir: Path,
        config: ml_collections.ConfigDict,
        spec: DataSpec,
        names: Sequence[str],
        start_step: int,
        intervals: Intervals,
        metrics: Mapping[str, Metric],
        headline: str,
        window: dict[str, Any] | None = None,
        warn: Callable[[dict[str, np.ndarray], Sequence[str]], list[str]] | None = None,
        val_is_due: bool = False,
        now: Callable[[], float] = time.perf_counter,
    ):
        self._config = config
        self._names = names
        self._metrics = metrics
        self._headline = headline
        self._warn = warn
        self._divergence = Divergence(names, intervals.total, self._epoch)
        self.pace = Pace(now)
        self._spec = spec
        self._start_step = start_step
        self._steps_per_epoch = spec.num_train // config.batch_size
        self._batch_size = config.batch_size
        self._pending: tuple[Chunk, dict] | None = None
        self._examples = examples_word(spec)
        self._table = Table(headline, metrics.get(headline, Metric()), self._examples)
        self._window = Window(window)
        self._row: dict[str, float | None] = {}
        self._head_is_due = True
        self._started = time.perf_counter()
        self._workdir = workdir
        self._writes = jax.process_index() == 0
        if self._writes:
            path = workdir / "metrics.jsonl"
            self._jsonl = open_jsonl(path, start_step, intervals.total, val_is_due)
            self._board = Board(workdir, names, start_step, intervals.total, headline)
        self._bar = tqdm(
            total=intervals.total,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            disable=not (self._writes and sys.stderr.isatty()),
        )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.ExitStack() as stack:  # closes all files where one cannot be written
            stack.callback(self._bar.close)
            if self._writes:
                stack.callback(self._board.close)
                stack.callback(self._jsonl.close)

    def begin(self, changes: list[str], notes: list[str]) -> None:
        """Prints the data, the device and the notes, and writes task.json.

        Args:
            changes: how the config differs from that of an earlier start. They also go to
                changes.jsonl.
            notes: lines to print.
        """
        if not self._writes:
            return
        write_json(self._workdir / "task.json", metrics_to_json(self._metrics, self._headline))
        self._board.begin(run_values(self._config, make_sweep(self._config)), self._start_step)
        spec = self._spec
        self.line(f"workdir {self._workdir}")
        known = f" ({spec.num_labelled:,} with labels)" if spec.num_unlabelled else ""
        self.line(
            f"data    {spec.name}: {spec.num_train:,} train{known}, {spec.num_val:,} val, "
            f"{spec.num_test:,} test; {spec.summary}"
        )
        for note in notes:
            self.line(note)
        self.line(f"device  {device_name()}")
        if self._start_step:
            self.line(f"resumes after step {self._start_step:,}")
        for change in changes:
            self.line(f"changed config.{change}")
            with open_to_append(self._workdir / "changes.jsonl") as file:
                file.write(json_line({"step": self._start_step, "change": change}))

    def preview(self, images: jax.Array) -> None:
        """Writes augmented images (b, h, w, c) of the first batch to TensorBoard."""
        if not self._writes:
            return
        grid = image_grid(np.asarray(images))
        self._board.image("augmented", grid, self._start_step)

    def line(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if not self._writes:
            return
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def train(self, chunk: Chunk, metrics: dict) -> None:
        """Takes the metrics of a chunk that was just dispatched; writes a row where one is due."""
        previous, self._pending = self._pending, (chunk, metrics)
        if previous:
            self._fetch(*previous)
        due = chunk.logs or chunk.evals or chunk.saves or chunk.histograms
        if due or self.pace.is_slow:
            self.settle()
        if chunk.logs:
            self._end_window(chunk.end)

    def _end_window(self, step: int) -> None:
        """Writes the means over all steps since the last row, and warnings about them."""
        values = self._window.means(self._examples)
        skipped, num_steps = self._window.skipped()
        if skipped:
            self.line(f"{skipped} of {num_steps} steps up to step {step} skipped: not finite")
        if self._warn:
            of_runs = {k: v for k, v in values.items() if len(v) == len(self._names)}
            for text in self._warn(of_runs, self._names):
                self.line(text)
        self._window = Window()
        means = {name: finite_mean(v) for name, v in values.items()}
        unmeasured = {name: None for name in ("loss", self._headline) if name not in values}
        finite = {name: mean for name, mean in means.items() if not math.isnan(mean)}
        self._row = {"step": step, **unmeasured, **finite}
        self._write(step, "train", values)

    def window(self) -> dict[str, Any]:
        """Returns the sums since the last row as JSON values, for the checkpoint."""
        return self._window.sums()

    def settle(self) -> None:
        """Waits for all dispatched chunks and takes their metrics."""
        if self._pending:
            self._fetch(*self._pending)
            self._pending = None

    def save(self) -> None:
        """Settles and writes every line, so that no checkpoint is ahead of metrics.jsonl."""
        self.settle()
        if self._writes and isinstance(self._jsonl, Growing):
            self._jsonl.save()

    def _fetch(self, chunk: Chunk, metrics: dict) -> None:
        metrics = jax.device_get(metrics)
        seconds = self.pace.finished(chunk.num_steps)
        rows = {
            name: tuple(np.array(part[:, : chunk.num_steps], np.float64) for part in pair)
            for name, pair in metrics.items()
        }
        # A step that counts no example has the summed loss 0: such a step has not diverged.
        finite = {name: np.isfinite(total) for name, (total, _) in rows.items() if is_loss(name)}
        skipped = np.zeros((len(self._names), chunk.num_steps), bool)
        if "skipped" in rows:
            skipped = rows["skipped"][0] > 0
        for text in self._divergence.watch(chunk.start, finite, skipped):
            self.line(text)
        for name, (total, _) in rows.items():
            if name != "skipped" and name.partition("/")[0] != "lr":
                for of_loss in finite.values():  # nothing counts in a step whose loss is not finite
                    total[~of_loss & ~skipped] = np.nan
        num_examples = chunk.num_steps * self._batch_size * len(self._names)
        self._window.add(rows, num_examples, seconds)
        losses = [
            f"{name} {finite_mean(divide(*rows[name])[:, -1]):.4f}, " for name in list(finite)[:1]
        ]
        self._bar.set_postfix_str(
            f"{self._epoch(chunk.end)}, {''.join(losses)}"
            f"{num_examples / seconds:,.0f} {self._examples}/s",
            refresh=False,
        )
        self._bar.update(chunk.num_steps)

    def _epoch(self, step: int) -> str:
        return f"epoch {step / self._steps_per_epoch:.2f}"

    def evals(self, step: int, split: str, values: dict[str, Any] | None) -> None:
        """Takes the means of an evaluation; those of shape (r,) are logged.

        {} is no evaluation, and None is one that was cut short.
        """
        if not values:
            return
        values = scalars(values)
        self._row |= {
            "step": step,
            **{f"{split} {k}": finite_mean(v) for k, v in values.items() if np.isfinite(v).any()},
        }
        self._write(step, split, values)

    def histograms(self, chunk: Chunk, params: Any, mesh: Mesh) -> None:
        """Writes histograms of all parameters to TensorBoard where the chunk asks for them."""
        if not chunk.histograms:
            return
        counted = jax.device_get(count_values(params, mesh))  # by all processes together
        if self._writes:
            self._board.histograms(counted, chunk.end)

    def row(self) -> None:
        """Prints the row of the table that was gathered since the last call, if any."""
        if not self._row:
            return
        if self._head_is_due:
            self.line(self._table.head())
            self._head_is_due = False
        elapsed = time.perf_counter() - self._started
        epoch = self._row["step"] / self._steps_per_epoch
        self.line(self._table.row(self._row, epoch, elapsed))
        self._row = {}

    def _write(self, step: int, split: str, values: dict[str, np.ndarray]) -> None:
        if not self._writes:
            return
        record = {
            "step": step,
            "epoch": round(step / self._steps_per_epoch, 6),
            "split": split,
            "values": {name: finite_mean(v) for name, v in values.items() if np.isfinite(v).any()},
        }
        if len(self._names) > 1:
            record["runs"] = {
                name: [float(x) if math.isfinite(x) else None for x in v]
                for name, v in values.items()
                if len(v) == len(self._names)
            }
        self._jsonl.write(json_line(record))
        self._jsonl.flush()
        self._board.scalars(split, values, step)

    def finals(self, step: int, sums: dict[str, dict], class_names: Sequence[str] = ()) -> None:
        """Writes the final evaluation of each split, and its confusion matrix where it has one.

        Args:
            step: the last one.
            sums: split -> {metric: (sum, count)}; {} for an empty split.
            class_names: of the rows of a confusion matrix.
        """
        if not self._writes:
            return
        for split, metrics in sums.items():
            if metrics:
                self._write(step, f"final_{split}", scalars(means(metrics)))
            if "confusion" in metrics:
                of_runs = metrics["confusion"][0]
                of_runs = of_runs[np.isfinite(of_runs).all(axis=(1, 2))]
                if len(of_runs):  # 0 where all runs have diverged
                    image = draw_confusion(of_runs.sum(axis=0), class_names)
                    self._board.image(f"confusion/{split}", image, step)
        self._board.end(step)


def scalars(values: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the metrics that have one number for each run."""
    return {name: value for name, value in values.items() if np.ndim(value) == 1}
