"""The device mesh, and the layout of arrays on it.

    axis    devices along this axis
    seed    train different runs
    data    share every batch; each holds all parameters
    fsdp    share every batch, the parameters and the optimizer's state

No other module handles devices: jax.jit is given layouts, and XLA inserts the communication.
Statistics over a batch are those of the whole batch.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cv_jax.config.errors import UserError

# The axes that share a batch.
_BATCH = ("data", "fsdp")
# Arrays of fewer values are replicated: dividing them would save nothing.
SMALLEST_DIVIDED = 2**14


def make_mesh(
    num_runs: int = 1,
    sizes: ml_collections.ConfigDict | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Returns a mesh of devices with the axes "seed", "data" and "fsdp".

    Args:
        num_runs: number of runs of the program.
        sizes: `config.mesh`, the sizes of the axes; None: all chosen. A size of 0 is chosen:
            "seed" gets the largest number of devices that divides the number of runs; "data" gets
            the rest.
        devices: devices of the mesh; None: all devices of all processes.

    Raises:
        UserError: the sizes do not fit the devices or the runs.
    """
    devices = np.array(jax.devices() if devices is None else devices)
    seed, data, fsdp = (sizes.seed, sizes.data, sizes.fsdp) if sizes else (0, 0, 1)
    seed = seed or math.gcd(num_runs, max(1, len(devices) // (max(1, data) * fsdp)))
    data = data or max(1, len(devices) // (seed * fsdp))
    if num_runs % seed:
        raise UserError(
            f"config.mesh.seed={seed} does not divide the number of runs, {num_runs}. Set a "
            "divisor, or 0 to choose one."
        )
    if seed * data * fsdp != len(devices):
        raise UserError(
            f"config.mesh: {seed} (seed) x {data} (data) x {fsdp} (fsdp) devices, but there are "
            f"{len(devices)}. Set sizes whose product is {len(devices)}."
        )
    return Mesh(devices.reshape(seed, data, fsdp), ("seed", *_BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the layout of resident data: a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the layout of a batch: its leading axis is divided over the devices that share it."""
    return NamedSharding(mesh, PartitionSpec(_BATCH))


def stream_sharding(mesh: Mesh, of_runs: bool) -> NamedSharding:
    """Returns the layout of streamed batches, (steps, b, ...), or (r, steps, b, ...) of r runs."""
    return NamedSharding(mesh, PartitionSpec(*(["seed"] if of_runs else []), None, _BATCH))


def run_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the layout of arrays with a leading axis of runs: that axis is divided."""
    return NamedSharding(mesh, PartitionSpec("seed"))


def parameter_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the layout of one parameter (r, ...) of r runs, and of its optimizer state.

    The axis of runs is divided over "seed". The largest other axis that the size of "fsdp"
    divides is divided over "fsdp"; of equal axes, the last. A parameter without such an axis, or
    with fewer than SMALLEST_DIVIDED values a run, is divided over "seed" alone.
    """
    side = mesh.shape["fsdp"]
    divisible = [i for i in range(1, len(shape)) if shape[i] % side == 0]
    if side == 1 or not divisible or math.prod(shape[1:]) < SMALLEST_DIVIDED:
        return run_sharding(mesh)
    axes = ["seed"] + [None] * (len(shape) - 1)
    axes[max(divisible, key=lambda i: (shape[i], i))] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*axes))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Places arrays or keys on devices; every process holds all and passes its devices' part."""

    def lay_out(array):
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(lay_out(jax.random.key_data(array)))

        def part_of(part):  # images that stay encoded decode only what is asked for
            return np.asarray(array[part])

        return jax.make_array_from_callback(array.shape, sharding, part_of)

    return jax.tree.map(lay_out, tree)


def divide(batch: Any, mesh: Mesh) -> Any:
    """Divides a batch over the devices that share it, inside jit and inside a map over runs."""
    inside = jax.sharding.get_abstract_mesh()  # inside a map over runs it has no axis "seed"
    return jax.lax.with_sharding_constraint(batch, batch_sharding(mesh if inside.empty else inside))


def num_sharing(mesh: Mesh) -> int:
    """Returns the number of devices that share a batch."""
    return math.prod(mesh.shape[axis] for axis in _BATCH)


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError unless each microbatch divides evenly over the devices that share it.

    Args:
        batch_size: the number of examples in a step.
        mesh: the devices.
        accumulate: the number of microbatches in a step.
    """
    sharing = num_sharing(mesh)
    parts = sharing * accumulate
    if batch_size % parts:
        lower = batch_size - batch_size % parts
        nearest = [str(size) for size in (lower, lower + parts) if size]
        over = f"{sharing} device{'s' * (sharing > 1)}"
        if accumulate > 1:
            over = f"config.accumulate={accumulate} microbatches on {over}"
        raise UserError(
            f"config.batch_size={batch_size} does not divide over {over}; "
            f"set a size that does: {', '.join(nearest)}."
        )
