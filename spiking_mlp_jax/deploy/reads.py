"""What each layer of a network stores and reads, counted over images: the facts that `cost` is computed from.

A trained network shows its spikes, from which follows what each layer reads. A folded or integer network shows what
each layer reads, from which follow its spikes. Both are counts of non-zero values, and sums of them are exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spiking_mlp_jax.deploy.fold import FoldedNet
from spiking_mlp_jax.deploy.network import IntegerNet
from spiking_mlp_jax.deploy.reference import windows
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.pixels import Pixels, normalize
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.models.topology import Geometry, Layer, layers
from spiking_mlp_jax.utils.settings import usual_settings

Network = SpikingMLP | FoldedNet | IntegerNet


def kernels(net: Network) -> dict[str, np.ndarray]:
    """Weights [S, fan_in, out] of each layer."""
    if isinstance(net, FoldedNet):
        return {name: np.asarray(x["kernel"]) for name, x in net.arrays.items() if "kernel" in x}
    if isinstance(net, IntegerNet):
        return {name.removesuffix(".kernel"): x for name, x in net.arrays.items() if name.endswith(".kernel")}
    found = {}
    for layer, values in _variables(net):
        parts = [values[*path, "kernel"] for path in layer.kernels]
        # Mixing multiplies from the left: its kernel is [out, fan_in].
        parts = [x.T if layer.axis < -1 else x.reshape(-1, x.shape[-1]) for x in parts]
        if parts:
            found[layer.name] = np.concatenate(parts, -1)[None]
    return found


def footprints(net: Network) -> dict[str, int]:
    """Bytes of each layer's arrays, with those of its norm and neurons."""
    if isinstance(net, SpikingMLP):
        return {layer.name: sum(x.nbytes for x in values.values()) for layer, values in _variables(net)}
    found: dict[str, int] = {}
    if isinstance(net, IntegerNet):
        for name, x in net.arrays.items():
            layer = name.rpartition(".")[0]
            found[layer] = found.get(layer, 0) + x.nbytes
        return found
    for layer in layers(net.config):
        names = [layer.name, *([f"{layer.neurons.short}.neurons"] if layer.neurons else [])]
        entries = [x for name in names for x in net.arrays.get(name, {}).values()]
        found[layer.name] = sum(np.asarray(x).nbytes for x in entries)
    return found


def _variables(model: SpikingMLP) -> Iterator[tuple[Layer, dict[Any, np.ndarray]]]:
    """Parameters and running statistics of each layer, by path; those of blocks one by one."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    values = {path: np.asarray(variable[...]) for path, variable in state}
    for layer in layers(model.config):
        own = {path: x for path, x in values.items() if path[:-1] in layer.paths}
        yield layer, own if layer.block is None else {path: x[layer.block] for path, x in own.items()}


@dataclasses.dataclass(frozen=True)
class Reads:
    """Inputs of a layer, summed over images and positions.

    Attributes:
        nonzero: int64 [T or 1, fan_in], values that are not zero.
        binary: whether every value was -1, 0 or 1.
    """

    nonzero: np.ndarray
    binary: bool


@usual_settings()
def observe(net: Network, batches: Iterable[np.ndarray]) -> tuple[int, dict[str, Reads], dict[str, int]]:
    """Run a network.

    Args:
        net: a trained network, run in evaluation mode and not changed, or its folded or integer form.
        batches: images [B, H, W, C], raw (uint8), or for floating-point networks normalized.

    Returns:
        number of images; what each layer read, by layer; spikes of each layer of neurons ("stage0.encode.spikes").

    Raises:
        InputError: there are no images, or they have another shape or dtype than the network's.
    """
    run = {SpikingMLP: _of_model, FoldedNet: _of_folded, IntegerNet: _of_integer}[type(net)](net)
    images, total = 0, None
    for batch, count in _padded(batches):
        seen = run(batch, jnp.arange(len(batch)) < count)
        seen = jax.tree.map(lambda x: np.asarray(x).astype(bool if x.dtype == bool else np.int64), seen)
        total = seen if total is None else jax.tree.map(_joined, total, seen)
        images += count
    if total is None:
        raise InputError("no images to count operations on: give at least one")
    c = net.description if isinstance(net, IntegerNet) else net.config
    if isinstance(net, SpikingMLP):
        spikes = {name: int(count.sum()) for name, count in total["spikes"].items()}
        return images, {**_reads_of_spikes(c, total["spikes"]), **_reads(total["reads"])}, spikes
    reads = _reads(total["reads"])
    return images, reads, _spikes_of_reads(c, reads, int(total["last"].sum()))


def _padded(batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Batches padded to the first one's size, for a single compilation, and their numbers of images."""
    size = 0
    for batch in batches:
        batch = np.asarray(batch)
        if batch.ndim != 4:
            raise InputError(f"images must be batches [B, H, W, C], got {batch.shape}")
        if not len(batch):
            continue
        size = max(size, len(batch))
        yield np.pad(batch, ((0, size - len(batch)), (0, 0), (0, 0), (0, 0))), len(batch)


def _joined(a, b):
    return a & b if a.dtype == bool else a + b


