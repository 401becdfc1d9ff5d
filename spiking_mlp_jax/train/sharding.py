"""The device mesh and what lies where on it.

The rules, all of them:

- every device has its own images, whatever the mesh;
- norms' running averages, step counters and metrics are the same on every device;
- parameters and everything shaped like them (momentum, second moments) are the same along "data" and, where they are
  large enough to be worth it, shared out along "fsdp": each of its devices stores one part.

The mesh has the axis "fsdp" only where more than one device shares out parameters.

References: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", 2020; Zhao et
al., "PyTorch FSDP", 2023 (there "hybrid" sharding; here parameters are put together once a step, not once a layer:
they are small beside what the layers' inputs take).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
FSDP = "fsdp"
# Entries from which an array is shared out. Below, the memory is nothing and each array costs two messages a step.
SMALLEST = 2**14


def make_mesh(devices: Sequence[Any] | None = None, fsdp: int = 1) -> Mesh:
    """A mesh over the devices, by default all of every process; one device is a mesh too.

    Args:
        devices: what the mesh is made of.
        fsdp: how many devices share out the parameters, a divisor of their number; neighbours do, because they are
            connected best.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp == 1:
        return jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, (AXIS, FSDP), (AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device: statistics, metrics, small parameters."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis shared out over the devices: images, labels, masks."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def shared_axis(shape: Sequence[int], mesh: Mesh | AbstractMesh) -> int | None:
    """Which axis of a parameter is shared out along "fsdp": the longest that divides, None for none."""
    parts = mesh.shape.get(FSDP, 1)
    axes = [axis for axis, length in enumerate(shape) if length % parts == 0]
    if parts == 1 or math.prod(shape) < SMALLEST or not axes:
        return None
    return max(axes, key=lambda axis: shape[axis])


def parameter_specs(tree: Any, mesh: Mesh) -> Any:
    """Where parameters, and what is shaped like them, lie: a PartitionSpec for each array or shape of a tree."""

    def spec(x):
        axis = shared_axis(x.shape, mesh)
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, FSDP)

    return jax.tree.map(spec, tree)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Where each array of a TrainState lies.

    Args:
        state: a TrainState of arrays or of jax.ShapeDtypeStruct.
        mesh: the mesh.

    Returns:
        a TrainState of NamedSharding.
    """
    specs = parameter_specs(state, mesh).replace(stats=jax.tree.map(lambda _: PartitionSpec(), state.stats))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def placed(state: Any, mesh: Mesh) -> Any:
    """A TrainState's shapes with the places of its arrays, as jax.ShapeDtypeStruct."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, state_shardings(state, mesh)
    )


def put_together(state: Any, mesh: Mesh) -> Any:
    """The state with every array whole on every device; to be called by all processes. Itself without "fsdp"."""
    if FSDP not in mesh.shape:
        return state
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(state)


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
