"""TensorBoard: the mean over the runs of a program with its band, and each run by itself."""

import contextlib
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from etils.epath import Path

from cv_jax.bucket import Growing

# What "custom scalars" show of several runs: the mean, and one standard deviation to either side.
BANDS = ("train/loss", "val/loss", "val/accuracy")
# How old what TensorBoard can show may be.
FLUSH_SECONDS = 10


class Board:
    """Event files: in `workdir` of the mean, in `workdir`/runs/NAME of each of several runs.

    Args:
        workdir: of the program.
        names: of its runs.
        start_step: steps already made; what is there of later ones is taken back.
    """

    def __init__(self, workdir: Path, names: Sequence[str], start_step: int):
        with _without_pytorch():
            from tensorboardX import summary
        self._summary = summary
        self._mean = _Events(workdir, start_step)
        self._runs = []
        if len(names) > 1:
            folders = [workdir / "runs" / name.replace("/", "_") for name in names]
            self._runs = [_Events(folder, start_step) for folder in folders]
            charts = {tag: ["Margin", [tag, *_edges(tag)]] for tag in BANDS}
            self._mean.add(summary.custom_scalars({"runs": charts}), 0)

    def scalars(self, split: str, values: dict[str, np.ndarray], step: int) -> None:
        """Takes values (r,), one a run, or (1,), one of the program; what is not finite is left."""
        for name, numbers in values.items():
            tag, finite = f"{split}/{name}", numbers[np.isfinite(numbers)]
            if not len(finite):
                continue
            self._mean.add(self._summary.scalar(tag, finite.mean()), step)
            if self._runs and tag in BANDS:
                std = finite.std(ddof=1) if len(finite) > 1 else 0.0
                for edge, sign in zip(_edges(tag), (-1, 1), strict=True):
                    self._mean.add(self._summary.scalar(edge, finite.mean() + sign * std), step)
            if len(numbers) == len(self._runs):
                for events, number in zip(self._runs, numbers, strict=True):
                    if np.isfinite(number):
                        events.add(self._summary.scalar(tag, number), step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Takes an image (h, w, 3) uint8."""
        self._mean.add(self._summary.image(tag, image, dataformats="HWC"), step)

    def close(self) -> None:
        """Writes what is still in memory."""
        with contextlib.ExitStack() as stack:  # closes the others where one cannot be written
            for events in (self._mean, *self._runs):
                stack.callback(events.close)


def _edges(tag: str) -> list[str]:
    return [f"band/{tag}/low", f"band/{tag}/high"]


class _Events:
    """An event file, written by this thread: where that fails, it fails here.

    TensorBoard reads the files of a folder in the order of their names, which number them: a clock
    that was set back does not change it.
    """

    def __init__(self, folder: Path, start_step: int):
        with _without_pytorch():
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.record_writer import RecordWriter, register_writer_factory
        # Its own for gs:// knows no interval, and writes once more when it is forgotten.
        register_writer_factory("gs", SimpleNamespace(open=lambda path: Growing(Path(path))))
        self._event = Event
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("events.out.tfevents.*")))
        name = f"events.out.tfevents.{number:06d}.{socket.gethostname()}"
        self._file = RecordWriter(str(folder / name))
        self._flushed = time.perf_counter()
        self._write(file_version="brain.Event:2")
        # Events of later steps, in the files before this one, do not count any more.
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


@contextlib.contextmanager
def _without_pytorch() -> Iterator[None]:
    """For tensorboardX, which imports PyTorch where that is installed: 1.2 s."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # what tensorboardX takes for "not installed"
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]
