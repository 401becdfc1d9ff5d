"""The layers of a network as a table, and their connections as a walk over it. NumPy only.

    for layer in layers(config): ...      one row for each linear layer, in the order of the network
    class Shapes(Walk): ...               the data flow, over whatever values a subclass computes with

Both take a ModelConfig or the description of an integer network. The Flax model and `deploy.reference` are written out
beside it; tests compare them with the table.

A synapse is a weight between a spike and a sum that it enters, so that an image costs, in additions,

    synaptic operations = sum over layers of spikes * fan_out

Weights shared over positions count at each of them. Norms, biases, the skip connection and the identity of "plain"
encoding have no synapses; the stem reads pixels. The head counts as if it ran on every spike, although the mean over
tokens comes before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

Path = tuple[str | int, ...]


class Geometry:
    """What `ModelConfig` and an integer network's `Description` have in common; see there for the fields."""

    image_size: int
    in_channels: int
    num_classes: int
    patch_size: int
    dim: int
    depths: tuple[int, ...]
    expansion: int
    encoding: str
    time_steps: int
    per_token: bool

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.depths)

    def stage_dim(self, stage: int) -> int:
        """Channels of a stage."""
        return self.dim << stage

    def stage_side(self, stage: int) -> int:
        """Tokens along each side of a stage's grid."""
        return self.image_size // self.patch_size >> stage


