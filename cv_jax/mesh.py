"""The device mesh: devices that share the runs of a program, and devices that share a batch."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cv_jax.errors import UserError


def make_mesh(num_runs: int = 1) -> Mesh:
    """Returns a mesh of all devices with the axes "seed", over runs, and "data", over a batch.

    As many devices as divide the runs evenly take different ones; the rest share batches.
    """
    devices = np.array(jax.devices())
    side = math.gcd(num_runs, len(devices))
    return Mesh(devices.reshape(side, -1), ("seed", "data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of resident data: a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of a batch: its leading axis divided over the devices that share it."""
    return NamedSharding(mesh, PartitionSpec("data"))


def divide(batch: Any, mesh: Mesh) -> Any:
    """Divides a batch over the devices that share it, inside of jit and of a map over runs."""
    inside = jax.sharding.get_abstract_mesh()  # while runs are mapped, "seed" is no axis of ours
    return jax.lax.with_sharding_constraint(batch, batch_sharding(mesh if inside.empty else inside))


def run_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of what each run has of its own: its leading axis, over runs, divided."""
    return NamedSharding(mesh, PartitionSpec("seed"))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError where a batch does not divide evenly over the devices that share it."""
    sharing = mesh.shape["data"]
    if batch_size % sharing:
        lower = batch_size - batch_size % sharing
        nearest = [str(size) for size in (lower, lower + sharing) if size]
        raise UserError(
            f"config.batch_size={batch_size} does not divide over {sharing} devices; "
            f"the nearest that do: {', '.join(nearest)}."
        )
