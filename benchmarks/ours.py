"""cv_jax's side of the benchmarks: the program of train.py, also on plain lax."""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from benchmarks.worker import (
    IMAGES,
    LR,
    MEAN,
    MOMENTUM,
    STD,
    WEIGHT_DECAY,
    Steps,
    random_boxes,
    random_images,
)
from cv_jax.config.base import base_config
from cv_jax.config.plan import Intervals, plan_chunks
from cv_jax.data import DataSpec, boxes_fields, image_field, label_field
from cv_jax.data.batches import Batches, make_batches
from cv_jax.data.fields import take
from cv_jax.models.ops import plain_lax
from cv_jax.runtime.keys import Keys, derive_keys
from cv_jax.runtime.mesh import make_mesh
from cv_jax.runtime.startup import prepare_jax
from cv_jax.tasks import Task, build_task
from cv_jax.train.chunks import make_train_chunk


def step_config(model: str, batch_size: int, dtype: str) -> ml_collections.ConfigDict:
    """Returns the config of both sides: no augmentation, SGD with Nesterov, a constant rate."""
    config = base_config()
    if model == "detector":
        config.task = "detection"
    photographs = {
        "detector": "resnet18(stem='imagenet')",
        "resnet50": "resnet50(stem='imagenet')",
        "resnet18_240x320": "resnet18(stem='imagenet')",
    }
    config.model = photographs.get(model, model)
    config.batch_size, config.dtype = batch_size, dtype
    config.optim.name = "sgd(nesterov=True)"
    config.optim.lr, config.optim.lr_batch_size = LR, 0
    config.optim.momentum, config.optim.weight_decay = MOMENTUM, WEIGHT_DECAY
    config.optim.schedule = "constant"
    if model == "n94":
        config.optim.rules = (("whiten/kernel", "frozen"), (".*", "base"))
    return config


def build(
    config: ml_collections.ConfigDict, num_train: int, size: tuple[int, int] = (32, 32)
) -> tuple[Task, Batches, Keys]:
    """Builds the task, resident batches of random images of `size`, and the keys."""
    image, label = random_images(num_train, size)
    mean, std = (np.array(values, np.float32) for values in (MEAN, STD))
    names = [f"class {i}" for i in range(10)]
    if config.task == "detection":
        boxes, number = random_boxes(num_train, size)
        no = np.zeros(number.shape, bool)
        train = {"boxes": boxes, "box_label": number, "difficult": no, "crowd": no}
        fields = boxes_fields(names, boxes.shape[1])
    else:
        train, fields = {"label": label}, {"label": label_field(names)}
    train = {"image": image, **train}
    fields = {"image": image_field((*size, 3))._replace(mean=mean, std=std), **fields}
    spec = DataSpec("random", fields, num_train, 0, 0, take(train, slice(5000)))
    keys = derive_keys(config.seed)
    batches = make_batches(config, train, keys.order, make_mesh())
    return build_task(config, spec), batches, keys


def loop(train_step: Callable, batches: Batches, state: Any, key: jax.Array) -> Callable:
    """Builds train.py's loop as a function num_steps -> {metric: mean of the last step}."""
    train_chunk = jax.jit(make_train_chunk(train_step, batches), donate_argnums=0)

    def steps(num_steps: int) -> dict[str, float]:
        nonlocal state
        start = int(state.step)
        intervals = Intervals(start + num_steps, log=0, eval=0, save=0)
        for chunk in plan_chunks(start, intervals, batches.limit, lambda: num_steps):
            feed = batches.feed(chunk.start, chunk.num_steps)
            state, metrics = train_chunk(state, feed, key, np.int32(chunk.num_steps))
        jax.block_until_ready(state)
        last = chunk.num_steps - 1
        return {name: float(total[last] / count[last]) for name, (total, count) in metrics.items()}

    return steps


def jax_steps(model: str, batch_size: int, dtype: str) -> Steps:
    """Builds the steps; a call runs all its steps in one dispatch unless an epoch ends between."""
    prepare_jax()
    size, num_train = IMAGES[model]
    task, batches, keys = build(step_config(model, batch_size, dtype), num_train, size)
    state = jax.jit(task.init)(keys.init)
    steps = loop(task.train_step, batches, state, keys.step)
    return lambda num_steps: steps(num_steps)["loss"]


def check_loss(model: str, batch_size: int, num_steps: int = 20) -> dict[str, list[float]]:
    """Trains in float32 on cv_jax.models.ops and on plain lax, with the same start and batches.

    Prints a line for each step; returns the losses and their relative differences.
    """
    config = step_config(model, batch_size, "float32")
    task, batches, keys = build(config, num_steps * batch_size)
    feed = batches.feed(0, num_steps)

    def losses() -> list[float]:
        @jax.jit
        def step(state, feed, key):
            return task.train_step(state, batches.pick(feed, state.step), key)

        state, values = jax.jit(task.init)(keys.init), []
        for _ in range(num_steps):
            state, metrics = step(state, feed, keys.step)
            values.append(float(np.divide(*metrics["loss"])))
        return values

    ours = losses()
    with plain_lax():
        plain = losses()
    apart = np.abs(np.divide(ours, plain) - 1).tolist()
    for i, (a, b, difference) in enumerate(zip(ours, plain, apart, strict=True), start=1):
        print(f"step {i:2d}  cv_jax {a:.7f}  lax {b:.7f}  relative difference {difference:.1e}")
    return {"cv_jax": ours, "lax": plain, "relative_difference": apart}
