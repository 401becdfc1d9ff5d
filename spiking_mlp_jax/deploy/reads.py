"""What every layer of weights reads, counted over images: the facts that `cost` is computed from.

The three forms of a network are asked in two ways. A trained network shows its spikes, from which follows what each
layer reads. A folded or an integer network shows what each layer reads, from which follow its spikes. Both are counts
of non-zero values, and sums of them are exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spiking_mlp_jax.deploy.fold import FoldedNet
from spiking_mlp_jax.deploy.network import Description, IntegerNet
from spiking_mlp_jax.deploy.reference import windows
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.pixels import Pixels, normalize
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP

if TYPE_CHECKING:
    from jaxtyping import Int

Network = SpikingMLP | FoldedNet | IntegerNet
Geometry = ModelConfig | Description


@dataclasses.dataclass(frozen=True)
class Map:
    """A layer of weights, and where it stands.

    Attributes:
        name: as in `fold`.
        positions: int64 [fan_in], in how many places of the grid each input of the kernel reads a value of the
            network and not the zero padding around it.
        out: outputs of the kernel; 0 for the "identity" of plain encoding, which has neurons and no weights.
        spikes: layer of the neurons that its sum goes to, as in `synapses.neurons`; None for the head.
    """

    name: str
    positions: Int[np.ndarray, "fan_in"]
    out: int
    spikes: str | None

    @property
    def pairs(self) -> int:
        """Pairs of an input and a weight, of one image and time step."""
        return int(self.positions.sum()) * self.out


def maps(c: Geometry) -> list[Map]:
    """The layers of a network, in its order. The head reads each channel once, after the sum over tokens."""
    found: list[Map] = []
    for i, depth in enumerate(c.depths):
        side, channels = c.stage_side(i), c.stage_dim(i)
        name, spikes = f"stage{i}.encode", f"stage{i}.encode.spikes"
        if i == 0:
            fan_in = c.patch_size**2 * c.in_channels
            found.append(Map(name, _everywhere(fan_in, side * side), channels, spikes))
        elif c.encoding == "plain":
            found.append(Map(name, _everywhere(4 * c.stage_dim(i - 1), side * side), channels, spikes))
        else:
            node = channels // 3
            cells = _seen(np.ones((1, 1, 2 * side, 2 * side, c.stage_dim(i - 1)), np.int64), 3, 2, 1)[0]
            edges = _seen(np.ones((1, 1, side, side, node), np.int64), 3, 1, 1)[0]
            found.append(Map(f"{name}.cells", cells, channels, f"{name}.node1.spikes"))
            found.append(Map(f"{name}.edge1", edges, node, f"{name}.node2.spikes"))
            found.append(Map(f"{name}.edge2", edges, node, spikes))
        for j in range(depth):
            name, hidden = f"stage{i}.block{j}", c.expansion * channels
            if c.encoding == "plain":
                found.append(Map(f"{name}.identity", np.zeros(0, np.int64), 0, f"{name}.token.identity.spikes"))
            for axis in ("height", "width"):
                positions = _everywhere(side, side * channels)
                found.append(Map(f"{name}.{axis}", positions, side, f"{name}.token.{axis}.spikes"))
            tokens = side * side
            found.append(Map(f"{name}.fuse", _everywhere(3 * channels, tokens), channels, f"{name}.token.spikes"))
            found.append(Map(f"{name}.expand", _everywhere(channels, tokens), hidden, f"{name}.channel.hidden.spikes"))
            found.append(Map(f"{name}.project", _everywhere(hidden, tokens), channels, f"{name}.channel.spikes"))
    return [*found, Map("head", _everywhere(c.stage_dim(c.stages - 1), 1), c.num_classes, None)]


@dataclasses.dataclass(frozen=True)
class Reads:
    """What a layer read, added over images and positions.

    Attributes:
        nonzero: int64 [T or 1, fan_in], values that are not zero.
        binary: whether every value was -1, 0 or 1.
    """

    nonzero: np.ndarray
    binary: bool


def observe(net: Network, batches: Iterable[np.ndarray]) -> tuple[int, dict[str, Reads], dict[str, int]]:
    """Runs a network.

    Args:
        net: a trained network, which is run in evaluation mode and not changed, or what was made of it.
        batches: images [B, H, W, C], uint8, or normalised floating ones for a network of floating point.

    Returns:
        number of images; what each layer read, by `Map.name`; spikes of each layer, by `Map.spikes`.

    Raises:
        InputError: there are no images, or they do not fit the network.
    """
    run = {SpikingMLP: _of_model, FoldedNet: _of_folded, IntegerNet: _of_integer}[type(net)](net)
    images, total = 0, None
    for batch, count in _padded(batches):
        seen = run(batch, jnp.arange(len(batch)) < count)
        seen = jax.tree.map(lambda x: np.asarray(x).astype(bool if x.dtype == bool else np.int64), seen)
        total = seen if total is None else jax.tree.map(_joined, total, seen)
        images += count
    if total is None:
        raise InputError("there are no images to count operations on: give at least one")
    c = net.description if isinstance(net, IntegerNet) else net.config
    if isinstance(net, SpikingMLP):
        spikes = {name: int(count.sum()) for name, count in total["spikes"].items()}
        return images, {**_reads_of_spikes(c, total["spikes"]), **_reads(total["reads"])}, spikes
    reads = _reads(total["reads"])
    return images, reads, _spikes_of_reads(c, reads, int(total["last"].sum()))


def _everywhere(fan_in, positions):
    return np.full(fan_in, positions, np.int64)


def _padded(batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of the first one's size, so that there is one program; and how many of their images count."""
    size = 0
    for batch in batches:
        batch = np.asarray(batch)
        if batch.ndim != 4:
            raise InputError(f"images must be batches [B, H, W, C], but one is {batch.shape}")
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
            # What the head reads follows from the last spikes: norm and mean over tokens can change places.
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
    # Its arrays are constants of the program: the network is no argument that JAX could trace.
    run = jax.jit(lambda images, mask: _observed(net, images, mask))

    def observed(images, mask):
        if images.dtype != np.uint8:
            raise InputError(f"images must be raw pixels of dtype uint8, but they are {images.dtype}")
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
    """`Reads` of every layer but stem and head from the spikes [T, H, W, C] of each neuron."""
    found = {}
    before = np.zeros(0)
    for i, depth in enumerate(c.depths):
        name = f"stage{i}.encode"
        if i and c.encoding == "plain":
            found[name] = _seen(before[:, None], 2, 2, 0)
        elif i:
            found[f"{name}.cells"] = _seen(before[:, None], 3, 2, 1)
            for node in (1, 2):
                found[f"{name}.edge{node}"] = _seen(spikes[f"{name}.node{node}.spikes"][:, None], 3, 1, 1)
        before = spikes[f"{name}.spikes"]
        for j in range(depth):
            name = f"stage{i}.block{j}"
            token = f"{name}.token"
            found[f"{name}.height"], found[f"{name}.width"] = before.sum((2, 3)), before.sum((1, 3))
            identity = spikes[f"{token}.identity.spikes"] if c.encoding == "plain" else before
            fused = [identity, spikes[f"{token}.height.spikes"], spikes[f"{token}.width.spikes"]]
            found[f"{name}.fuse"] = np.concatenate([part.sum((1, 2)) for part in fused], -1)
            found[f"{name}.expand"] = spikes[f"{token}.spikes"].sum((1, 2))
            hidden = spikes[f"{name}.channel.hidden.spikes"]
            # [T, H, W, C], or with the tokens in one axis.
            found[f"{name}.project"] = hidden.reshape(len(hidden), -1, hidden.shape[-1]).sum(1)
            before = spikes[f"{name}.channel.spikes"]
    return {name: Reads(nonzero, True) for name, nonzero in found.items()}


