"""Batches as a pure function of (seed, step), from resident arrays or from a stream.

Both ways give the loop the same three functions, and the same batches bit for bit. There is no
iterator, so nothing of the data's order has to be saved: the step number says it all. Given the
keys of several runs, a feed holds what each of them reads; the data itself it holds once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding

from cv_jax.config.errors import UserError
from cv_jax.data.dataset import Split
from cv_jax.runtime.mesh import (
    divide,
    put,
    replicated,
    run_sharding,
    stream_sharding,
)

# Batches that a stream hands over at once: enough to hide the dispatch, little enough to hold.
STREAM_STEPS = 8


class RandomAccess(Protocol):
    """What a stream reads: examples by their position, in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> Split: ...


class Batches(NamedTuple):
    """The training batches.

    Attributes:
        limit: step -> the most steps that one feed may hold from there on.
        feed: (step, num_steps) -> arrays that hold the batches of these steps. Its shapes never
            change, so that a program compiled for one feed takes them all.
        pick: (feed of one run, step) -> batch; pure, called inside jit with a traced step.
        shapes: a batch, as ShapeDtypeStructs.
        axes: for jax.vmap, where the feed of several runs has its axis of runs: 0 or None.
    """

    limit: Callable[[int], int]
    feed: Callable[[int, int], Any]
    pick: Callable[[Any, jax.Array], dict]
    shapes: dict
    axes: dict[str, int | None]


class SplitStream(NamedTuple):
    """A split in host memory, read as a stream."""

    split: Split

    def __len__(self) -> int:
        return len(self.split.label)

    def __getitem__(self, indices: np.ndarray) -> Split:
        return Split(self.split.image[indices], self.split.label[indices])


def make_batches(
    config: ml_collections.ConfigDict, split: Split, key: jax.Array, mesh: Mesh
) -> Batches:
    """The training batches in the way that `config.data.stream` chooses."""
    if config.data.stream:
        return stream_batches(SplitStream(split), config.batch_size, key, mesh)
    return resident_batches(split, config.batch_size, key, mesh)


def epoch_order(key: jax.Array, epoch: jax.Array, num_train: int, batch_size: int) -> jax.Array:
    """The examples of an epoch: (steps, b) int32, a permutation without its incomplete batch."""
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_train).astype(jnp.int32)
    num_steps = num_train // batch_size
    return order[: num_steps * batch_size].reshape(num_steps, batch_size)


def _shapes(image_shape: tuple[int, ...], batch_size: int) -> dict:
    """The shapes of a batch of uint8 images (h, w, c)."""
    shapes = {"image": jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8)}
    for name in ("label", "index", "epoch"):
        shapes[name] = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return {**shapes, "coin": jax.ShapeDtypeStruct((batch_size,), jnp.uint32)}


