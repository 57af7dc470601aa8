"""Measures the input side alone: batches and augmentation without a network, and loading.

    python -m benchmarks.input --config=configs/cifar10.py --batch_sizes=128,500,2000

"resident" and "stream" are the two kinds of batches in cv_jax/data/batches.py. They run in the
training loop, whose step here only augments the batch and sums its pixels. "load" is `load_dataset`
in a fresh process, without the import of JAX: "first" decodes, "cached" maps the decoded files.
"""

import itertools
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from benchmarks.machine import ROOT, make_parser, save
from benchmarks.ours import loop
from cv_jax.augment.chain import make_augment
from cv_jax.data import Dataset, load_dataset
from cv_jax.data.batches import make_batches
from cv_jax.runtime.keys import derive_keys
from cv_jax.runtime.mesh import make_mesh
from cv_jax.runtime.startup import prepare_jax

LOAD = """
import json, sys, time
from cv_jax.config.base import base_config
from cv_jax.data import load_dataset
config = base_config().data
config.update(json.loads(sys.argv[1]))
start = time.perf_counter()
load_dataset(config)
print(time.perf_counter() - start)
"""


class Counter(NamedTuple):
    """The only state that batches need: the step."""

    step: jax.Array


def make_step(augment: str, num_classes: int) -> Callable:
    """Builds a training step that only augments; its metric, the mean pixel, needs all pixels."""
    op = make_augment(augment)

    def step(state, batch, key):
        image = batch["image"].astype(jnp.float32) / 255
        label = jax.nn.one_hot(batch["label"], num_classes)
        image = op(key, {**batch, "image": image, "label": label})["image"]
        return Counter(state.step + 1), {"pixel": (image.sum(), jnp.float32(image.size))}

    return step


def time_batches(
    config: ml_collections.ConfigDict, data: Dataset, num_steps: int, rounds: int
) -> dict[str, Any]:
    """Measures images per second of `config`'s batches and augmentation, and seconds per round."""
    keys = derive_keys(config.seed)
    batches = make_batches(config, data.train, keys.order, make_mesh())
    step = make_step(config.augment, data.spec.num_classes)
    steps = loop(step, batches, Counter(jnp.int32(0)), keys.step)
    marks = []
    for _ in range(rounds + 1):  # the first round is not counted
        steps(num_steps)
        marks.append(time.perf_counter())
    seconds = [end - start for start, end in itertools.pairwise(marks)]
    images = num_steps * config.batch_size
    return {"images_per_second": images / statistics.median(seconds), "rounds": seconds}


def measure(
    config: ml_collections.ConfigDict,
    data: Dataset,
    batch_sizes: Sequence[int],
    num_images: int,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Measures all batch sizes, with about `num_images` a round: {"resident/500": ..., ...}."""
    results = {}
    for size in batch_sizes:
        for way in ("resident", "stream"):
            config.batch_size, config.data.stream = size, way == "stream"
            num_steps = max(1, num_images // size)
            results[f"{way}/{size}"] = time_batches(config, data, num_steps, rounds)
    return results


def time_load(config: ml_collections.ConfigDict) -> dict[str, float]:
    """Measures the seconds of loading the data set: {"first", "cached"}, from an empty cache."""
    command = [sys.executable, "-c", LOAD, json.dumps(config.data.to_dict())]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "CV_JAX_CACHE": cache}
        return {
            name: float(subprocess.check_output(command, cwd=ROOT, env=environment))
            for name in ("first", "cached")
        }


def main() -> None:
    """Measures and prints; writes the record if --out is given."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--config", default="configs/cifar10.py")
    parser.add_argument("--batch_sizes", default="4,128,500,2000")
    parser.add_argument("--images", type=int, default=20_000, help="images in a round")
    args = parser.parse_args()
    prepare_jax()
    config = runpy.run_path(args.config)["get_config"]()
    data = load_dataset(config.data)
    sizes = [int(size) for size in args.batch_sizes.split(",")]
    batches = measure(config, data, sizes, args.images, args.rounds)
    for name, result in batches.items():
        print(f"{name:<14} {result['images_per_second']:12,.0f} images/s")
    load = time_load(config)
    print(f"load           first {load['first']:.2f} s, cached {load['cached']:.2f} s")
    results = {"augment": config.augment, "batches": batches, "load_seconds": load}
    save("input", args, results)


if __name__ == "__main__":
    main()
