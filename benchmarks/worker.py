"""Makes training steps of one variant on request; benchmarks.step starts this process.

    python -m benchmarks.worker VARIANT MODEL BATCH_SIZE

The worker prints {} when it is ready. Each line on stdin is a number of steps. The worker makes one
uncounted step, then these steps, and prints a line of JSON: seconds, loss (of the last step),
peak_bytes. The uncounted step warms cold caches, and memory that a virtual machine may have taken
back while other workers ran. No side imports the other.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

NUM_TRAIN = 50_000  # resident images, as many as CIFAR-10's
MEAN, STD = (0.49, 0.50, 0.51), (0.20, 0.21, 0.22)  # per channel, in [0, 1]
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4

Steps = Callable[[int], float]  # makes this many steps; returns the loss of the last step


def random_images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws images (count, 32, 32, 3) uint8, a pattern for each of 10 classes under noise.

    Returns:
        The images, and their labels (count,) int32.
    """
    rng = np.random.default_rng(0)
    label = rng.integers(0, 10, count, np.int32)
    pattern = rng.integers(0, 128, (10, 32, 32, 3), np.uint8)
    return pattern[label] + rng.integers(0, 128, (count, 32, 32, 3), np.uint8), label


def make_steps(variant: str, model: str, batch_size: int) -> Steps:
    """Builds a variant: cv_jax-DTYPE, torch-DTYPE or torch-DTYPE-channels_last."""
    side, dtype, *layout = variant.split("-")
    if side == "cv_jax":
        from benchmarks.ours import jax_steps

        return jax_steps(model, batch_size, dtype)
    from benchmarks.torch_models import torch_steps

    cores = len(os.sched_getaffinity(0))
    return torch_steps(model, batch_size, dtype, channels_last=bool(layout), num_threads=cores)


def peak_bytes() -> int:
    """Reads the largest resident memory of this process so far.

    From VmHWM, not ru_maxrss: on Linux the latter starts from the parent's value at the fork.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def main(variant: str, model: str, batch_size: str) -> None:
    """Answers requests until stdin ends."""
    steps = make_steps(variant, model, int(batch_size))
    print("{}", flush=True)
    for line in sys.stdin:
        steps(1)
        start = time.perf_counter()
        loss = steps(int(line))
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "loss": loss, "peak_bytes": peak_bytes()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