def _spikes_of_reads(c: Geometry, reads: dict[str, Reads], last: int) -> dict[str, int]:
    """Spikes of every layer from what the layers after it read."""

    def total(name, part=slice(None)):
        return int(reads[name].nonzero[:, part].sum())

    def once(name, size, rows):
        # Of a convolution's inputs, those that meet every position of the grid before it just once.
        nonzero = reads[name].nonzero
        grid = nonzero.reshape(len(nonzero), size, size, -1)
        return int(grid[:, rows][:, :, rows].sum())

    found = {}
    for i, depth in enumerate(c.depths):
        if i and c.encoding == "spe":
            for node in (1, 2):
                found[f"stage{i}.encode.node{node}.spikes"] = once(f"stage{i}.encode.edge{node}", 3, slice(1, 2))
        found[f"stage{i}.encode.spikes"] = total(f"stage{i}.block0.height")
        channels = c.stage_dim(i)
        for j in range(depth):
            name = f"stage{i}.block{j}"
            for n, part in enumerate(("identity", "height", "width")):
                if n or c.encoding == "plain":
                    place = slice(n * channels, (n + 1) * channels)
                    found[f"{name}.token.{part}.spikes"] = total(f"{name}.fuse", place)
            found[f"{name}.token.spikes"] = total(f"{name}.expand")
            found[f"{name}.channel.hidden.spikes"] = total(f"{name}.project")
            if j + 1 < depth:
                found[f"{name}.channel.spikes"] = total(f"stage{i}.block{j + 1}.height")
            elif i + 1 == c.stages:
                found[f"{name}.channel.spikes"] = last
            elif c.encoding == "plain":
                found[f"{name}.channel.spikes"] = total(f"stage{i + 1}.encode")
            else:
                # Rows 2o and 2o + 1 of the grid are rows 1 and 2 of window o, which steps by 2.
                found[f"{name}.channel.spikes"] = once(f"stage{i + 1}.encode.cells", 3, slice(1, 3))
    return found
