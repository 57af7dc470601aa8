"""What a run says: a table on the console, metrics.jsonl, and TensorBoard."""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from cv_jax.data import DataSpec
from cv_jax.data.batches import Batches
from cv_jax.errors import UserError
from cv_jax.evaluate import means
from cv_jax.loop import Chunk, Intervals, Pace
from cv_jax.result import device_name

_HEAD = (
    f"{'epoch':>7} {'step':>8} {'lr':>9} {'loss':>8} {'accuracy':>8}"
    f" {'val loss':>9} {'val acc':>8} {'images/s':>9} {'elapsed':>8}"
)


class Log:
    """The log of one run.

    Metrics of a chunk are fetched when the next one is under way, so that the device never waits,
    and at the latest when something is due.

    Args:
        workdir: where metrics.jsonl and the TensorBoard events go.
        config, spec: of the run.
        start_step: steps already made; what an earlier start of this run logged beyond them (it
            was stopped after its last checkpoint) is taken back.
        intervals: the length of the training, in steps.
    """

    def __init__(
        self,
        workdir: Path,
        config: ml_collections.ConfigDict,
        spec: DataSpec,
        start_step: int,
        intervals: Intervals,
    ):
        self.pace = Pace()
        self._spec = spec
        self._start_step = start_step
        self._steps_per_epoch = spec.num_train // config.batch_size
        self._batch_size = config.batch_size
        self._pending: tuple[Chunk, dict] | None = None
        self._window = _Window()
        self._row: dict[str, float] = {}
        self._head_is_due = True
        self._started = time.perf_counter()
        self._workdir = workdir
        self._jsonl = _open_jsonl(workdir / "metrics.jsonl", start_step)
        self._board = _open_board(workdir, start_step)
        self._bar = tqdm(
            total=intervals.total,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
        self._board.close()
        self._jsonl.close()

    def begin(self, changes: list[str], notes: list[str]) -> None:
        """Says what runs, and what was changed since an earlier start."""
        spec = self._spec
        shape = "x".join(map(str, spec.image_shape))
        self.line(f"workdir {self._workdir}")
        self.line(
            f"data    {spec.name}: {spec.num_train:,} train, {spec.num_val:,} val, "
            f"{spec.num_test:,} test; {shape}, {spec.num_classes} classes"
        )
        for note in notes:
            self.line(note)
        self.line(f"device  {device_name()}")
        if self._start_step:
            self.line(f"resumes after step {self._start_step:,}")
        for change in changes:
            self.line(f"changed config.{change}")
            with (self._workdir / "changes.jsonl").open("a") as file:
                file.write(json.dumps({"step": self._start_step, "change": change}) + "\n")

    def preview(self, preview: Callable, batches: Batches, key: jax.Array) -> None:
        """Shows the images of the first batch in TensorBoard, augmented as in the training."""
        feed = batches.feed(self._start_step, 1)
        images = jax.jit(lambda feed, step, key: preview(batches.pick(feed, step), key)[:64])(
            feed, np.int32(self._start_step), key
        )
        self._board.add_image(
            "augmented", image_grid(np.asarray(images)), self._start_step, dataformats="HWC"
        )

    def line(self, text: str) -> None:
        """Prints a line above the progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def train(self, chunk: Chunk, metrics: dict) -> None:
        """Takes the metrics of a chunk that was just dispatched."""
        previous, self._pending = self._pending, (chunk, metrics)
        if previous:
            self._fetch(*previous)
        if chunk.logs or chunk.evals or chunk.saves:
            self.settle()
        if chunk.logs:
            values = self._window.means()
            self._window = _Window()
            self._row = {"step": chunk.end, **values}
            self._write(chunk.end, "train", values)

    def settle(self) -> None:
        """Waits for all that was dispatched and takes its metrics."""
        if self._pending:
            self._fetch(*self._pending)
            self._pending = None

    def _fetch(self, chunk: Chunk, metrics: dict) -> None:
        metrics = jax.device_get(metrics)
        seconds = self.pace.finished(chunk.num_steps)
        rows = {
            name: tuple(np.asarray(part[: chunk.num_steps], np.float64) for part in pair)
            for name, pair in metrics.items()
        }
        finite = np.isfinite(rows["loss"][0])
        if not finite.all():
            raise UserError(
                f"The loss is not finite at step {chunk.start + int(np.argmin(finite)) + 1}. "
                "The checkpoints before it are kept; lower config.optim.lr, lengthen "
                "config.optim.warmup or set config.optim.clip_norm."
            )
        self._window.add(rows, chunk.num_steps * self._batch_size, seconds)
        self._bar.set_postfix_str(
            f"epoch {chunk.end / self._steps_per_epoch:.2f}, "
            f"loss {rows['loss'][0][-1] / rows['loss'][1][-1]:.4f}, "
            f"{chunk.num_steps * self._batch_size / seconds:,.0f} images/s",
            refresh=False,
        )
        self._bar.update(chunk.num_steps)

    def evals(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Takes the means of an evaluation; {} where there was none."""
        if not values:
            return
        values = scalars(values)
        self._row |= {"step": step, **{f"{split} {name}": v for name, v in values.items()}}
        self._write(step, split, values)

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

    def _write(self, step: int, split: str, values: dict[str, float]) -> None:
        record = {
            "step": step,
            "epoch": round(step / self._steps_per_epoch, 6),
            "split": split,
            "values": {name: value for name, value in values.items() if math.isfinite(value)},
        }
        self._jsonl.write(json.dumps(record) + "\n")
        self._jsonl.flush()
        for name, value in record["values"].items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def finals(self, step: int, sums: dict[str, dict], class_names: Sequence[str]) -> None:
        """Takes the (sum, count) pairs of the final evaluation of each split."""
        for split, metrics in sums.items():
            if metrics:
                self._write(step, f"final_{split}", scalars(means(metrics)))
                image = draw_confusion(metrics["confusion"][0], class_names)
                self._board.add_image(f"confusion/{split}", image, step, dataformats="HWC")


def scalars(values: dict[str, Any]) -> dict[str, float]:
    """The metrics that are one number."""
    return {name: float(value) for name, value in values.items() if np.ndim(value) == 0}


class _Window:
    """The sums of all steps since the last row, and the seconds they took."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._num_images = 0
        self._seconds = 0.0

    def add(self, rows: dict[str, tuple], num_images: int, seconds: float) -> None:
        # Step by step and in float64: the mean does not depend on how steps fell into chunks.
        for name, pair in rows.items():
            sums = self._sums.setdefault(name, np.zeros(2))
            for step_sum, step_count in zip(*pair, strict=True):
                sums += (step_sum, step_count)
        self._num_images += num_images
        self._seconds += seconds

    def means(self) -> dict[str, float]:
        values = {name: float(total / count) for name, (total, count) in self._sums.items()}
        values["images_per_second"] = (
            self._num_images / self._seconds if self._seconds else math.nan
        )
        return values


def _format_row(row: dict[str, float], steps_per_epoch: int, elapsed: float) -> str:
    def cell(name, width, form):
        return f"{row[name]:>{width}{form}}" if name in row else " " * width

    return (
        f"{row['step'] / steps_per_epoch:>7.2f} {row['step']:>8} {cell('lr', 9, '.3g')}"
        f" {cell('loss', 8, '.4f')} {cell('accuracy', 8, '.2%')}"
        f" {cell('val loss', 9, '.4f')} {cell('val accuracy', 8, '.2%')}"
        f" {cell('images_per_second', 9, ',.0f')} {tqdm.format_interval(elapsed):>8}"
    )


def _open_board(workdir: Path, start_step: int) -> Any:
    """tensorboardX's SummaryWriter, without PyTorch: importing that, where it is, takes 1.2 s."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # what tensorboardX takes for "not installed"
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(workdir), purge_step=start_step + 1, flush_secs=10)


