"""Measures the memory of a stream: resident memory of the process over many decoded batches.

    python -m benchmarks.memory --photos=DIR --copies=1,10 --batches=2000 --plot=memory.png

DIR holds image files. Each number of copies is a data set of its own, in a fresh process: the same
files that many times in class folders, as symbolic links. Batches are cropped at random to 224
pixels and given to the device, without training.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.machine import ROOT, make_parser, save
from cv_jax.config.base import base_config
from cv_jax.data import load_dataset
from cv_jax.data.batches import make_batches
from cv_jax.runtime.mesh import make_mesh

EVERY = 20  # batches between two readings


def resident_mb() -> float:
    """Returns the resident memory of this process in MB (Linux)."""
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def stream(folder: str, num_batches: int, batch_size: int) -> dict[str, Any]:
    """Streams batches of a folder; returns the memory after every EVERY of them."""
    config = base_config()
    config.data.update(name="folder", dir=folder, size=224, crop="random_resized")
    config.batch_size, config.steps = batch_size, num_batches
    data = load_dataset(config.data)
    batches = make_batches(config, data.train, jax.random.key(0), make_mesh())
    memory = []
    for step in range(num_batches):
        jax.block_until_ready(batches.feed(step, 1))
        if step % EVERY == 0:
            memory.append(resident_mb())
    return {"images": data.spec.num_train, "memory_mb": memory}


def write_links(photos: Path, folder: Path, copies: int) -> None:
    """Writes links to the files of `photos`, so many times, into two class folders."""
    files = sorted(path for path in photos.iterdir() if path.is_file())
    for i, path in enumerate(files):
        for copy in range(copies):
            link = folder / f"class{i % 2}" / f"{copy:04d}_{path.name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns {copies: what `stream` returns}, each from a process of its own."""
    results = {}
    for copies in map(int, args.copies.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            write_links(Path(args.photos), Path(scratch), copies)
            command = [sys.executable, "-m", "benchmarks.memory", "--photos", scratch, "--worker"]
            command += ["--batches", str(args.batches), "--batch_size", str(args.batch_size)]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        memory = np.array(found["memory_mb"])
        half = len(memory) // 2
        found["growth_mb"] = float(np.median(memory[half:]) - np.median(memory[half // 2 : half]))
        results[str(copies)] = found
        print(
            f"{found['images']:,} training images: {np.median(memory):,.0f} MB at the median, "
            f"{memory.max():,.0f} at most; second half above the quarter before by "
            f"{found['growth_mb']:+.1f} MB",
            flush=True,
        )
    return results


def draw(results: dict[str, Any], file: str) -> None:
    """Draws the memory over the batches as a PNG file."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for found in results.values():
        batches = np.arange(len(found["memory_mb"])) * EVERY
        axes.plot(batches, found["memory_mb"], label=f"{found['images']:,} training images")
    axes.set(xlabel="batches", ylabel="resident memory, MB", ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--photos", required=True, help="directory of image files")
    parser.add_argument("--copies", default="1,10", help="data sets, in copies of the files")
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--plot", help="PNG file for the plot")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(stream(args.photos, args.batches, args.batch_size)))
        return
    results = measure(args)
    save("memory", args, results)
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