def _tag(key: jax.Array, index: jax.Array, epoch: jax.Array) -> dict:
    """What a batch says of its examples: position, epoch, and a coin of 32 random bits.

    The coin belongs to the example for the whole run; it differs between seeds.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    coin = jax.vmap(partial(jax.random.bits, dtype=jnp.uint32))(keys)
    return {"index": index, "epoch": jnp.full(index.shape, epoch), "coin": coin}


def resident_batches(split: Split, batch_size: int, key: jax.Array, mesh: Mesh) -> Batches:
    """Batches gathered on the device, where the whole split lives as uint8.

    Args:
        split: image (m, h, w, c) uint8 and label (m,) int32; a copy goes to every device.
        batch_size: examples in a batch.
        key: of the data order; or (r,) keys, of r runs.
        mesh: its devices share each batch, and runs.
    """
    steps_per_epoch = _steps_per_epoch(len(split.label), batch_size)
    arrays = {"image": np.asarray(split.image), "label": split.label}
    arrays = put(arrays, replicated(mesh))
    order_of = _make_order_of(key, len(split.label), batch_size, _own_sharding(key, mesh))
    orders: dict[int, jax.Array] = {}

    def feed(step, num_steps):
        epoch = step // steps_per_epoch
        if epoch not in orders:
            orders.clear()
            orders[epoch] = order_of(epoch)
        return {**arrays, "order": orders[epoch], "epoch": np.int32(epoch), "key": key}

    def pick(feed, step):
        index = feed["order"][step % steps_per_epoch]
        # Each example is found in one of the replicas: the gather moves nothing between devices.
        index = divide(index, mesh)
        batch = {name: feed[name][index] for name in ("image", "label")}
        return jax.lax.optimization_barrier({**batch, **_tag(feed["key"], index, feed["epoch"])})

    return Batches(
        limit=lambda step: steps_per_epoch - step % steps_per_epoch,
        feed=feed,
        pick=pick,
        shapes=_shapes(split.image.shape[1:], batch_size),
        axes={"image": None, "label": None, "order": 0, "epoch": None, "key": 0},
    )


def stream_batches(source: RandomAccess, batch_size: int, key: jax.Array, mesh: Mesh) -> Batches:
    """Batches read on the host, a few at a time, for data that the device does not hold.

    Args:
        source: the training split; `source[indices]` gives these examples as a Split.
        batch_size: examples in a batch.
        key: of the data order, which is the one of `resident_batches`; or (r,) keys, of r runs.
        mesh: its devices share each batch, and runs; a process reads what its own devices need.
    """
    num_train = len(source)
    steps_per_epoch = _steps_per_epoch(num_train, batch_size)
    order_of = _make_order_of(key, num_train, batch_size, replicated(mesh))
    orders: dict[int, np.ndarray] = {}
    sharding = stream_sharding(mesh, of_runs=key.ndim > 0)
    image_shape = source[np.arange(1)].image.shape[1:]

    def read(index):
        """The examples at (r, k, b) or (k, b), with zeros for the steps that are not there."""
        image, label = source[index.reshape(-1)]
        arrays = {
            "image": np.asarray(image).reshape(*index.shape, *image_shape),
            "label": np.asarray(label).reshape(index.shape),
            "index": index,
        }
        steps_axis = key.ndim
        spare = STREAM_STEPS - index.shape[steps_axis]
        return {
            name: np.pad(array, [(0, spare * (axis == steps_axis)) for axis in range(array.ndim)])
            for name, array in arrays.items()
        }

    def limit(step):
        return min(STREAM_STEPS, steps_per_epoch - step % steps_per_epoch)

    def feed(step, num_steps):
        epoch = step // steps_per_epoch
        if epoch not in orders:
            orders.clear()
            orders[epoch] = np.asarray(order_of(epoch))
        first = step % steps_per_epoch
        index = orders[epoch][..., first : first + num_steps, :]
        held = (*index.shape[:-2], STREAM_STEPS, batch_size)
        shards: dict[str, list[jax.Array]] = {}
        for device, part in sharding.addressable_devices_indices_map(held).items():
            for name, array in read(index[part]).items():
                shards.setdefault(name, []).append(jax.device_put(array, device))
        arrays = {
            name: jax.make_array_from_single_device_arrays(
                (*held, *parts[0].shape[len(held) :]), sharding, parts
            )
            for name, parts in shards.items()
        }
        return {**arrays, "first": np.int32(step), "epoch": np.int32(epoch), "key": key}

    def pick(feed, step):
        i = step - feed["first"]
        batch = {name: feed[name][i] for name in ("image", "label", "index")}
        batch = divide(batch, mesh)
        # The barrier keeps the compiler from shaping the step to where its batch comes from:
        # both ways run the same arithmetic, to the last bit.
        tag = _tag(feed["key"], batch["index"], feed["epoch"])
        return jax.lax.optimization_barrier({**batch, **tag})

    axes = {"image": 0, "label": 0, "index": 0, "first": None, "epoch": None, "key": 0}
    return Batches(limit, feed, pick, _shapes(image_shape, batch_size), axes)


def _own_sharding(key: jax.Array, mesh: Mesh) -> NamedSharding:
    """Of what each run has of its own, where `key` holds the keys of several."""
    return run_sharding(mesh) if key.ndim else replicated(mesh)


def _make_order_of(
    key: jax.Array, num_train: int, batch_size: int, sharding: NamedSharding
) -> Callable[[int], jax.Array]:
    """Returns epoch -> `epoch_order` of each key, (steps, b) or (r, steps, b)."""
    order = partial(epoch_order, num_train=num_train, batch_size=batch_size)
    order = jax.vmap(order, (0, None)) if key.ndim else order
    return partial(jax.jit(order, out_shardings=sharding), key)


def _steps_per_epoch(num_train: int, batch_size: int) -> int:
    if not 0 < batch_size <= num_train:
        raise UserError(
            f"config.batch_size={batch_size} must be between 1 and the {num_train} training "
            "examples that config.data.num_val and config.data.limit leave."
        )
    return num_train // batch_size


def padded_batches(split: Split, batch_size: int) -> list[dict[str, np.ndarray]]:
    """Lays a split out as whole batches: image (b, h, w, c), label (b,), mask (b,).

    The last batch is filled up with zeros, for which the mask is 0.
    """
    count = len(split.label)

    def part(array, start):
        rows = array[start : start + batch_size]
        padded = np.zeros((batch_size, *array.shape[1:]), array.dtype)
        padded[: len(rows)] = rows
        return padded

    arrays = {"image": split.image, "label": split.label, "mask": np.ones(count, np.float32)}
    return [
        {name: part(array, start) for name, array in arrays.items()}
        for start in range(0, count, batch_size)
    ]
