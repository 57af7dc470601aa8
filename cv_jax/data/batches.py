"""Batches as a pure function of (seed, step), from resident arrays or from a stream.

Both give the training loop the same three functions, and the same batches bit for bit. There is
no iterator, so checkpoints need no position in the data: the step number determines the batch.
With the keys of several runs, a feed holds each run's order, and the data once.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding

from cv_jax.config.errors import UserError
from cv_jax.data.dataset import padding
from cv_jax.data.fields import Examples, Field, num_examples, take
from cv_jax.runtime.mesh import (
    divide,
    put,
    replicated,
    run_sharding,
    stream_sharding,
)

# Batches in one feed of a stream: enough to hide the dispatch, few enough for the memory.
STREAM_STEPS = 8


class RandomAccess(Protocol):
    """A source for a stream: returns examples by their positions, in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: np.ndarray) -> Examples: ...


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


class SplitStream(NamedTuple):
    """A split in host memory, read as a stream."""

    split: Examples

    def __len__(self) -> int:
        return num_examples(self.split)

    def __getitem__(self, positions: np.ndarray) -> Examples:
        return take(self.split, positions)


def make_batches(
    config: ml_collections.ConfigDict,
    split: Examples,
    key: jax.Array,
    mesh: Mesh,
    positions: np.ndarray | None = None,
) -> Batches:
    """Builds the training batches, resident or as a stream, as `config.data.stream` chooses.

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
    if config.data.stream:
        source = SplitStream(split)
        return stream_batches(source, config.batch_size, key, mesh, positions, label)
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
    return {"index": index, "epoch": jnp.full(index.shape, epoch), "coin": coin}


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
    source: RandomAccess,
    batch_size: int,
    key: jax.Array,
    mesh: Mesh,
    positions: np.ndarray | None = None,
    label: np.ndarray | None = None,
) -> Batches:
    """Builds batches that are read on the host, a few at a time, for data too large for a device.

    Args:
        source: the training split; `source[positions]` returns the examples at `positions`.
        batch_size: examples in a batch.
        key: PRNG key of the data order, the same as in `resident_batches`; (r,) keys for r runs.
        mesh: devices that share each batch, and the runs. A process reads only the examples of
            its own devices.
        positions: see `make_batches`.
        label: see `resident_batches`.
    """
    orders = _Orders(key, len(source), batch_size, positions, replicated(mesh), label)
    sharding = stream_sharding(mesh, of_runs=key.ndim > 0)

    def read(index):
        """Reads the examples at (r, k, b) or (k, b), padded with zeros to STREAM_STEPS steps."""
        examples = source[index.reshape(-1)]
        arrays = {
            name: np.asarray(x).reshape(*index.shape, *x.shape[1:]) for name, x in examples.items()
        }
        steps_axis = key.ndim
        spare = STREAM_STEPS - index.shape[steps_axis]

        def padded(array):
            widths = [(0, spare * (axis == steps_axis)) for axis in range(array.ndim)]
            return np.pad(array, widths)

        return jax.tree.map(padded, {"examples": arrays, "index": index})

    def limit(step):
        return min(STREAM_STEPS, orders.steps - step % orders.steps)

    def feed(step, num_steps):
        epoch = step // orders.steps
        first = step % orders.steps
        index = orders.on_host(epoch)[..., first : first + num_steps, :]
        held = (*index.shape[:-2], STREAM_STEPS, batch_size)
        shards = [
            jax.device_put(read(index[part]), device)
            for device, part in sharding.addressable_devices_indices_map(held).items()
        ]
        arrays = jax.tree.map(
            lambda *parts: jax.make_array_from_single_device_arrays(
                (*held, *parts[0].shape[len(held) :]), sharding, list(parts)
            ),
            *shards,
        )
        return {**arrays, "first": np.int32(step), "epoch": np.int32(epoch), "key": key}

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
    return Batches(limit, feed, pick, _shapes(source[np.arange(1)], batch_size), axes)


class _Orders:
    """The order of the newest epoch: (steps, b) positions in train, or (r, steps, b) of r runs.

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
        self._order = partial(jax.jit(order, out_shardings=sharding), key, positions, label)
        self._epoch, self._newest = -1, None

    def __call__(self, epoch: int) -> jax.Array:
        if epoch != self._epoch:
            self._epoch, self._newest = epoch, self._order(epoch)
        return self._newest

    def on_host(self, epoch: int) -> np.ndarray:
        if not isinstance(self(epoch), np.ndarray):
            self._newest = np.asarray(self._newest)
        return self._newest


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
            batch = {name: np.concatenate([x, filling[name][count:]]) for name, x in rows.items()}
        weight = (np.arange(batch_size) < count).astype(np.float32)
        yield {**batch, "rows": {"weight": weight}}
