"""Writes TensorBoard events: of the mean over the runs with its band, and of each run.

scalars      metrics of each split
images       augmented images, and the confusion matrix of each split
histograms   parameters, where config.histograms_every asks for them
hparams      the seed and the swept values of each run
"""

import contextlib
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from jax.sharding import Mesh

from cv_jax.runtime.mesh import replicated
from cv_jax.workdir.bucket import Growing

NUM_BINS = 64  # of a histogram
# TensorBoard sees events at most this much later.
FLUSH_SECONDS = 10
# Prefixes of the tags that every start of a program writes, and that its end writes.
AT_START = ("augmented", "_hparams_/session_start_info")
AT_END = ("final_", "confusion/", "_hparams_/session_end_info")


class Counted(NamedTuple):
    """The histogram of an array of parameters, for each of r runs.

    Attributes:
        edges: (r, 65), of bins of equal width, from the minimum to the maximum.
        counts: (r, 64) int32, values in each bin. A value on an edge counts in the upper bin, the
            maximum in the last bin.
        sum, sum_squares: (r,), of all values.
    """

    edges: jax.Array
    counts: jax.Array
    sum: jax.Array
    sum_squares: jax.Array


@partial(jax.jit, static_argnames="mesh")
def count_values(params: Any, mesh: Mesh) -> dict[str, Counted]:
    """Returns the histogram of each array (r, ...) by its path, replicated over the mesh."""

    def count(values):  # of one run
        values = values.astype(jnp.float32)
        edges = jnp.linspace(values.min(), values.max(), NUM_BINS + 1)
        # A sum for each edge instead of a scatter, which would gather sharded parameters.
        below = jax.lax.map(lambda edge: (values < edge).sum(dtype=jnp.int32), edges[1:-1])
        counts = jnp.diff(below, prepend=0, append=values.size)
        return Counted(edges, counts, values.sum(), jnp.square(values).sum())

    counted = {
        jax.tree_util.keystr(path, simple=True, separator="/"): jax.vmap(count)(array)
        for path, array in jax.tree_util.tree_leaves_with_path(params)
    }
    return jax.lax.with_sharding_constraint(counted, replicated(mesh))