def _of_model(model: SpikingMLP):
    graphdef, variables = nnx.split(model)
    c = model.config
    last = f"stage{c.stages - 1}.block{c.depths[-1] - 1}.channel.spikes"
    pixels = model.pixels or Pixels((0.0,) * c.in_channels, (1.0,) * c.in_channels)

    @jax.jit
    def run(variables, images, mask):
        model = nnx.merge(graphdef, variables, copy=True)
        model.eval()

        def keep(name, x):
            if not name.endswith(".spikes"):
                return None
            count = jnp.sum((x != 0) & _each(mask, x), 0, dtype=jnp.int32)
            # The head's inputs follow from the last spikes: norm and mean over tokens commute.
            is_last = name.startswith(f"stage{c.stages - 1}.") and name.endswith("*.channel.spikes")
            return count, jnp.mean(x, (2, 3), keepdims=True, dtype=jnp.float32) if is_last else None

        _, seen = model(images, observe=keep)
        x = images[:, None]
        patches = x.reshape(*x.shape[:2], -1)
        stem = _sums(patches, mask)
        stem["nonzero"] = jnp.sum((x != 0) & _each(mask, x), 0, dtype=jnp.int32)
        head = model.norm(seen[last][1].astype(model.head.kernel[...].dtype))[:, :, 0, 0]
        spikes = {name: count for name, (count, _) in seen.items()}
        return {"spikes": spikes, "reads": {"stage0.encode": stem, "head": _sums(head, mask)}}

    def observed(images, mask):
        seen = jax.device_get(run(variables, _floating(images, pixels.mean, pixels.std), mask))
        stem = seen["reads"]["stage0.encode"]
        stem["nonzero"] = _seen(stem["nonzero"][:, None].astype(np.int64), c.patch_size, c.patch_size, 0)
        return seen

    return observed


def _of_folded(net: FoldedNet):
    run = jax.jit(_observed)
    return lambda images, mask: run(net, _floating(images, net.mean, net.std), mask)


def _of_integer(net: IntegerNet):
    # Its arrays are constants of the program; the network is not a pytree.
    run = jax.jit(lambda images, mask: _observed(net, images, mask))

    def observed(images, mask):
        if images.dtype != np.uint8:
            raise InputError(f"images must be raw pixels of dtype uint8, got {images.dtype}")
        return run(images, mask)

    return observed


def _floating(images, mean, std):
    return normalize(images, mean, std) if images.dtype == np.uint8 else images


def _observed(net: Any, images, mask):
    reads: dict[str, Any] = {}
    last = []

    def observe(name, x):
        found = _sums(x, mask)
        # The integer stem reads its eight bit planes one after the other.
        reads[name] = jax.tree.map(_joined, reads[name], found) if name in reads else found
        if name == "head":
            last.append(jnp.sum(jnp.where(_each(mask, x), x, 0), 0, dtype=jnp.int32))

    net(images, observe)
    return {"reads": reads, "last": last[0]}


def _sums(x, mask):
    """Of [B, T, ..., fan_in]: non-zero values [T, fan_in], and whether all are -1, 0 or 1."""
    mask = _each(mask, x)
    nonzero = jnp.sum((x != 0) & mask, (0, *range(2, x.ndim - 1)), dtype=jnp.int32)
    return {"nonzero": nonzero, "binary": jnp.all((x == 0) | (jnp.abs(x) == 1) | ~mask)}


def _each(mask, x):
    return mask.reshape(-1, *(1,) * (x.ndim - 1))


def _reads(found) -> dict[str, Reads]:
    return {name: Reads(seen["nonzero"], bool(seen["binary"])) for name, seen in found.items()}


def _seen(counts, size, stride, padding):
    """What a convolution's inputs see of values [T, 1, H, W, C], summed over positions: [T, fan_in]."""
    return windows(counts, size, stride, padding).sum((1, 2, 3))


def _reads_of_spikes(c: Geometry, spikes) -> dict[str, Reads]:
    """`Reads` of every layer but stem and head, from the spikes [T, H, W, C] of each neuron."""
    found = {}
    for layer in layers(c):
        if layer.kind in ("stem", "identity", "head"):
            continue
        parts = [spikes[f"{name}.spikes"] for name in layer.reads]
        if layer.window:
            nonzero = _seen(parts[0][:, None], *layer.window)
        elif layer.kind == "dense":
            nonzero = np.concatenate([part.sum((1, 2)) for part in parts], -1)
        else:
            nonzero = parts[0].sum((2, 3) if layer.kind == "height" else (1, 3))
        found[layer.name] = Reads(nonzero, True)
    return found


def _spikes_of_reads(c: Geometry, reads: dict[str, Reads], last: int) -> dict[str, int]:
    """Spikes of every layer, from what the first layer after it reads."""
    found = {}
    for layer in layers(c):
        if layer.kind in ("stem", "identity"):
            continue
        for name, part in zip(layer.reads, np.split(reads[layer.name].nonzero, len(layer.reads), -1), strict=True):
            if layer.kind == "head":
                part = np.array(last)
            elif layer.window:
                # The inputs of a window that meet every position of the grid exactly once.
                size, stride, padding = layer.window
                once = slice(padding, padding + stride)
                part = part.reshape(len(part), size, size, -1)[:, once, once]
            found.setdefault(f"{name}.spikes", int(part.sum()))
    return found
