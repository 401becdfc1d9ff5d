"""The device mesh and what lies where on it: batches are split, everything else is on every device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A one-dimensional mesh over the devices, by default all of every process; one device is a mesh too."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device: parameters, statistics, optimiser state, metrics."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis shared out over the devices: images, labels, masks."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Moves a batch to the devices.

    Args:
        batch: tree of arrays [b, ...], this process's share of the batch.
        mesh: the mesh.

    Returns:
        the same tree of global arrays, split over the mesh by their leading axis.
    """
    sharding = split_batch(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
