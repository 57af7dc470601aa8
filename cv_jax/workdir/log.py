"""What the runs of a program say: a table on the console, metrics.jsonl, and TensorBoard.

Numbers come with an axis of runs. The table and `values` of metrics.jsonl are means over the runs
that have not diverged. Of several processes the first one says it; all of them watch the loss.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils.epath import Path
from jax.sharding import Mesh
from tqdm import tqdm

from cv_jax.config.errors import UserError
from cv_jax.config.plan import Chunk, Intervals
from cv_jax.config.sweep import make_sweep, run_values
from cv_jax.data import DataSpec
from cv_jax.runtime.clock import Pace
from cv_jax.workdir.bucket import Growing, open_to_append
from cv_jax.workdir.files import write_atomically
from cv_jax.workdir.numbers import finite_mean, means
from cv_jax.workdir.result import device_name
from cv_jax.workdir.tensorboard import Board, count_values

_HEAD = (
    f"{'epoch':>7} {'step':>8} {'lr':>9} {'loss':>8} {'accuracy':>8}"
    f" {'val loss':>9} {'val acc':>8} {'images/s':>9} {'elapsed':>8}"
)


_REMEDIES = (
    "Earlier checkpoints are kept; lower config.optim.lr, lengthen config.optim.warmup or set "
    "config.optim.clip_norm"
)
# So many steps in a row that every run has skipped stop the program. The number does not depend on
# how steps fall into chunks and rows, which may be of one step.
MAX_SKIPPED = 10
# The spread of features, see `probes.spread_and_rank`, below which they say nothing of an image.
COLLAPSED = 0.05


class Log:
    """The log of one program.

    Metrics of a chunk are fetched when the next one is under way, so that the device never waits,
    and at the latest when something is due.

    Args:
        workdir: where metrics.jsonl and the TensorBoard events go.
        config, spec: of the runs.
        names: of the runs.
        start_step: steps already made; what an earlier start of this program logged beyond them
            (it was stopped after its last checkpoint) is taken back.
        intervals: the length of the training, in steps.
        window: what `window()` returned at `start_step`, of a run that goes on.
    """

    def __init__(
        self,
        workdir: Path,
        config: ml_collections.ConfigDict,
        spec: DataSpec,
        names: Sequence[str],
        start_step: int,
        intervals: Intervals,
        window: dict[str, Any] | None = None,
    ):
        self._config = config
        self._names = names
        self._diverged: set[int] = set()
        self._skipped_in_a_row = np.zeros(len(names), int)
        self._max_skipped = min(MAX_SKIPPED, intervals.total)
        self.pace = Pace()
        self._spec = spec
        self._start_step = start_step
        self._steps_per_epoch = spec.num_train // config.batch_size
        self._batch_size = config.batch_size
        self._pending: tuple[Chunk, dict] | None = None
        self._window = _Window(window)
        self._row: dict[str, float] = {}
        self._head_is_due = True
        self._started = time.perf_counter()
        self._workdir = workdir
        self._writes = jax.process_index() == 0
        if self._writes:
            self._jsonl = _open_jsonl(workdir / "metrics.jsonl", start_step, intervals.total)
            self._board = Board(workdir, names, start_step, intervals.total)
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
        with contextlib.ExitStack() as stack:  # closes the others where one cannot be written
            stack.callback(self._bar.close)
            if self._writes:
                stack.callback(self._board.close)
                stack.callback(self._jsonl.close)

    def begin(self, changes: list[str], notes: list[str]) -> None:
        """Says what runs, and what was changed since an earlier start."""
        if not self._writes:
            return
        self._board.begin(run_values(self._config, make_sweep(self._config)), self._start_step)
        spec = self._spec
        shape = "x".join(map(str, spec.image_shape))
        self.line(f"workdir {self._workdir}")
        known = f" ({spec.num_labelled:,} with labels)" if spec.num_unlabelled else ""
        self.line(
            f"data    {spec.name}: {spec.num_train:,} train{known}, {spec.num_val:,} val, "
            f"{spec.num_test:,} test; {shape}, {spec.num_classes} classes"
        )
        for note in notes:
            self.line(note)
        self.line(f"device  {device_name()}")
        if self._start_step:
            self.line(f"resumes after step {self._start_step:,}")
        for change in changes:
            self.line(f"changed config.{change}")
            with open_to_append(self._workdir / "changes.jsonl") as file:
                file.write(_json_line({"step": self._start_step, "change": change}))

    def preview(self, images: jax.Array) -> None:
        """Shows augmented images (b, h, w, c) of the first batch in TensorBoard."""
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
        """Takes the metrics of a chunk that was just dispatched."""
        previous, self._pending = self._pending, (chunk, metrics)
        if previous:
            self._fetch(*previous)
        if chunk.logs or chunk.evals or chunk.saves or chunk.histograms:
            self.settle()
        if chunk.logs:
            values = self._window.means()
            skipped, num_steps = self._window.skipped()
            if skipped:
                self.line(
                    f"{skipped} of {num_steps} steps up to step {chunk.end} skipped: not finite"
                )
            for name, spread in zip(self._names, values.get("feature_spread", ()), strict=False):
                if spread < COLLAPSED:
                    self.line(f"{name}: its features collapse, all images look alike to it")
            self._window = _Window()
            means = {name: finite_mean(v) for name, v in values.items()}
            self._row = {"step": chunk.end, **{k: v for k, v in means.items() if not math.isnan(v)}}
            self._write(chunk.end, "train", values)

    def window(self) -> dict[str, Any]:
        """The sums since the last row as JSON values, which a run that goes on begins with."""
        return self._window.sums()

    def settle(self) -> None:
        """Waits for all that was dispatched and takes its metrics."""
        if self._pending:
            self._fetch(*self._pending)
            self._pending = None

    def save(self) -> None:
        """Settles and keeps no line back: no checkpoint is ahead of metrics.jsonl."""
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
        loss = _divide(*rows["loss"])
        # A step that counts no example has no loss either, and has not diverged.
        finite = np.isfinite(rows["loss"][0])
        skipped = rows["skipped"][0] > 0 if "skipped" in rows else np.zeros(loss.shape, bool)
        self._watch(chunk.start, finite, skipped)
        for name, (total, _) in rows.items():
            if name != "skipped" and name.partition("/")[0] != "lr":
                total[~finite & ~skipped] = np.nan  # a step whose loss is not finite measures none
        num_images = chunk.num_steps * self._batch_size * len(self._names)
        self._window.add(rows, num_images, seconds)
        self._bar.set_postfix_str(
            f"epoch {chunk.end / self._steps_per_epoch:.2f}, "
            f"loss {finite_mean(loss[:, -1]):.4f}, {num_images / seconds:,.0f} images/s",
            refresh=False,
        )
        self._bar.update(chunk.num_steps)

    def _watch(self, start: int, finite: np.ndarray, skipped: np.ndarray) -> None:
        """Raises UserError where all runs diverge, or all skip many steps in a row.

        Args:
            start: steps before those that are looked at.
            finite: (r, k), whether the sum of the losses is finite; that of a skipped step is 0.
            skipped: (r, k), whether `update.skip_nonfinite` left the step out.
        """
        for step, at_step in enumerate(skipped.T, start + 1):
            self._skipped_in_a_row = (self._skipped_in_a_row + 1) * at_step
            if self._skipped_in_a_row.min() >= self._max_skipped:
                raise UserError(
                    f"The steps from {step - self._max_skipped + 1} to {step} "
                    f"({self._epoch(step)}) were all skipped: their loss or what they made of the "
                    f"state was not finite. {_REMEDIES}."
                )
        for run in np.flatnonzero(~finite.all(axis=1)):
            if run in self._diverged:
                continue
            self._diverged.add(int(run))
            step = start + int(np.argmin(finite[run])) + 1
            if len(self._diverged) == len(self._names):
                raise UserError(
                    f"The loss is not finite at step {step} ({self._epoch(step)}). {_REMEDIES}; "
                    "if it is a single step, config.optim.skip_nonfinite goes on without it."
                )
            self.line(f"{self._names[run]}: the loss is not finite at step {step}; others go on")

    def _epoch(self, step: int) -> str:
        return f"epoch {step / self._steps_per_epoch:.2f}"

    def evals(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Takes the means of an evaluation, (r,) or more; {} where there was none."""
        if not values:
            return
        values = scalars(values)
        self._row |= {
            "step": step,
            **{f"{split} {k}": finite_mean(v) for k, v in values.items() if np.isfinite(v).any()},
        }
        self._write(step, split, values)

    def histograms(self, chunk: Chunk, params: Any, mesh: Mesh) -> None:
        """Takes the parameters of all runs after a chunk, whose histograms may be due."""
        if not chunk.histograms:
            return
        counted = jax.device_get(count_values(params, mesh))  # of all processes
        if self._writes:
            self._board.histograms(counted, chunk.end)

    def row(self) -> None:
        """Prints the row of the table that has come together since the last call, if any."""
        if not self._pending:
            self.pace.resume()
        if not self._row:
            return
        if self._head_is_due:
            self.line(_HEAD)
            self._head_is_due = False
        elapsed = time.perf_counter() - self._started
        self.line(_format_row(self._row, self._steps_per_epoch, elapsed))
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
        self._jsonl.write(_json_line(record))
        self._jsonl.flush()
        self._board.scalars(split, values, step)

    def finals(self, step: int, sums: dict[str, dict], class_names: Sequence[str]) -> None:
        """Takes the (sum, count) pairs of the final evaluation of each split."""
        if not self._writes:
            return
        from cv_jax.workdir.figures import draw_confusion, rasterize  # only here: slow to import

        for split, metrics in sums.items():
            if metrics:
                self._write(step, f"final_{split}", scalars(means(metrics)))
            if "confusion" in metrics:
                of_runs = metrics["confusion"][0]
                of_runs = of_runs[np.isfinite(of_runs).all(axis=(1, 2))]
                if not len(of_runs):  # all have diverged
                    continue
                image = rasterize(draw_confusion(of_runs.sum(axis=0), class_names))
                self._board.image(f"confusion/{split}", image, step)
        self._board.end(step)


