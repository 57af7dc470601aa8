"""The device mesh: every device in one row, over which a batch is divided."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cv_jax.errors import UserError


def make_mesh() -> Mesh:
    """Returns a mesh of all devices along the one axis "data"."""
    return Mesh(np.array(jax.devices()), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of parameters and resident data: a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of a batch: its leading axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError where a batch does not divide evenly over the devices."""
    if batch_size % mesh.size:
        lower = batch_size - batch_size % mesh.size
        nearest = [str(size) for size in (lower, lower + mesh.size) if size]
        raise UserError(
            f"config.batch_size={batch_size} does not divide over {mesh.size} devices; "
            f"the nearest that do: {', '.join(nearest)}."
        )
