"""The device mesh, and what lies where on it.

    axis    the devices along it
    seed    take runs of their own
    data    share every batch, and have the parameters whole
    fsdp    share every batch too, and the parameters and the optimizer's state

Nothing else in the project knows of devices: layouts are given to jax.jit, and XLA finds out what
has to be exchanged. Statistics over a batch are those of the whole batch.
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
# Arrays of fewer values lie whole on every device: dividing them would save nothing.
SMALLEST_DIVIDED = 2**14


def make_mesh(
    num_runs: int = 1,
    sizes: ml_collections.ConfigDict | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Returns a mesh of devices with the axes "seed", "data" and "fsdp".

    Args:
        num_runs: of the program.
        sizes: `config.mesh`, the sizes of the axes. Of a size that is 0, or without any: as many
            devices as divide the runs evenly take different ones, all that are left share batches.
        devices: all of all processes, where none are given.

    Raises:
        UserError: the sizes do not fit the devices or the runs.
    """
    devices = np.array(jax.devices() if devices is None else devices)
    seed, data, fsdp = (sizes.seed, sizes.data, sizes.fsdp) if sizes else (0, 0, 1)
    seed = seed or math.gcd(num_runs, max(1, len(devices) // (max(1, data) * fsdp)))
    data = data or max(1, len(devices) // (seed * fsdp))
    if num_runs % seed:
        raise UserError(
            f"config.mesh.seed={seed} does not divide the number of runs, which is {num_runs}."
        )
    if seed * data * fsdp != len(devices):
        raise UserError(
            f"config.mesh: {seed} (seed) x {data} (data) x {fsdp} (fsdp) are not the "
            f"{len(devices)} devices that there are."
        )
    return Mesh(devices.reshape(seed, data, fsdp), ("seed", *_BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of resident data: a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of a batch: its leading axis divided over the devices that share it."""
    return NamedSharding(mesh, PartitionSpec(_BATCH))


def stream_sharding(mesh: Mesh, of_runs: bool) -> NamedSharding:
    """The layout of (steps, b, ...) that are read as batches, or (r, steps, b, ...) of r runs."""
    return NamedSharding(mesh, PartitionSpec(*(["seed"] if of_runs else []), None, _BATCH))


def run_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of what each run has of its own: its leading axis, over runs, divided."""
    return NamedSharding(mesh, PartitionSpec("seed"))


def parameter_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The layout of parameters (r, ...) of r runs, and of what an optimizer keeps of them.

    Beside the runs their largest axis that "fsdp" divides is divided, the last of equal ones;
    none where there is no such axis, or where a run's are fewer than SMALLEST_DIVIDED.
    """
    side = mesh.shape["fsdp"]
    divisible = [i for i in range(1, len(shape)) if shape[i] % side == 0]
    if side == 1 or not divisible or math.prod(shape[1:]) < SMALLEST_DIVIDED:
        return run_sharding(mesh)
    axes = ["seed"] + [None] * (len(shape) - 1)
    axes[max(divisible, key=lambda i: (shape[i], i))] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*axes))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Lays arrays or keys out; every process has them all, and hands over its devices' part."""

    def lay_out(array):
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(lay_out(jax.random.key_data(array)))
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    return jax.tree.map(lay_out, tree)


def divide(batch: Any, mesh: Mesh) -> Any:
    """Divides a batch over the devices that share it, inside of jit and of a map over runs."""
    inside = jax.sharding.get_abstract_mesh()  # while runs are mapped, "seed" is no axis of ours
    return jax.lax.with_sharding_constraint(batch, batch_sharding(mesh if inside.empty else inside))


def num_sharing(mesh: Mesh) -> int:
    """How many devices share a batch."""
    return math.prod(mesh.shape[axis] for axis in _BATCH)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError where a batch does not divide evenly over the devices that share it."""
    sharing = num_sharing(mesh)
    if batch_size % sharing:
        lower = batch_size - batch_size % sharing
        nearest = [str(size) for size in (lower, lower + sharing) if size]
        raise UserError(
            f"config.batch_size={batch_size} does not divide over {sharing} devices; "
            f"the nearest that do: {', '.join(nearest)}."
        )