@dataclasses.dataclass(frozen=True)
class Neurons:
    """A layer of neurons.

    Attributes:
        name: "stage0.block0.token.height"; the model's intermediates are NAME.potential and NAME.spikes.
        shape: (H, W, C).
        place: of their number format in an integer network, see `Description.formats`.
        layer: the linear layer that is summed last into their potential.
        per_token: whether threshold and reset are those of a token, because a norm was divided out of them (`fold`).
        path: of the module in a SpikingMLP; in blocks, those of a stage are stacked.
    """

    name: str
    shape: tuple[int, int, int]
    place: str
    layer: str
    per_token: bool
    path: Path

    @property
    def short(self) -> str:
        """The name without "token." and "channel.", as in folded networks: "stage0.block0.height"."""
        return short(self.name)

    @property
    def count(self) -> int:
        """Number of neurons."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer with its norm and the neurons after it.

    Attributes:
        name: "stage0.block0.height", as in folded and integer networks.
        kind: "stem", "conv", "identity", "height", "width", "dense" or "head". "identity" is that of "plain" encoding,
            norm and neurons without weights. "dense" maps the channels of each token.
        fan_in: inputs of an output; of windows in the order (row, column, channel). 0 for an identity.
        out: outputs at each position.
        positions: how often the weights are used in an image and time step. The head's are used once, after the sum
            over tokens.
        window: (size, stride, padding) of a stem or convolution, else None.
        norm: features of the norm: "outputs" or "inputs" of the weights, "tokens", or "sample" for LayerNorm, which
            has statistics of each sample.
        place: of the number format of its result in an integer network, see `Description.formats`.
        reads: names of the neurons whose spikes it takes, in the order of its inputs; none for the stem.
        neurons: those that its result, alone or last in a sum, goes to; None for the head.
        kernels: paths in a SpikingMLP of the modules with "kernel" and perhaps "bias", side by side in the outputs.
        norms: of their norms, likewise.
        block: index into these modules' arrays, which are stacked over a stage's blocks; None outside blocks.
    """

    name: str
    kind: str
    fan_in: int
    out: int
    positions: int
    window: tuple[int, int, int] | None
    norm: str
    place: str
    reads: tuple[str, ...]
    neurons: Neurons | None
    kernels: tuple[Path, ...]
    norms: tuple[Path, ...]
    block: int | None

    @property
    def axis(self) -> int:
        """Axis of [..., H, W, C] that the weights map."""
        return {"height": -3, "width": -2}.get(self.kind, -1)

    @property
    def stage(self) -> str:
        """Its stage, which is also the place of the format of all sums that a stage's skip connection joins."""
        return self.name.partition(".")[0]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of an image and time step if every input counts, the zeros of a padded border too."""
        return self.fan_in * self.out * self.positions

    @property
    def paths(self) -> tuple[Path, ...]:
        """All modules of a SpikingMLP that belong to the layer: weights, norms and neurons."""
        return (*self.kernels, *self.norms, *([self.neurons.path] if self.neurons else []))

    def inputs(self) -> np.ndarray:
        """In how many positions each input reads a value of the network and no padding, int64 [fan_in]."""
        if self.window is None or not self.window[2]:
            return np.full(self.fan_in, self.positions, np.int64)
        size, stride, padding = self.window
        outputs = math.isqrt(self.positions)
        read = np.arange(size)[:, None] + np.arange(outputs) * stride - padding
        inside = ((read >= 0) & (read < outputs * stride)).sum(1)
        return np.outer(inside, inside).ravel().repeat(self.fan_in // size**2)


def short(name: str) -> str:
    """A name of neurons or of a scope as folded networks have it.

    Examples:
        >>> short("stage0.block1.channel.hidden"), short("stage0.block1.token")
        ('stage0.block1.hidden', 'stage0.block1.token')
    """
    return name.replace(".token.", ".").replace(".channel.", ".")


def layers(c: Geometry) -> list[Layer]:
    """The table: every linear layer, in the order of the network.

    Args:
        c: a ModelConfig or a Description.

    Examples:
        >>> from spiking_mlp_jax import ModelConfig
        >>> rows = layers(ModelConfig(image_size=8, in_channels=1, num_classes=3, patch_size=4, dim=3, depths=(1,)))
        >>> [row.name.removeprefix("stage0.") for row in rows]
        ['encode', 'block0.height', 'block0.width', 'block0.fuse', 'block0.expand', 'block0.project', 'head']
        >>> rows[3].reads
        ('stage0.encode', 'stage0.block0.token.height', 'stage0.block0.token.width')
    """
    rows: list[Layer] = []
    last: tuple[str, ...] = ()
    for i, depth in enumerate(c.depths):
        rows += _encoding(c, i, last)
        last = (f"stage{i}.encode",)
        for j in range(depth):
            rows += _block(c, i, j, last)
            last = (f"stage{i}.block{j}.channel",)
    size = c.stage_dim(c.stages - 1), c.num_classes, 1
    return [*rows, Layer("head", "head", *size, None, "inputs", "head", last, None, (("head",),), (("norm",),), None)]


def _encoding(c: Geometry, i: int, before: tuple[str, ...]) -> list[Layer]:
    side, channels, inputs = c.stage_side(i), c.stage_dim(i), c.stage_dim(i - 1) if i else c.in_channels
    name, place, path = f"stage{i}.encode", f"stage{i}", ("stages", i, "encode")

    def row(part, reads, fan_in, out, window, to, neuron, kernels, norms):
        neurons = Neurons(
            to, (side, side, channels if to == name else channels // 3), place, name + part, False, neuron
        )
        kind, size = "conv" if i else "stem", (fan_in, out, side * side)
        return Layer(name + part, kind, *size, window, "outputs", place, reads, neurons, kernels, norms, None)

    def paths(kind, *which):
        return tuple((*path, kind, *index) for index in which)

    last = ("stages", i, "neuron")
    if i == 0 or c.encoding == "plain":
        size = 2 if i else c.patch_size
        fan_in = size * size * inputs
        return [row("", before, fan_in, channels, (size, size, 0), name, last, paths("conv", ()), paths("norm", ()))]
    node, node1, node2 = channels // 3, f"{name}.node1", f"{name}.node2"
    first, second = paths("neurons", (0,), (1,))
    # The cells of the three nodes read the same input: one layer.
    cells, norms = (paths(kind, (0,), (1,), (2,)) for kind in ("cells", "cell_norms"))
    edges = [(paths("edges", (k,)), paths("edge_norms", (k,))) for k in range(2)]
    return [
        row(".cells", before, 9 * inputs, channels, (3, 2, 1), node1, first, cells, norms),
        row(".edge1", (node1,), 9 * node, node, (3, 1, 1), node2, second, *edges[0]),
        row(".edge2", (node2,), 9 * node, node, (3, 1, 1), name, last, *edges[1]),
    ]


def _block(c: Geometry, i: int, j: int, before: tuple[str, ...]) -> list[Layer]:
    side, channels, name, stage = c.stage_side(i), c.stage_dim(i), f"stage{i}.block{j}", f"stage{i}"
    tokens, hidden, plain = side * side, c.expansion * channels, c.encoding == "plain"
    # LayerNorms, which only a ModelConfig can have, replace all norms but those of identity and fusion.
    sample = getattr(c, "norm", "batch") == "layer"
    mixing, features = ("sample", "sample") if sample else ("outputs", "tokens" if c.per_token else "outputs")
    identity, height, width, token, inner = (
        (f"{name}.{to}",) for to in ("token.identity", "token.height", "token.width", "token", "channel.hidden")
    )
    fused = (identity if plain else before) + height + width
    mixed = (side, side, side * channels)
    # Layer, kind, what it reads, (fan_in, out, positions), features of its norm; its neurons, place of their format;
    # modules with its kernel, its norm and its neurons.
    table = [
        ("identity", "identity", before, (0, channels, tokens), "outputs", "token.identity", f"{name}.identity",
         "", "token.identity_norm", "token.identity_neuron"),
        ("height", "height", before, mixed, mixing, "token.height", f"{name}.height",
         "token.height", "token.height.norm", "token.height.neuron"),
        ("width", "width", before, mixed, mixing, "token.width", f"{name}.width",
         "token.width", "token.width.norm", "token.width.neuron"),
        ("fuse", "dense", fused, (3 * channels, channels, tokens), "outputs", "token", stage,
         "token.fuse", "token.norm", "token_neuron"),
        ("expand", "dense", token, (channels, hidden, tokens), features, "channel.hidden", f"{name}.hidden",
         "channel.expand", "channel.hidden_norm", "channel.neuron"),
        ("project", "dense", inner, (hidden, channels, tokens), features, "channel", stage,
         "channel.project", "channel.norm", "channel_neuron"),
    ]  # fmt: skip
    rows = []
    for part, kind, reads, (fan_in, out, positions), norm, to, place, *modules in table[0 if plain else 1 :]:
        kernel, norm_path, neuron = (("stages", i, "blocks", *module.split(".")) for module in modules)
        shape = (side, side, hidden if part == "expand" else channels)
        per_token = norm == "tokens"
        neurons = Neurons(f"{name}.{to}", shape, place, f"{name}.{part}", per_token and part == "expand", neuron)
        # A token's scale is applied to potentials of a format of their own.
        place = f"{name}.project" if per_token and part == "project" else place
        kernels = () if part == "identity" else (kernel,)
        rows.append(
            Layer(f"{name}.{part}", kind, fan_in, out, positions, None, norm, place, reads, neurons, kernels,
                  (norm_path,), j)
        )  # fmt: skip
    return rows


def neurons(c: Geometry) -> list[Neurons]:
    """Every layer of neurons, in the order of the network."""
    return [layer.neurons for layer in layers(c) if layer.neurons]


class Walk:
    """The data flow of a network, over values that a subclass defines: arrays, intervals, nodes of a graph.

    A subclass implements `linear`, `identity`, `head`, `fire`, `add`, `split` and `concat`, each for one layer or
    neurons of the table, and overrides `stem`, `fuse`, `patch_encoding` or `scope` where the defaults do not fit.
    "Spikes" and "potentials" are whatever `fire` and `linear` return; nothing else is assumed about them.

    Args:
        c: a ModelConfig or a Description.

    Attributes:
        c: likewise.
        layers: the table by layers' names.
        neurons: likewise of the neurons.
    """

    def __init__(self, c: Any):
        self.c = c
        self.layers = {layer.name: layer for layer in layers(c)}
        self.neurons = {layer.neurons.name: layer.neurons for layer in self.layers.values() if layer.neurons}

    def run(self, x: Any) -> Any:
        """What `head` returns for the pixels x."""
        for i, depth in enumerate(self.c.depths):
            name = f"stage{i}.encode"
            with self.scope(name):
                h = self.encode(i, x)
                x = self.fire(self.neurons[name], h)
            for j in range(depth):
                x = self.block(f"stage{i}.block{j}", x, h)
        with self.scope("head"):
            return self.head(self.layers["head"], x)

    def encode(self, i: int, x: Any) -> Any:
        """A stage's potential h, for pixels or the spikes of the stage before."""
        layer = self.layers.get(f"stage{i}.encode")
        if layer is None:
            return self.patch_encoding(i, x)
        return self.stem(layer, x) if i == 0 else self.linear(layer, x)

    def patch_encoding(self, i: int, x: Any) -> Any:
        """Spiking patch encoding: n1, n2 + edge1(LIF(n1)) and n3 + n1 + edge2(LIF(n2)), behind one another."""
        name = f"stage{i}.encode"
        cells, edge1, edge2 = (self.layers[f"{name}.{part}"] for part in ("cells", "edge1", "edge2"))
        n1, n2, n3 = self.split(self.linear(cells, x))
        spikes = self.fire(self.neurons[f"{name}.node1"], n1)
        n2 = self.add(n2, self.linear(edge1, spikes), edge1.place)
        n3 = self.add(n3, n1, edge2.place)
        spikes = self.fire(self.neurons[f"{name}.node2"], n2)
        n3 = self.add(n3, self.linear(edge2, spikes), edge2.place)
        return self.concat([n1, n2, n3])

    def block(self, name: str, x: Any, h: Any) -> Any:
        """The spikes after a block, for those before it; its skip connection is the stage's potential h."""
        layers, neurons = self.layers, self.neurons
        token, channel, place = f"{name}.token", f"{name}.channel", layers[f"{name}.fuse"].place
        parts = [x]
        if f"{name}.identity" in layers:
            with self.scope(f"{token}.identity"):
                potential = self.identity(layers[f"{name}.identity"], x)
                parts = [self.fire(neurons[f"{token}.identity"], potential)]
        for axis in ("height", "width"):
            with self.scope(f"{token}.{axis}"):
                parts.append(self.fire(neurons[f"{token}.{axis}"], self.linear(layers[f"{name}.{axis}"], x)))
        with self.scope(f"{token}.fuse"):
            fused = self.fuse(layers[f"{name}.fuse"], parts)
        with self.scope(token):
            potential = self.add(h, fused, place)
            x = self.fire(neurons[token], potential)
        with self.scope(f"{channel}.hidden"):
            x = self.fire(neurons[f"{channel}.hidden"], self.linear(layers[f"{name}.expand"], x))
        with self.scope(f"{channel}.project"):
            projected = self.linear(layers[f"{name}.project"], x)
        with self.scope(channel):
            return self.fire(neurons[channel], self.add(potential, projected, place))

    # What a subclass says.

    def scope(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Entered around a part: neurons' names ("stage0.block0.token.height"), and "....token.fuse",
        "....channel.project" and "head". Scopes are not nested."""
        return contextlib.nullcontext()

    def stem(self, layer: Layer, pixels: Any) -> Any:
        """Potential of the first stage; `linear` unless overridden."""
        return self.linear(layer, pixels)

    def linear(self, layer: Layer, spikes: Any) -> Any:
        """A "conv", "height", "width" or "dense" layer's potential, its norm included (see `Layer.norm`)."""
        raise NotImplementedError

    def fuse(self, layer: Layer, parts: Sequence[Any]) -> Any:
        """The layer that reads three spikes, identity, height and width; `linear` of their `concat`."""
        return self.linear(layer, self.concat(parts))

    def identity(self, layer: Layer, spikes: Any) -> Any:
        """The norm of "plain" encoding's identity: one potential for no spike and one for a spike."""
        raise NotImplementedError

    def head(self, layer: Layer, spikes: Any) -> Any:
        """Class scores, for spikes that are summed over all tokens."""
        raise NotImplementedError

    def fire(self, neurons: Neurons, potential: Any) -> Any:
        """Spikes."""
        raise NotImplementedError

    def add(self, a: Any, b: Any, place: str) -> Any:
        """The sum of two potentials; `place` is that of its number format."""
        raise NotImplementedError

    def split(self, potential: Any) -> Sequence[Any]:
        """Three equal parts of the channels."""
        raise NotImplementedError

    def concat(self, parts: Sequence[Any]) -> Any:
        """Spikes, or potentials of one stage, behind one another in the channels."""
        raise NotImplementedError


def intermediate_names(c: Geometry) -> list[str]:
    """Names of all intermediates that `SpikingMLP.__call__` shows to `observe`, in the order of the network.

    Examples:
        >>> from spiking_mlp_jax import ModelConfig
        >>> config = ModelConfig(image_size=8, in_channels=1, num_classes=3, patch_size=4, dim=3, depths=(1,))
        >>> intermediate_names(config)[:3]
        ['stage0.encode.potential', 'stage0.encode.spikes', 'stage0.block0.token.height.potential']
    """
    return list(intermediate_shapes(c))


def intermediate_shapes(c: Geometry) -> dict[str, tuple[int, int, int, int]]:
    """Shape [T, H, W, C] of every intermediate, in the order of the network; T is 1 where all steps are equal.

    Examples:
        >>> from spiking_mlp_jax import ModelConfig
        >>> config = ModelConfig(image_size=8, in_channels=1, num_classes=3, patch_size=4, dim=3, depths=(1,))
        >>> intermediate_shapes(config)["stage0.encode.spikes"]
        (4, 2, 2, 3)
    """
    shapes = {}
    for n in neurons(c):
        # Before the first neurons all steps are equal, unless each has its own norm.
        once = n.name == "stage0.encode" and getattr(c, "norm", "batch") != "tebn"
        shapes[f"{n.name}.potential"] = (1 if once else c.time_steps, *n.shape)
        shapes[f"{n.name}.spikes"] = (c.time_steps, *n.shape)
    return shapes


def neuron_counts(c: Geometry) -> dict[str, int]:
    """Number of neurons of every layer of spikes ("stage0.encode.spikes"), in the order of the network.

    Examples:
        >>> from spiking_mlp_jax import ModelConfig
        >>> counts = neuron_counts(ModelConfig(image_size=8, patch_size=4, dim=3, depths=(1,), expansion=3))
        >>> counts["stage0.encode.spikes"], counts["stage0.block0.channel.hidden.spikes"]
        (12, 36)
    """
    return {f"{n.name}.spikes": n.count for n in neurons(c)}


def fan_out(c: Geometry) -> dict[str, float | int]:
    """Synapses that one spike of each layer reaches, mean over the layer's neurons.

    Near the border of a padded convolution a spike reaches fewer; the mean is exact, and an int where it is whole.

    Returns:
        synapses by layer of spikes, in the order of the network.
    """
    return {name: int(mean) if mean.denominator == 1 else float(mean) for name, (_, mean) in _reached(c).items()}


def dense_operations(c: Geometry) -> float:
    """Synaptic operations of an image if every neuron fired at each of the time steps.

    Examples:
        >>> from spiking_mlp_jax import ModelConfig
        >>> f"{dense_operations(ModelConfig.variant('mlp_spe_t')):,.0f}"
        '19,901,210,784'
    """
    return c.time_steps * float(sum(count * reached for count, reached in _reached(c).values()))


def _reached(c: Geometry) -> dict[str, tuple[int, Fraction]]:
    """Neurons, and synapses of a spike, of every layer of spikes."""
    pairs: dict[str, int] = {}
    rows = layers(c)
    for layer in rows:
        repeats = c.stage_side(c.stages - 1) ** 2 if layer.kind == "head" else 1
        for name, inputs in zip(layer.reads, np.split(layer.inputs(), max(len(layer.reads), 1)), strict=False):
            pairs[name] = pairs.get(name, 0) + int(inputs.sum()) * layer.out * repeats
    found = [layer.neurons for layer in rows if layer.neurons]
    return {f"{n.name}.spikes": (n.count, Fraction(pairs[n.name], n.count)) for n in found}
