"""TensorBoard: the mean over the runs of a program with its band, and each run by itself."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# What "custom scalars" show of several runs: the mean, and one standard deviation to either side.
BANDS = ("train/loss", "val/loss", "val/accuracy")


class Board:
    """Event files: in `workdir` of the mean, in `workdir`/runs/NAME of each of several runs.

    Args:
        workdir: of the program.
        names: of its runs.
        start_step: steps already made; what is there of later ones is taken back.
    """

    def __init__(self, workdir: Path, names: Sequence[str], start_step: int):
        self._mean = _open_writer(workdir, start_step)
        self._runs = []
        if len(names) > 1:
            folders = [workdir / "runs" / name.replace("/", "_") for name in names]
            self._runs = [_open_writer(folder, start_step) for folder in folders]
            charts = {tag: ["Margin", [tag, *_edges(tag)]] for tag in BANDS}
            self._mean.add_custom_scalars({"runs": charts})

    def scalars(self, split: str, values: dict[str, np.ndarray], step: int) -> None:
        """Takes values (r,), one a run, or (1,), one of the program; what is not finite is left."""
        for name, numbers in values.items():
            tag, finite = f"{split}/{name}", numbers[np.isfinite(numbers)]
            if not len(finite):
                continue
            self._mean.add_scalar(tag, finite.mean(), step)
            if self._runs and tag in BANDS:
                std = finite.std(ddof=1) if len(finite) > 1 else 0.0
                for edge, sign in zip(_edges(tag), (-1, 1), strict=True):
                    self._mean.add_scalar(edge, finite.mean() + sign * std, step)
            if len(numbers) == len(self._runs):
                for writer, number in zip(self._runs, numbers, strict=True):
                    if np.isfinite(number):
                        writer.add_scalar(tag, number, step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Takes an image (h, w, 3) uint8."""
        self._mean.add_image(tag, image, step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is still in memory."""
        for writer in (self._mean, *self._runs):
            writer.close()


def _edges(tag: str) -> list[str]:
    return [f"band/{tag}/low", f"band/{tag}/high"]


def _open_writer(folder: Path, start_step: int) -> Any:
    """tensorboardX's SummaryWriter, without PyTorch: importing that, where it is, takes 1.2 s."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # what tensorboardX takes for "not installed"
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=10)
