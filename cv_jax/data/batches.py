"""Batches as a pure function of (seed, step), from resident arrays or from a stream.

Both give the training loop the same three functions, and the same batches bit for bit. There is
no iterator, so checkpoints need no position in the data: the step number determines the batch. A
stream reads the next feed in a thread while the devices train on one.
With the keys of several runs, a feed holds each run's order, and the data once.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding

from cv_jax.config import durations
from cv_jax.config.errors import UserError
from cv_jax.data.dataset import padding
from cv_jax.data.encoded import Encoded, read_training
from cv_jax.data.fields import Examples, Field, num_examples, take
from cv_jax.runtime.mesh import (
    divide,
    put,
    replicated,
    run_sharding,
    stream_sharding,
)
from cv_jax.runtime.startup import jit_once

# Batches in one feed of a stream, and their bytes: enough to hide the dispatch, few enough for the
# memory, which holds two feeds.
STREAM_STEPS = 8
STREAM_BYTES = 2**28


class Batches(NamedTuple):
    """The training batches.

    Attributes:
        limit: step -> the most steps that a feed from this step may hold.
        feed: (step, num_steps) -> arrays that hold the batches of these steps. Every feed has the
            same shapes, so one compiled program takes them all.
        pick: (feed of one run, step) -> batch; pure, called inside jit with a traced step.
        shapes: a batch as ShapeDtypeStructs: the fields, and `rows` with index, epoch and coin.
        axes: {name: axis of runs in the feed of several runs, 0 or None}, for jax.vmap.
    """

    limit: Callable[[int], int]
    feed: Callable[[int, int], Any]
    pick: Callable[[Any, jax.Array], dict]
    shapes: dict
    axes: dict[str, int | None]


def make_batches(
    config: ml_collections.ConfigDict,
    split: Examples,
    key: jax.Array,
    mesh: Mesh,
    positions: np.ndarray | None = None,
) -> Batches:
    """Builds the training batches, resident or as a stream, as `streams` says.

    Args:
        config: the runs' config.
        split: the training examples.
        key: PRNG key of the data order; (r,) keys for r runs.
        mesh: devices that share each batch, and the runs.
        positions: (r, m) int32, the training examples of each run; None: all examples.

    Raises:
        UserError: the batch size or `config.data.sampling` does not fit the examples.
    """
    label = _label_to_balance(config, split)
    if streams(config, split):
        count = num_examples(split) if positions is None else positions.shape[-1]
        end = durations.total_steps(config, count)
        return stream_batches(split, config.batch_size, key, mesh, positions, label, end)
    return resident_batches(split, config.batch_size, key, mesh, positions, label)


def _label_to_balance(config: ml_collections.ConfigDict, split: Examples) -> np.ndarray | None:
    """Returns the labels (m,) by which `balanced_order` draws; None where all examples are drawn.

    Raises:
        UserError: an example has no label, or `config.select` is set.
    """
    if config.data.sampling == "uniform":
        return None
    key = f"config.data.sampling={config.data.sampling!r}"
    if "label" not in split:
        raise UserError(
            f"{key} needs the field 'label', and the data set has {', '.join(split)}: set "
            "config.data.sampling='uniform'."
        )
    if config.select:
        raise UserError(
            f"{key} can draw an example twice for a batch, and config.select={config.select!r} "
            "remembers one loss for each example: set config.data.sampling='uniform' or "
            "config.select=''."
        )
    label = np.asarray(split["label"])
    if label.min() < 0:
        raise UserError(
            f"{key} needs a label for every training example: set config.data.sampling='uniform' "
            "or config.data.keep_unlabelled=False."
        )
    return label


def streams(config: ml_collections.ConfigDict, split: Examples) -> bool:
    """Returns whether batches come from the host: by `config.data.stream`, or of encoded images."""
    return config.data.stream or any(isinstance(x, Encoded) for x in split.values())


def epoch_order(key: jax.Array, epoch: jax.Array, num_train: int, batch_size: int) -> jax.Array:
    """Returns the order of an epoch: (steps, b) int32, without the last incomplete batch."""
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_train).astype(jnp.int32)
    num_steps = num_train // batch_size
    return order[: num_steps * batch_size].reshape(num_steps, batch_size)


def balanced_order(
    key: jax.Array, epoch: jax.Array, label: jax.Array, num_classes: int, batch_size: int
) -> jax.Array:
    """Returns an order of an epoch with all classes equally often: (steps, b) int32.

    An epoch is as long as without balance, m // b steps. Of its m // b * b draws, each class that
    has examples gets the same number; those that get one more are chosen at random. The draws of a
    class go through its examples again and again in a random order, so that each is drawn equally
    often, too, up to one. The draws of all classes are then shuffled.

    Args:
        key, epoch, batch_size: see `epoch_order`.
        label: (m,) int32 in [0, num_classes).
        num_classes: the number of classes.
    """
    shuffle, of_classes, of_draws = jax.random.split(jax.random.fold_in(key, epoch), 3)
    sizes = jnp.zeros(num_classes, jnp.int32).at[label].add(1)
    shuffled = jax.random.permutation(shuffle, len(label)).astype(jnp.int32)
    by_class = shuffled[jnp.argsort(label[shuffled])]  # one class after the other, each shuffled
    first = jnp.cumsum(sizes) - sizes
    classes = jax.random.permutation(of_classes, num_classes)
    classes = classes[jnp.argsort(sizes[classes] == 0)]  # those without examples come last
    num_steps = len(label) // batch_size
    draw = jax.random.permutation(of_draws, num_steps * batch_size).astype(jnp.int32)
    num_present = (sizes > 0).sum(dtype=jnp.int32)
    drawn, number = classes[draw % num_present], draw // num_present
    return by_class[first[drawn] + number % sizes[drawn]].reshape(num_steps, batch_size)


def _shapes(examples: Examples, batch_size: int) -> dict:
    """Returns the shapes of a training batch of `examples`."""

    def of(shape, dtype):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    fields = {name: of(x.shape[1:], x.dtype) for name, x in examples.items()}
    rows = {name: of((), np.int32) for name in ("index", "epoch")}
    return {**fields, "rows": {**rows, "coin": of((), np.uint32)}}


def _rows(key: jax.Array, index: jax.Array, epoch: jax.Array) -> dict:
    """Returns the `rows` of a batch: each row's position, epoch, and coin of 32 random bits.

    An example keeps its coin for the whole run; another seed gives another coin.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    coin = jax.vmap(partial(jax.random.bits, dtype=jnp.uint32))(keys)
    return {"index": index, "epoch": jnp.full_like(index, epoch), "coin": coin}


