"""What the floating-point and the integer graph have in common: the network's parts and how they hang together.

Values are [S, batch, ...], where S is 1, or T where each time step has its own. Tokens stand row by row,
[S, batch, N, C]. Maps of spikes are matrix products over all steps at once; neurons are unrolled over the steps.
"""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import numpy as np

from spiking_mlp_jax.interop.onnx.graph import Graph

# ONNX's numbers of types.
FLOAT, UINT8, INT32, INT64, BOOL, UINT32, UINT64 = 1, 2, 6, 7, 9, 12, 13


class Signal(NamedTuple):
    """A value of the graph, its time steps S, and its shape after [S, batch]."""

    name: str
    steps: int
    tail: tuple[int, ...]


class Network(abc.ABC):
    """Adds a network to a graph.

    Args:
        graph: where to.
        c: a ModelConfig or a Description.
    """

    product: str

    def __init__(self, graph: Graph, c: Any):
        self.graph, self.c = graph, c

    def logits(self, images: str) -> Signal:
        """Logits [T, batch, K] of images [batch, H, W, C]."""
        c = self.c
        x = Signal(images, 1, (c.image_size, c.image_size, c.in_channels))
        for i, depth in enumerate(c.depths):
            with self.graph.scope(f"stage{i}"):
                h = self.encode(i, x)
                x = self.fire(f"stage{i}.encode", h)
                for j in range(depth):
                    with self.graph.scope(f"block{j}"):
                        x = self.block(i, f"stage{i}.block{j}", x, h)
        with self.graph.scope("head"):
            return self.head(x)

    @abc.abstractmethod
    def entry(self, layer: str, key: str) -> np.ndarray:
        """One of a layer's arrays, in the type that the graph computes it in."""

    @abc.abstractmethod
    def stem(self, patches: Signal) -> Signal:
        """Potentials of the first stage for pixels [1, batch, N, fan_in]."""

    @abc.abstractmethod
    def scaled(self, layer: str, sums: Signal, axis: int) -> Signal:
        """A map's result for its sums of weights; `axis`, from the end, is that of its outputs."""

    @abc.abstractmethod
    def fire(self, neurons: str, x: Signal) -> Signal:
        """Spikes, for potentials."""

    @abc.abstractmethod
    def channel(self, name: str, x: Signal) -> Signal:
        """What a channel block adds to the potential."""

    @abc.abstractmethod
    def head(self, x: Signal) -> Signal:
        """Logits of each step."""

    def encode(self, i: int, x: Signal) -> Signal:
        """A stage's potential, for pixels or the last stage's spikes."""
        name, c = f"stage{i}.encode", self.c
        with self.graph.scope("encode"):
            if i == 0:
                return self.stem(self.patches(x, c.image_size, c.patch_size))
            side = c.stage_side(i - 1)
            if c.encoding == "plain":
                return self.map(name, self.patches(x, side, 2))
            cells = self.map(f"{name}.cells", self.windows(x, side, 2))
            tail = (*cells.tail[:-1], cells.tail[-1] // 3)
            n1, n2, n3 = (Signal(part, cells.steps, tail) for part in self.graph.split(cells.name, 3, -1))
            seen = self.windows(self.fire(f"{name}.node1", n1), side // 2, 1)
            n2 = self.add(n2, self.map(f"{name}.edge1", seen))
            seen = self.windows(self.fire(f"{name}.node2", n2), side // 2, 1)
            n3 = self.add(self.add(n3, n1), self.map(f"{name}.edge2", seen))
            return self.joined([self.each_step(part, n3.steps) for part in (n1, n2, n3)])

    def block(self, i: int, name: str, x: Signal, h: Signal) -> Signal:
        """The spikes after a block."""
        side, channels = self.c.stage_side(i), self.c.stage_dim(i)
        with self.graph.scope("token"):
            parts = [x if self.c.encoding == "spe" else self.identity(f"{name}.identity", x)]
            for layer, tail in (("height", (side, side * channels)), ("width", (side, side, channels))):
                with self.graph.scope(layer):
                    mixed = self.map(f"{name}.{layer}", self.reshaped(x, tail), -2)
                    parts.append(self.reshaped(self.fire(f"{name}.{layer}", mixed), x.tail))
            potential = self.add(h, self.map(f"{name}.fuse", self.joined(parts)))
            x = self.fire(f"{name}.token", potential)
        with self.graph.scope("channel"):
            return self.fire(f"{name}.channel", self.add(potential, self.channel(name, x)))

    def identity(self, name: str, x: Signal) -> Signal:
        """The neurons of "plain" encoding's identity, which see one of two potentials."""
        with self.graph.scope("identity"):
            low, high = (along(self.entry(name, key), len(x.tail), -1) for key in ("low", "high"))
            chosen = self.graph.op("Where", self.graph.op("Cast", x.name, to=BOOL), high, low)
            return self.fire(name, x._replace(name=chosen))

    def map(self, layer: str, x: Signal, axis: int = -1) -> Signal:
        """A layer's map of spikes, of which `axis` are the inputs: -1, or -2 for those that mix tokens."""
        return self.scaled(layer, self.accumulate(layer, x, axis), axis)

    def accumulate(self, layer: str, x: Signal, axis: int = -1) -> Signal:
        """The matrix product of `map`."""
        kernel = self.entry(layer, "kernel")
        steps, _, out = kernel.shape
        if axis == -2:
            # The kernel stands on the left, so that nothing is transposed.
            kernel = kernel.swapaxes(1, 2).reshape(steps, *(1,) * (len(x.tail) - 1), out, -1)
            weights = self.graph.constant(kernel if steps > 1 else kernel.reshape(out, -1), f"{layer}.kernel")
            found = self.graph.op(self.product, weights, x.name)
            return Signal(found, max(steps, x.steps), (*x.tail[:-2], out, x.tail[-1]))
        tail = (*x.tail[:-1], out)
        if steps == 1:
            weights = self.graph.constant(kernel[0], f"{layer}.kernel")
            return x._replace(name=self.graph.op(self.product, x.name, weights), tail=tail)
        rows = self.graph.op("Reshape", x.name, np.array([x.steps, -1, x.tail[-1]]))
        found = self.graph.op(self.product, rows, self.graph.constant(kernel, f"{layer}.kernel"))
        return Signal(self.graph.op("Reshape", found, np.array([steps, -1, *tail])), steps, tail)

    def per_step(self, x: Signal) -> list[str]:
        """The value at each of the T steps."""
        parts = self.graph.split(x.name, x.steps, 0) if x.steps > 1 else [x.name]
        return [parts[min(t, len(parts) - 1)] for t in range(self.c.time_steps)]

    def spikes(self, x: Signal, fired: list[str], to: int) -> Signal:
        """What fired at each step, as 0 and 1 of a type."""
        together = self.graph.op("Concat", *fired, axis=0) if len(fired) > 1 else fired[0]
        return x._replace(name=self.graph.op("Cast", together, to=to), steps=len(fired))

    def fired(self, potential: str, level: np.ndarray, below: np.ndarray) -> str:
        """Whether a potential is at or above its level, or at or below it for the tokens where `below`."""
        op = self.graph.op
        if below.all():
            return op("LessOrEqual", potential, level)
        above = op("GreaterOrEqual", potential, level)
        if not below.any():
            return above
        turned = op("And", op("LessOrEqual", potential, level), below)
        return op("Or", op("And", above, ~below), turned)

    def patches(self, x: Signal, side: int, size: int) -> Signal:
        """Squares [S, batch, N, size * size * C] that do not overlap."""
        high, channels = side // size, x.tail[-1]
        cut = self.graph.op("Reshape", x.name, np.array([x.steps, -1, high, size, high, size, channels]))
        turned = self.graph.op("Transpose", cut, perm=[0, 1, 2, 4, 3, 5, 6])
        return self.reshaped(x._replace(name=turned), (high * high, size * size * channels))

    def windows(self, x: Signal, side: int, stride: int) -> Signal:
        """What is under each window of a 3 x 3 convolution, [S, batch, N, 9 * C]."""
        channels, high = x.tail[-1], side // stride
        grid = self.reshaped(x, (side, side, channels)).name
        padded = self.graph.op("Pad", grid, np.array([0, 0, 1, 1, 0] * 2))
        axes, strides = np.array([2, 3]), np.array([stride, stride])
        parts = []
        for start in np.ndindex(3, 3):
            corner = np.array(start)
            parts.append(self.graph.op("Slice", padded, corner, corner + (high - 1) * stride + 1, axes, strides))
        together = self.graph.op("Concat", *parts, axis=-1)
        return self.reshaped(x._replace(name=together), (high * high, 9 * channels))

    def reshaped(self, x: Signal, tail: tuple[int, ...]) -> Signal:
        """The same numbers as [S, batch, *tail]."""
        return x._replace(name=self.graph.op("Reshape", x.name, np.array([x.steps, -1, *tail])), tail=tail)

    def each_step(self, x: Signal, steps: int) -> Signal:
        """x itself, or copies of it where only one step is there."""
        if x.steps == steps:
            return x
        return x._replace(name=self.graph.op("Concat", *[x.name] * steps, axis=0), steps=steps)

    def joined(self, parts: list[Signal]) -> Signal:
        """The parts' channels behind one another."""
        first = parts[0]
        tail = (*first.tail[:-1], sum(part.tail[-1] for part in parts))
        return first._replace(name=self.graph.op("Concat", *[part.name for part in parts], axis=-1), tail=tail)

    def add(self, one: Signal, other: Signal) -> Signal:
        """Their sum."""
        return one._replace(name=self.graph.op("Add", one.name, other.name), steps=max(one.steps, other.steps))


def along(values: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """Constants [S, n] shaped for values [S, batch, *tail] with `rank` axes in the tail: n stands at `axis`."""
    steps, count = values.shape
    behind = (1,) * (-axis - 1)
    if steps == 1:
        return values.reshape(count, *behind)
    return values.reshape(steps, *(1,) * (rank - len(behind)), count, *behind)
