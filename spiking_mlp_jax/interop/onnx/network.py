"""Base class of the floating-point and the integer ONNX graph: a walk over the network with nodes as values.

Values are [S, batch, ...], where S is 1, or T where time steps differ. Spikes and potentials are tokens in rows,
[S, batch, N, C]. Linear layers are matrix products over all steps at once; neurons are unrolled over the steps.
"""

from __future__ import annotations

import abc
import math
from typing import Any, NamedTuple

import numpy as np

from spiking_mlp_jax.interop.onnx.graph import Graph
from spiking_mlp_jax.models.topology import Layer, Walk

# ONNX's type numbers.
FLOAT, UINT8, INT32, INT64, BOOL, UINT32, UINT64 = 1, 2, 6, 7, 9, 12, 13


class Signal(NamedTuple):
    """A value of the graph, its number of time steps S, and its shape after [S, batch]."""

    name: str
    steps: int
    tail: tuple[int, ...]


class Network(Walk, abc.ABC):
    """Adds a network to a graph.

    Args:
        graph: to add to.
        c: a ModelConfig or a Description.
    """

    product: str

    def __init__(self, graph: Graph, c: Any):
        super().__init__(c)
        self.graph = graph

    def logits(self, images: str) -> Signal:
        """Logits [T, batch, K] of images [batch, H, W, C]."""
        c = self.c
        x = self.graph.op("Reshape", images, np.array([1, -1, c.image_size**2, c.in_channels]))
        return self.run(Signal(x, 1, (c.image_size**2, c.in_channels)))

    @abc.abstractmethod
    def entry(self, layer: str, key: str) -> np.ndarray:
        """One of a layer's arrays, in the graph's dtype."""

    @abc.abstractmethod
    def scaled(self, layer: Layer, sums: Signal, axis: int) -> Signal:
        """A layer's potential from its sums of weights; `axis`, from the end, is that of the outputs."""

    @abc.abstractmethod
    def per_token(self, layer: Layer, z: Signal) -> Signal:
        """The norm per token after a layer's weights, except what is folded into thresholds."""

    def scope(self, name):
        return self.graph.scope(name.replace(".", "/"))

    def linear(self, layer, spikes):
        tail = spikes.tail
        if layer.window is not None:
            return self.map(layer, self.windows(spikes, *layer.window))
        if layer.kind in ("height", "width"):
            side, channels = math.isqrt(tail[0]), tail[1]
            mixed = (side, side * channels) if layer.kind == "height" else (side, side, channels)
            return self.reshaped(self.map(layer, self.reshaped(spikes, mixed), -2), tail)
        z = self.map(layer, spikes)
        return self.per_token(layer, z) if layer.norm == "tokens" else z

    def identity(self, layer, spikes):
        low, high = (along(self.entry(layer.name, key), len(spikes.tail), -1) for key in ("low", "high"))
        return spikes._replace(name=self.graph.op("Where", self.graph.op("Cast", spikes.name, to=BOOL), high, low))

    def add(self, a, b, place):
        return a._replace(name=self.graph.op("Add", a.name, b.name), steps=max(a.steps, b.steps))

    def split(self, potential):
        tail = (*potential.tail[:-1], potential.tail[-1] // 3)
        return [potential._replace(name=part, tail=tail) for part in self.graph.split(potential.name, 3, -1)]

    def concat(self, parts):
        steps = max(part.steps for part in parts)
        names = [self.each_step(part, steps).name for part in parts]
        tail = (*parts[0].tail[:-1], sum(part.tail[-1] for part in parts))
        return Signal(self.graph.op("Concat", *names, axis=-1), steps, tail)

    def map(self, layer: Layer, x: Signal, axis: int = -1) -> Signal:
        """A layer's weights and bias; its inputs are at `axis`, -1, or -2 for layers that mix tokens."""
        return self.scaled(layer, self.accumulate(layer, x, axis), axis)

    def accumulate(self, layer: Layer, x: Signal, axis: int = -1) -> Signal:
        """The matrix product of `map`."""
        kernel, name = self.entry(layer.name, "kernel"), f"{layer.name}.kernel"
        steps, _, out = kernel.shape
        if axis == -2:
            # The kernel is on the left, so that nothing is transposed.
            kernel = kernel.swapaxes(1, 2).reshape(steps, *(1,) * (len(x.tail) - 1), out, -1)
            weights = self.graph.constant(kernel if steps > 1 else kernel.reshape(out, -1), name)
            found = self.graph.op(self.product, weights, x.name)
            return Signal(found, max(steps, x.steps), (*x.tail[:-2], out, x.tail[-1]))
        tail = (*x.tail[:-1], out)
        if steps == 1:
            weights = self.graph.constant(kernel[0], name)
            return x._replace(name=self.graph.op(self.product, x.name, weights), tail=tail)
        rows = self.graph.op("Reshape", x.name, np.array([x.steps, -1, x.tail[-1]]))
        found = self.graph.op(self.product, rows, self.graph.constant(kernel, name))
        return Signal(self.graph.op("Reshape", found, np.array([steps, -1, *tail])), steps, tail)

    def per_step(self, x: Signal) -> list[str]:
        """The value at each of the T steps."""
        parts = self.graph.split(x.name, x.steps, 0) if x.steps > 1 else [x.name]
        return [parts[min(t, len(parts) - 1)] for t in range(self.c.time_steps)]

    def spikes(self, x: Signal, fired: list[str], to: int) -> Signal:
        """The spikes of all steps, as 0 and 1 of type `to`."""
        together = self.graph.op("Concat", *fired, axis=0) if len(fired) > 1 else fired[0]
        return x._replace(name=self.graph.op("Cast", together, to=to), steps=len(fired))

    def fired(self, potential: str, level: np.ndarray, below: np.ndarray) -> str:
        """Whether a potential is at or above its level; at or below it for tokens where `below`."""
        op = self.graph.op
        if below.all():
            return op("LessOrEqual", potential, level)
        above = op("GreaterOrEqual", potential, level)
        if not below.any():
            return above
        reversed_ = op("And", op("LessOrEqual", potential, level), below)
        return op("Or", op("And", above, ~below), reversed_)

    def windows(self, x: Signal, size: int, stride: int, padding: int) -> Signal:
        """The windows of a convolution, [S, batch, N, size * size * C]."""
        side, channels = math.isqrt(x.tail[0]), x.tail[1]
        high, op = side // stride, self.graph.op
        if not padding:
            cut = op("Reshape", x.name, np.array([x.steps, -1, high, size, high, size, channels]))
            found = op("Transpose", cut, perm=[0, 1, 2, 4, 3, 5, 6])
        else:
            grid = self.reshaped(x, (side, side, channels)).name
            padded = op("Pad", grid, np.array([0, 0, padding, padding, 0] * 2))
            axes, strides = np.array([2, 3]), np.array([stride, stride])
            corners = [np.array(corner) for corner in np.ndindex(size, size)]
            last = (high - 1) * stride + 1
            parts = [op("Slice", padded, corner, corner + last, axes, strides) for corner in corners]
            found = op("Concat", *parts, axis=-1)
        return self.reshaped(x._replace(name=found), (high * high, size * size * channels))

    def reshaped(self, x: Signal, tail: tuple[int, ...]) -> Signal:
        """Reshape to [S, batch, *tail]."""
        return x._replace(name=self.graph.op("Reshape", x.name, np.array([x.steps, -1, *tail])), tail=tail)

    def each_step(self, x: Signal, steps: int) -> Signal:
        """x, repeated if it has only one step."""
        if x.steps == steps:
            return x
        return x._replace(name=self.graph.op("Concat", *[x.name] * steps, axis=0), steps=steps)


def along(values: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """Constants [S, n], reshaped to broadcast over [S, batch, *tail] with `rank` axes in the tail and n at `axis`."""
    steps, count = values.shape
    behind = (1,) * (-axis - 1)
    if steps == 1:
        return values.reshape(count, *behind)
    return values.reshape(steps, *(1,) * (rank - len(behind)), count, *behind)