def resident_batches(
    split: Examples,
    batch_size: int,
    key: jax.Array,
    mesh: Mesh,
    positions: np.ndarray | None = None,
    label: np.ndarray | None = None,
) -> Batches:
    """Builds batches that are gathered on the device, which holds the whole split.

    Args:
        split: {field: (m, ...)}, copied to every device.
        batch_size: examples in a batch.
        key, mesh, positions: see `make_batches`.
        label: (m,) int32, the labels that `balanced_order` balances; None: see `epoch_order`.
    """
    sharding = _own_sharding(key, mesh)
    orders = _Orders(key, num_examples(split), batch_size, positions, sharding, label)
    examples = put({name: np.asarray(x) for name, x in split.items()}, replicated(mesh))

    def feed(step, num_steps):
        epoch = step // orders.steps
        return {"examples": examples, "order": orders(epoch), "epoch": np.int32(epoch), "key": key}

    def pick(feed, step):
        index = feed["order"][step % orders.steps]
        # Every device has a replica of the split: the gather moves nothing between devices.
        index = divide(index, mesh)
        fields = {name: x[index] for name, x in feed["examples"].items()}
        rows = _rows(feed["key"], index, feed["epoch"])
        return jax.lax.optimization_barrier({**fields, "rows": rows})

    return Batches(
        limit=lambda step: orders.steps - step % orders.steps,
        feed=feed,
        pick=pick,
        shapes=_shapes(split, batch_size),
        axes={"examples": None, "order": 0, "epoch": None, "key": 0},
    )


