"""The device mesh and what lies where on it.

The rules, all of them:

- every device has its own images, whatever the mesh;
- norms' running averages, step counters and metrics are replicated;
- parameters and everything shaped like them (momentum, second moments) are replicated along "data" and, where they are
  large enough to be worth it, sharded along "fsdp".

The mesh has the axis "fsdp" only where more than one device shards the parameters.

References: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", 2020; Zhao et
al., "PyTorch FSDP", 2023 (there "hybrid" sharding; here parameters are gathered once a step, not once a layer: they are
small beside the layers' inputs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
FSDP = "fsdp"
# Smaller arrays are not sharded: their memory is negligible, and each costs two messages a step.
SMALLEST = 2**14


def make_mesh(devices: Sequence[Any] | None = None, fsdp: int = 1) -> Mesh:
    """A mesh over the devices, by default all of every process; one device is a mesh too.

    Args:
        devices: of the mesh.
        fsdp: how many devices shard the parameters, a divisor of their number; neighbours, which are connected best.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp == 1:
        return jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, (AXIS, FSDP), (AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device: statistics, metrics, small parameters."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis sharded over all devices: images, labels, masks."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def shared_axis(shape: Sequence[int], mesh: Mesh | AbstractMesh) -> int | None:
    """Which axis of a parameter is sharded along "fsdp": the longest that divides, None for none."""
    parts = mesh.shape.get(FSDP, 1)
    axes = [axis for axis, length in enumerate(shape) if length % parts == 0]
    if parts == 1 or math.prod(shape) < SMALLEST or not axes:
        return None
    return max(axes, key=lambda axis: shape[axis])


def parameter_specs(tree: Any, mesh: Mesh) -> Any:
    """A PartitionSpec for each array or shape of a tree of parameters, or of what is shaped like them."""

    def spec(x):
        axis = shared_axis(x.shape, mesh)
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, FSDP)

    return jax.tree.map(spec, tree)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A TrainState of NamedSharding, one for each array or jax.ShapeDtypeStruct of a TrainState."""
    specs = parameter_specs(state, mesh).replace(stats=jax.tree.map(lambda _: PartitionSpec(), state.stats))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def abstract_with_sharding(state: Any, mesh: Mesh) -> Any:
    """A TrainState's shapes, dtypes and shardings, as jax.ShapeDtypeStruct."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, state_shardings(state, mesh)
    )


def abstract_batch(batch_size: int, image_size: int, in_channels: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch: uint8 "image" [B, H, W, C] and int32 "label" [B]."""
    shape = (batch_size, image_size, image_size, in_channels)
    return {
        "image": jax.ShapeDtypeStruct(shape, "uint8", sharding=batch_sharding(mesh)),
        "label": jax.ShapeDtypeStruct(shape[:1], "int32", sharding=batch_sharding(mesh)),
    }


def replicate(state: Any, mesh: Mesh) -> Any:
    """The state gathered on every device; all processes call it. The state itself without "fsdp"."""
    if FSDP not in mesh.shape:
        return state
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(state)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Moves this process's share of a batch, a tree of arrays [b, ...], to the devices.

    Returns:
        the same tree of global arrays, sharded by their leading axis.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def is_sharded(shape: Sequence[int], fsdp: int) -> bool:
    """Whether this many devices shard a parameter of this shape."""
    # The rule only asks how long the axis is.
    return fsdp > 1 and shared_axis(shape, AbstractMesh((1, fsdp), (AXIS, FSDP))) is not None


def size_of(x: Any) -> int:
    """Bytes of an array, or of a shape with a dtype."""
    return math.prod(x.shape) * x.dtype.itemsize


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays, or shapes with dtypes, of a tree."""
    return sum(size_of(x) for x in jax.tree.leaves(tree))


def device_bytes(tree: Any, fsdp: int) -> float:
    """Bytes that a device stores of parameters, or of what is shaped like them."""
    return sum(size_of(x) / (fsdp if is_sharded(x.shape, fsdp) else 1) for x in jax.tree.leaves(tree))
