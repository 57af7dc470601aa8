"""Makes training steps of one variant on request; benchmarks.step starts this process.

    python -m benchmarks.worker VARIANT MODEL BATCH_SIZE DEVICE

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

from cv_jax.runtime.huge_pages import use_huge_pages

# (height, width) of the images and the number of resident ones, by model.
IMAGES = {
    **dict.fromkeys(("n94", "resnet18"), ((32, 32), 50_000)),  # CIFAR-10's
    **dict.fromkeys(("resnet50", "vit_s16", "convnext_t"), ((224, 224), 640)),
    **dict.fromkeys(("resnet18_240x320", "detector"), ((240, 320), 320)),
}
MEAN, STD = (0.49, 0.50, 0.51), (0.20, 0.21, 0.22)  # per channel, in [0, 1]
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4

Steps = Callable[[int], float]  # makes this many steps; returns the loss of the last step


def random_images(count: int, size: tuple[int, int] = (32, 32)) -> tuple[np.ndarray, np.ndarray]:
    """Draws images (count, *size, 3) uint8, a pattern for each of 10 classes under noise.

    Returns:
        The images, and their labels (count,) int32.
    """
    rng = np.random.default_rng(0)
    label = rng.integers(0, 10, count, np.int32)
    pattern = rng.integers(0, 128, (10, *size, 3), np.uint8)
    return pattern[label] + rng.integers(0, 128, (count, *size, 3), np.uint8), label


def random_boxes(
    count: int, size: tuple[int, int] = (32, 32), objects: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Draws boxes in images of `size`, with sides of 8 pixels to half of the image's.

    Returns:
        Corners x0 y0 x1 y1 (count, objects, 4) float32, and classes (count, objects) int32.
    """
    rng = np.random.default_rng(0)
    whole = np.array(size[::-1])
    sides = rng.uniform(8, whole / 2, (count, objects, 2))
    low = rng.uniform(0, whole - sides)
    boxes = np.concatenate([low, low + sides], axis=2).astype(np.float32)
    return boxes, rng.integers(0, 10, (count, objects), np.int32)


def make_steps(variant: str, model: str, batch_size: int, device: str) -> Steps:
    """Builds a variant: cv_jax-DTYPE or torch-DTYPE[-channels_last][-compile].

    Args:
        variant: see above.
        model: one of those of benchmarks.step.
        batch_size: images a step.
        device: "cpu" or "gpu". JAX takes it from the environment that benchmarks.step sets.
    """
    side, dtype, *options = variant.split("-")
    if side == "cv_jax":
        from benchmarks.ours import jax_steps

        return jax_steps(model, batch_size, dtype)
    from benchmarks.torch_models import torch_steps

    return torch_steps(
        model,
        batch_size,
        dtype,
        channels_last="channels_last" in options,
        num_threads=len(os.sched_getaffinity(0)),
        device={"cpu": "cpu", "gpu": "cuda"}[device],
        compiled="compile" in options,
    )


def peak_bytes(variant: str, device: str) -> int:
    """Reads the largest memory so far: resident memory of this process, or that of its GPU arrays.

    From VmHWM, not ru_maxrss: on Linux the latter starts from the parent's value at the fork.
    """
    if device == "gpu":
        if variant.startswith("cv_jax"):
            import jax

            return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def main(variant: str, model: str, batch_size: str, device: str) -> None:
    """Answers requests until stdin ends."""
    if variant.startswith("cv_jax"):
        use_huge_pages()  # as train.py does
    steps = make_steps(variant, model, int(batch_size), device)
    print("{}", flush=True)
    for line in sys.stdin:
        steps(1)
        start = time.perf_counter()
        loss = steps(int(line))
        seconds = time.perf_counter() - start
        peak = peak_bytes(variant, device)
        answer = {"seconds": seconds, "loss": loss, "peak_bytes": peak}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