def stream_batches(
    split: Examples,
    batch_size: int,
    key: jax.Array,
    mesh: Mesh,
    positions: np.ndarray | None = None,
    label: np.ndarray | None = None,
    end: int = sys.maxsize,
) -> Batches:
    """Builds batches that are read on the host, a few at a time, for data too large for a device.

    Args:
        split: {field: (m, ...)}; images may stay encoded.
        batch_size: examples in a batch.
        key: PRNG key of the data order, the same as in `resident_batches`; (r,) keys for r runs.
        mesh: devices that share each batch, and the runs. A process reads only the examples of
            its own devices.
        positions: see `make_batches`.
        label: see `resident_batches`.
        end: the number of steps of the training; no later feed is read ahead.
    """
    orders = _Orders(key, num_examples(split), batch_size, positions, replicated(mesh), label)
    sharding = stream_sharding(mesh, of_runs=key.ndim > 0)
    shapes = _shapes(split, batch_size)
    held_steps = steps_of_feed(shapes)
    numbers = np.atleast_1d(_as_numbers(key, replicated(mesh)))  # (r,), one for each run

    def block(step):
        """Returns the first step, and the step after the last, of the feed that holds `step`."""
        epoch, of_epoch = divmod(step, orders.steps)
        first = of_epoch // held_steps * held_steps
        return [epoch * orders.steps + i for i in (first, min(first + held_steps, orders.steps))]

    def load(start):
        """Returns a function that reads the feed that begins at `start`, in a thread."""
        epoch, first = divmod(start, orders.steps)
        # Here and not in the thread: all processes dispatch their programs in one order.
        return partial(read, epoch, orders.on_host(epoch)[..., first : first + held_steps, :])

    def read(epoch, index):
        held = (*index.shape[:-2], held_steps, batch_size)
        shards = []
        for device, part in sharding.addressable_devices_indices_map(held).items():
            of_device = numbers[part[0]] if key.ndim else numbers
            rows = _read_feed(split, index[part], of_device, epoch, held_steps)
            shards.append(jax.device_put(rows, device))
        return jax.tree.map(
            lambda *parts: jax.make_array_from_single_device_arrays(
                (*held, *parts[0].shape[len(held) :]), sharding, list(parts)
            ),
            *shards,
        )

    ahead = _Ahead(load, end)

    def feed(step, num_steps):
        start, then = block(step)
        epoch = np.int32(step // orders.steps)
        return {**ahead(start, then), "first": np.int32(start), "epoch": epoch, "key": key}

    def pick(feed, step):
        i = step - feed["first"]
        fields, index = divide(
            jax.tree.map(lambda x: x[i], (feed["examples"], feed["index"])), mesh
        )
        # The barrier keeps the compiler from fusing the step with the source of its batch, so
        # that resident and streamed batches run the same arithmetic, to the last bit.
        rows = _rows(feed["key"], index, feed["epoch"])
        return jax.lax.optimization_barrier({**fields, "rows": rows})

    axes = {"examples": 0, "index": 0, "first": None, "epoch": None, "key": 0}
    return Batches(lambda step: block(step)[1] - step, feed, pick, shapes, axes)


def steps_of_feed(shapes: dict) -> int:
    """Returns the number of batches of these shapes in a feed of a stream."""
    of_batch = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    return max(1, min(STREAM_STEPS, STREAM_BYTES // of_batch))


def _as_numbers(key: jax.Array, sharding: NamedSharding) -> np.ndarray:
    """Returns each key as a number of 64 bits."""
    data = np.asarray(jax.jit(jax.random.key_data, out_shardings=sharding)(key))
    return data[..., 0].astype(np.uint64) << np.uint64(32) | data[..., 1].astype(np.uint64)


def _read_feed(
    split: Examples, index: np.ndarray, numbers: np.ndarray, epoch: int, num_steps: int
) -> dict:
    """Reads the examples at (r, k, b) or (k, b), padded with zeros to `num_steps` steps."""
    of_runs = index.reshape(len(numbers), -1)
    parts = [
        read_training(split, positions, int(number), epoch)
        for positions, number in zip(of_runs, numbers, strict=True)
    ]
    spare = num_steps - index.shape[-2]

    def laid_out(*arrays):
        array = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        array = array.reshape(*index.shape, *array.shape[1:])
        widths = [(0, spare * (axis == index.ndim - 2)) for axis in range(array.ndim)]
        return np.pad(array, widths) if spare else array

    return {"examples": jax.tree.map(laid_out, *parts), "index": laid_out(index.reshape(-1))}


class _Ahead:
    """Reads the next feed in a thread, while the devices train on the one before.

    Args:
        load: the first step of a feed -> a function that reads the feed.
        end: the step after the last; from there on nothing is read ahead.
    """

    def __init__(self, load: Callable[[int], Callable[[], Any]], end: int):
        self._load, self._end = load, end
        self._thread = ThreadPoolExecutor(1, "stream")
        self._feeds: dict[int, Future] = {}

    def __call__(self, start: int, then: int) -> Any:
        """Returns the feed that begins at `start`, and begins to read the one at `then`."""
        wanted = [start, then] if then < self._end else [start]
        kept = {step: self._feeds[step] for step in wanted if step in self._feeds}
        for step in wanted:
            if step not in kept:
                kept[step] = self._thread.submit(self._load(step))
        self._feeds = kept
        return kept[start].result()


class _Orders:
    """The orders of epochs: (steps, b) positions in train, or (r, steps, b) of r runs.

    Attributes:
        steps: number of steps in an epoch.
    """

    def __init__(
        self,
        key: jax.Array,
        num_train: int,
        batch_size: int,
        positions: np.ndarray | None,
        sharding: NamedSharding,
        label: np.ndarray | None = None,
    ):
        count = num_train if positions is None else positions.shape[-1]
        self.steps = _steps_per_epoch(count, batch_size)

        def order(key, positions, label, epoch):
            if label is None:
                chosen = epoch_order(key, epoch, count, batch_size)
            else:
                own = label if positions is None else label[positions]
                chosen = balanced_order(key, epoch, own, num_classes, batch_size)
            return chosen if positions is None else positions[chosen]

        if key.ndim:
            order = jax.vmap(order, (0, None if positions is None else 0, None, None))
        positions = None if positions is None else put(positions, sharding)
        if label is not None:
            num_classes = int(label.max()) + 1
            label = put(label, replicated(sharding.mesh))
        self._order = partial(jit_once(order, out_shardings=sharding), key, positions, label)
        self._orders: dict[int, jax.Array] = {}

    def __call__(self, epoch: int) -> jax.Array:
        return self._dispatched(epoch)[0]

    def on_host(self, epoch: int) -> np.ndarray:
        """Returns the order; the next epoch's is computed meanwhile, and need not be waited for."""
        return np.asarray(self._dispatched(epoch, epoch + 1)[0])

    def _dispatched(self, *epochs: int) -> list[jax.Array]:
        known = self._orders
        self._orders = {i: known[i] if i in known else self._order(i) for i in epochs}
        return list(self._orders.values())


def _own_sharding(key: jax.Array, mesh: Mesh) -> NamedSharding:
    """Returns the sharding of per-run arrays if `key` holds several keys, else replicated."""
    return run_sharding(mesh) if key.ndim else replicated(mesh)


def _steps_per_epoch(num_train: int, batch_size: int) -> int:
    if not 0 < batch_size <= num_train:
        raise UserError(
            f"config.batch_size={batch_size} must be between 1 and the {num_train} training "
            "examples that config.data.num_val and config.data.limit leave."
        )
    return num_train // batch_size


def padded_batches(
    split: Examples, fields: Mapping[str, Field], batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yields a split in whole batches: {field: (b, ...), "rows": {"weight": (b,)}}.

    The last batch is padded with each field's fill value. Examples have weight 1, padding has 0.
    """
    filling = padding(fields, batch_size)
    for start in range(0, num_examples(split), batch_size):
        rows = take(split, slice(start, start + batch_size))
        count = num_examples(rows)
        batch = rows
        if count < batch_size:
            batch = {name: _filled(x, filling[name][count:]) for name, x in rows.items()}
        weight = (np.arange(batch_size) < count).astype(np.float32)
        yield {**batch, "rows": {"weight": weight}}


def _filled(array: np.ndarray | Encoded, filling: np.ndarray) -> np.ndarray | Encoded:
    if isinstance(array, Encoded):
        return array.padded(len(filling))
    return np.concatenate([array, filling])