def _open_jsonl(path: Path, start_step: int) -> Any:
    """Opens metrics.jsonl for more lines, without those of steps that will be made again."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start_step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue  # the half line that a kill left behind
        path.write_text("".join(kept))
    return path.open("a")


def image_grid(images: np.ndarray, columns: int = 8, gap: int = 2) -> np.ndarray:
    """Lays images (b, h, w, c), float in [0, 1], out as one (rows*, columns*, 3) uint8 image."""
    images = np.asarray(images)
    images = (np.clip(images, 0, 1) * 255).round().astype(np.uint8)
    images = np.pad(images, ((0, -len(images) % columns), (0, gap), (0, gap), (0, 0)))
    b, h, w, c = images.shape
    grid = images.reshape(b // columns, columns, h, w, c).swapaxes(1, 2)
    grid = grid.reshape(b // columns * h, columns * w, c)
    return np.broadcast_to(grid, (*grid.shape[:2], 3)) if c == 1 else grid


def draw_confusion(confusion: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Draws a confusion matrix (n, n) of counts, rows the labels, as an (h, w, 3) uint8 image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # only here: slow to import
    from matplotlib.figure import Figure

    n = len(confusion)
    rates = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(6, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(rates, cmap="Blues", vmin=0, vmax=1)
    axes.set(
        xlabel="answer",
        ylabel="label",
        title=f"{np.trace(confusion):.0f} of {confusion.sum():.0f} right",
    )
    if n <= 20:
        axes.set_xticks(range(n), class_names, rotation=90)
        axes.set_yticks(range(n), class_names)
        for i, j in np.ndindex(n, n):
            color = "white" if rates[i, j] > 0.5 else "black"
            axes.text(j, i, f"{confusion[i, j]:.0f}", ha="center", va="center", color=color)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
