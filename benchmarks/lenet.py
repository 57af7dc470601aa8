"""Compares PyTorch's tutorial program with train.py --config=configs/cifar10_lenet.py.

    python -m benchmarks.lenet --epochs=1 --rounds=3

Both train on all 50,000 images of CIFAR-10, four a step, and classify the 10,000 test images. The
tutorial normalises to [-1, 1], the config to [0, 1]. Each round runs one after the other.
"wall" is the seconds from command to exit: start, imports, reading the decoded data, compiling
(with an empty cache of compiled programs), training, evaluation. "epoch" is the seconds of an
epoch's steps alone. "whole_epoch" is the seconds of reading, training and evaluation divided by the
epochs; PyTorch reads during its steps.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import make_parser, paired_ratio, save, timed_run
from cv_jax.config.base import base_config
from cv_jax.data import load_dataset


def write_data(directory: Path) -> None:
    """Writes CIFAR-10 as .npy files for the PyTorch program, and fills cv_jax's cache."""
    config = base_config()
    config.data.name = "cifar10"
    data = load_dataset(config.data)
    for name in ("train", "test"):
        for kind, array in getattr(data, name)._asdict().items():
            np.save(directory / f"{name}.{kind}.npy", array)


def run_torch(data: Path, epochs: int) -> dict[str, Any]:
    """Runs the tutorial's program once."""
    wall, output = timed_run(["benchmarks/torch_lenet.py", str(data), f"--epochs={epochs}"])
    result = json.loads(output.splitlines()[-1])
    return {"wall": wall, **per_epoch(result["seconds"], epochs), **result}


def run_ours(epochs: int) -> dict[str, Any]:
    """Runs train.py once, in a new work directory, with an empty compilation cache."""
    with tempfile.TemporaryDirectory() as scratch:
        command = ["train.py", "--config=configs/cifar10_lenet.py", f"--config.epochs={epochs}.0"]
        command.append(f"--workdir={scratch}/run")
        cache = f"{scratch}/xla"
        wall, _ = timed_run(command, JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR=cache)
        result = json.loads(Path(scratch, "run/result.json").read_text())
    accuracy, seconds = result["test"]["accuracy"]["mean"], result["seconds"]
    return {"wall": wall, **per_epoch(seconds, epochs), "accuracy": accuracy, "seconds": seconds}


def per_epoch(seconds: dict[str, float], epochs: int) -> dict[str, float]:
    """Computes "epoch" and "whole_epoch", see above, from the seconds of a run."""
    whole = seconds.get("data", 0) + seconds["train"] + seconds["eval"]
    return {"epoch": seconds["train"] / epochs, "whole_epoch": whole / epochs}


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Computes each side's medians and the ratios of PyTorch's seconds to ours; adds the runs."""

    def column(side, key):
        return [run[key] for run in runs[side]]

    keys = ("wall", "epoch", "whole_epoch", "accuracy")
    return {
        "medians": {
            side: {key: statistics.median(column(side, key)) for key in keys} for side in runs
        },
        "speed": {
            key: paired_ratio(column("torch", key), column("cv_jax", key)) for key in keys[:3]
        },
        "runs": runs,
    }


def main() -> None:
    """Runs both programs in turn and prints the medians; writes the record if --out is given."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()
    runs: dict[str, list] = {"cv_jax": [], "torch": []}
    with tempfile.TemporaryDirectory() as data:
        write_data(Path(data))
        for _ in range(args.rounds):
            runs["torch"].append(run_torch(Path(data), args.epochs))
            runs["cv_jax"].append(run_ours(args.epochs))
    results = summarize(runs)
    for side, medians in results["medians"].items():
        print(
            f"{side:<7} wall {medians['wall']:.1f} s, an epoch {medians['epoch']:.1f} s, with "
            f"reading and evaluation {medians['whole_epoch']:.1f} s, "
            f"test accuracy {medians['accuracy']:.4f}"
        )
    for key, ratio in results["speed"].items():
        print(f"{key:<11} cv_jax is {ratio['median']:.2f} times as fast")
    save("lenet", args, results)


if __name__ == "__main__":
    main()