def scalars(values: dict[str, Any]) -> dict[str, np.ndarray]:
    """The metrics that are one number a run."""
    return {name: value for name, value in values.items() if np.ndim(value) == 1}


class _Window:
    """The sums of all steps since the last row, (2, r) each, and the seconds they took."""

    def __init__(self, sums: dict[str, Any] | None = None) -> None:
        self._sums = {name: np.array(pair) for name, pair in (sums or {}).items()}
        self._num_images = 0
        self._seconds = 0.0

    def add(self, rows: dict[str, tuple], num_images: int, seconds: float) -> None:
        # Step by step and in float64: the mean does not depend on how steps fell into chunks.
        for name, pair in rows.items():
            pair = np.stack(pair)
            sums = self._sums.setdefault(name, np.zeros(pair.shape[:2]))
            for step in range(pair.shape[2]):
                sums += pair[:, :, step]
        self._num_images += num_images
        self._seconds += seconds

    def sums(self) -> dict[str, Any]:
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def skipped(self) -> tuple[int, int]:
        """How many steps were skipped, over all runs, and of how many."""
        skipped, steps = self._sums.get("skipped", np.zeros((2, 1))).sum(axis=1)
        return int(skipped), int(steps)

    def means(self) -> dict[str, np.ndarray]:
        values = {name: _divide(total, count) for name, (total, count) in self._sums.items()}
        speed = self._num_images / self._seconds if self._seconds else math.nan
        return {**values, "images_per_second": np.array([speed])}


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """total / count, NaN where nothing was counted."""
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _format_row(row: dict[str, float], steps_per_epoch: int, elapsed: float) -> str:
    def cell(name, width, form):
        return f"{row[name]:>{width}{form}}" if name in row else " " * width

    return (
        f"{row['step'] / steps_per_epoch:>7.2f} {row['step']:>8} {cell('lr', 9, '.3g')}"
        f" {cell('loss', 8, '.4f')} {cell('accuracy', 8, '.2%')}"
        f" {cell('val loss', 9, '.4f')} {cell('val accuracy', 8, '.2%')}"
        f" {cell('images_per_second', 9, ',.0f')} {tqdm.format_interval(elapsed):>8}"
    )


def _open_jsonl(path: Path, start_step: int, total: int) -> Any:
    """Opens metrics.jsonl for more lines, without those that will be written again."""
    if path.exists():
        kept = []
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
                final = record["step"] == total and record["split"].startswith("final_")
                if record["step"] <= start_step and not final:
                    kept.append(line.decode())
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # the half line that a kill left behind
        if kept:
            write_atomically(path, "\n".join(kept))
        else:
            path.unlink()
    return open_to_append(path)


def _json_line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def image_grid(images: np.ndarray, columns: int = 8, gap: int = 2) -> np.ndarray:
    """Lays images (b, h, w, c), float in [0, 1], out as one (rows*, columns*, 3) uint8 image."""
    images = np.asarray(images)
    images = (np.clip(images, 0, 1) * 255).round().astype(np.uint8)
    images = np.pad(images, ((0, -len(images) % columns), (0, gap), (0, gap), (0, 0)))
    b, h, w, c = images.shape
    grid = images.reshape(b // columns, columns, h, w, c).swapaxes(1, 2)
    grid = grid.reshape(b // columns * h, columns * w, c)
    return np.broadcast_to(grid, (*grid.shape[:2], 3)) if c == 1 else grid