class Board:
    """Writes event files: the mean in `workdir`, each of several runs in `workdir`/runs/NAME.

    Args:
        workdir: the work directory.
        names: names of the runs.
        start_step: steps already made. Events of later steps are removed.
        total: steps of the training. Events that are written again at `start_step` are removed.
        headline: name of the metric that ranks runs. "Custom scalars" show it on val, and the
            losses, as the mean of several runs with one standard deviation to either side.
    """

    def __init__(
        self, workdir: Path, names: Sequence[str], start_step: int, total: int, headline: str
    ):
        with _without_pytorch():
            from tensorboardX import summary
        self._summary = summary
        self._banded = tuple(dict.fromkeys(("train/loss", "val/loss", f"val/{headline}")))
        again = AT_START + (AT_END if start_step == total else ())
        self._mean = _Events(workdir, start_step, again)
        self._runs: list[_Events] = []
        if len(names) > 1:
            folders = [workdir / "runs" / name.replace("/", "_") for name in names]
            self._runs = [_Events(folder, start_step, again) for folder in folders]
            if not start_step:  # a resumed run has them already
                charts = {tag: ["Margin", [tag, *_edges(tag)]] for tag in self._banded}
                self._mean.add(summary.custom_scalars({"runs": charts}), 0)
        self._each = self._runs or [self._mean]

    def scalars(self, split: str, values: dict[str, np.ndarray], step: int) -> None:
        """Writes the finite values of (r,), one for each run, or (1,), one for the program."""
        for name, numbers in values.items():
            tag, finite = f"{split}/{name}", numbers[np.isfinite(numbers)]
            if not len(finite):
                continue
            self._mean.add(self._summary.scalar(tag, finite.mean()), step)
            if self._runs and tag in self._banded:
                std = finite.std(ddof=1) if len(finite) > 1 else 0.0
                for edge, sign in zip(_edges(tag), (-1, 1), strict=True):
                    self._mean.add(self._summary.scalar(edge, finite.mean() + sign * std), step)
            if len(numbers) == len(self._runs):
                for events, number in zip(self._runs, numbers, strict=True):
                    if np.isfinite(number):
                        events.add(self._summary.scalar(tag, number), step)

    def begin(self, values: Sequence[dict[str, Any]], step: int) -> None:
        """Writes the hyperparameters of each run.

        The summary of the experiment is left out: TensorBoard would use that of one program for
        all. Without a summary TensorBoard lists the hyperparameters of all programs.
        """
        for events, of_run in zip(self._each, values, strict=True):
            _, start, _ = self._summary.hparams(of_run, {})
            events.add(start, step)

    def end(self, step: int) -> None:
        """Marks the runs as complete."""
        _, _, end = self._summary.hparams({}, {})
        for events in self._each:
            events.add(end, step)

    def histograms(self, counted: dict[str, Counted], step: int) -> None:
        """Writes the result of `count_values`, without arrays that are not finite."""
        for path, arrays in counted.items():
            for events, edges, counts, total, squares in zip(self._each, *arrays, strict=True):
                if not np.isfinite([*edges, total, squares]).all():
                    continue
                numbers = (edges[0], edges[-1], counts.sum(), total, squares)
                tag = f"params/{path}"
                events.add(self._summary.histogram_raw(tag, *numbers, edges[1:], counts), step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Writes an image (h, w, 3) uint8."""
        self._mean.add(self._summary.image(tag, image, dataformats="HWC"), step)

    def close(self) -> None:
        """Writes the events that are still in memory."""
        with contextlib.ExitStack() as stack:  # closes all files where one cannot be written
            for events in (self._mean, *self._runs):
                stack.callback(events.close)


def _edges(tag: str) -> list[str]:
    return [f"band/{tag}/low", f"band/{tag}/high"]


class _Events:
    """An event file. This thread writes, so that a failed write raises its error here.

    TensorBoard reads the files of a folder in the order of their names. The names begin with a
    number, so that a clock that is set back does not change the order. In all files together, a tag
    has at most one value at a step.
    """

    def __init__(self, folder: Path, start_step: int, again: tuple[str, ...]):
        with _without_pytorch():
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.record_writer import RecordWriter, register_writer_factory
        # tensorboardX's own writer for gs:// has no interval, and writes again when it is deleted.
        register_writer_factory("gs", SimpleNamespace(open=lambda path: Growing(Path(path))))
        self._event = Event
        folder.mkdir(parents=True, exist_ok=True)
        earlier = sorted(folder.glob("events.out.tfevents.*"))
        for path in earlier:
            _take_back(path, start_step, again)
        number = len(earlier)
        name = f"events.out.tfevents.{number:06d}.{socket.gethostname()}"
        self._file = RecordWriter(str(folder / name))
        self._flushed = time.perf_counter()
        self._write(file_version="brain.Event:2")
        # Tells a running TensorBoard to forget the later steps that it has read.
        self._write(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, summary: Any, step: int) -> None:
        self._write(step=step, summary=summary)
        if time.perf_counter() - self._flushed > FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.perf_counter()

    def _write(self, **fields: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        self._file.close()


def _take_back(path: Path, start_step: int, again: tuple[str, ...]) -> None:
    """Removes events from a file: those after `start_step`, and tags `again` at that step.

    At step 0 all events are removed. Everything after a damaged record, such as one that a kill cut
    off, is removed too. The file is replaced, so that a program that reads the old file still can.
    """
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    data, at, kept = path.read_bytes(), 0, bytearray()
    while at < len(data):
        # A record: the length as 8 bytes, their checksum as 4, the event, its checksum as 4.
        size = 16 + int.from_bytes(data[at : at + 8], "little")
        if at + size > len(data):
            break
        try:
            event = Event.FromString(data[at + 12 : at + size - 4])
        except DecodeError:  # no reader can read beyond a damaged record
            break
        tags = [value.tag for value in event.summary.value]
        before = event.step < start_step
        at_it = event.step == start_step > 0 and not any(tag.startswith(again) for tag in tags)
        if not tags or before or at_it:
            kept += data[at : at + size]
        at += size
    if len(kept) < len(data):
        scratch = path.with_name("events.tmp")
        scratch.write_bytes(bytes(kept))
        scratch.replace(path)


@contextlib.contextmanager
def _without_pytorch() -> Iterator[None]:
    """Keeps tensorboardX from importing PyTorch, which takes 1.2 s where PyTorch is installed."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # means "not installed" to tensorboardX
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


def image_grid(images: np.ndarray, columns: int = 8, gap: int = 2) -> np.ndarray:
    """Lays images (b, h, w, c), float in [0, 1], out as one (rows*, columns*, 3) uint8 image."""
    images = np.asarray(images)
    images = (np.clip(images, 0, 1) * 255).round().astype(np.uint8)
    images = np.pad(images, ((0, -len(images) % columns), (0, gap), (0, gap), (0, 0)))
    b, h, w, c = images.shape
    grid = images.reshape(b // columns, columns, h, w, c).swapaxes(1, 2)
    grid = grid.reshape(b // columns * h, columns * w, c)
    return np.broadcast_to(grid, (*grid.shape[:2], 3)) if c == 1 else grid
