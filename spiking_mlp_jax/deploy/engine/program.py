"""An integer network as a list of kernel calls over buffers of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from spiking_mlp_jax.deploy.engine.operands import Axis, Constants, Place, Source, Spikes, State, flat, padded, valid
from spiking_mlp_jax.deploy.network import Format


class Call(NamedTuple):
    """A kernel, the number of tokens (positions, lanes) that it runs over, and its arguments from a time step on."""

    kernel: str
    extent: int
    arguments: Callable[[int], tuple]
    scratch: int = 0  # number of a thread's scratch arrays that it takes after its arguments
    once: bool = False  # does not depend on the time step: runs before the first only
    unit: int = 1  # a thread's part of the extent is a multiple of it


class Program:
    """Calls in order, and their buffers.

    Args:
        slots: images in flight.
        steps: time steps of a run.
        keep: whether potentials are stored, so that a run can continue the last one.
        constants: of the network, shared by programs.

    Attributes:
        images: uint8 [slots * bytes of an image], the input.
        logits: int32 [slots, steps, lanes of the classes].
        stem_steps: time steps with a potential of their own in the first stage.
    """

    def __init__(self, slots: int, steps: int, keep: bool, constants: Constants):
        self.net, self.slots, self.steps, self.keep = constants.net, slots, steps, keep
        self.c = self.net.description
        self.constants, self.rows, self.neuron = constants, constants.rows, constants.neuron
        self.calls: list[Call] = []
        self._scratch: list[tuple[np.ndarray, ...]] = []
        self.room = 0
        self.shared: dict[tuple[str, np.dtype], np.ndarray] = {}
        c = self.c
        self.words = np.zeros(0, np.uint32)
        self.images = np.zeros(slots * c.image_size * c.image_size * c.in_channels, np.uint8)
        for i, depth in enumerate(c.depths):
            potential = self.encode(i)
            for j in range(depth):
                self.block(i, f"stage{i}.block{j}", potential)
        self.head()

    def scratch(self, threads: int) -> list[tuple[np.ndarray, ...]]:
        """Each thread's list of spikes, the ends of its parts, and the bytes of a patch."""
        while len(self._scratch) < threads:
            ends = np.zeros(max(8, self.steps), np.int64)
            self._scratch.append((np.zeros(self.room + 64, np.uint32), ends, np.zeros(self.patch, np.uint8)))
        return self._scratch

    # Buffers. A stage's spikes are [slots, tokens, steps, 3, words]: of its last neurons, of height and of width
    # mixing, so that what the fusion reads lies together.

    def buffer(self, name: str, dtype, size: int) -> np.ndarray:
        """Memory shared by layers that run one after another."""
        key = name, np.dtype(dtype)
        if key not in self.shared or self.shared[key].size < size:
            self.shared[key] = np.zeros(size, dtype)
        return self.shared[key]

    def spikes(self, words: np.ndarray, tokens: int, pitch: int, channels: int, at: int = 0) -> Spikes:
        """Where in a buffer a kernel writes spikes."""
        return Spikes(words, True, tokens * self.steps * pitch, self.steps * pitch, pitch, at, valid(channels))

    def no_spikes(self) -> Spikes:
        """For a kernel that writes no spikes."""
        return Spikes(np.zeros(1, np.uint32), False, 0, 0, 0, 0, valid(1))

    def no_place(self, dtype) -> Place:
        """For a kernel that adds nothing to a potential."""
        return Place(np.zeros(1, dtype), False, 0, 0, 0, 0)

    def state(self, dtype, tokens: int, lanes: int) -> tuple[State, State]:
        """Stored potentials at the first time step and later; of no tokens where there are no neurons."""
        keep = self.keep and tokens > 0
        values = np.zeros(self.slots * tokens * lanes if keep else 1, dtype)
        first = State(values, True, keep, tokens * lanes, lanes)
        return first, first._replace(begin=not keep)

    def source(self, words, tokens: int, pitch: int, near, width: int, rows: list[np.ndarray], row: int) -> Source:
        """What a layer reads.

        Args:
            words, tokens, pitch: a buffer [slots, tokens, steps, pitch].
            near: int64 [., positions], tokens of that buffer, or -1.
            width: words at each position.
            rows: for each position, the kernel's row for each of the `width` words' lanes.
            row: bytes of a row.
        """
        table = np.concatenate(rows).astype(np.int64) * row
        near = np.where(near < 0, -1, near * self.steps * pitch)
        return Source(
            words=words,
            slot=tokens * self.steps * pitch,
            step=pitch,
            near=near.astype(np.int64).ravel(),
            positions=near.shape[1],
            width=width,
            lanes=32 * width,
            table=table.astype(np.uint32),
        )

    def layer(
        self, name, tokens, source, dtype, *, norm="", neuron=None, addend=None, also=None, result=None, out=None
    ):
        """Add a call of `kernels.layer`, whose result is the sum of the layer, `addend` and `also`."""
        synapses = self.constants.synapses(name, dtype)
        constants = self.constants.norm(name, dtype, tokens, norm)
        storage = next((p.values.dtype for p in (addend, also, result) if p is not None), np.dtype(dtype))
        none = self.no_place(storage)
        addend, also, result = (none if p is None else p for p in (addend, also, result))
        neuron = neuron or self.neuron(Format(0, 32, 1, 0))
        state = self.state(dtype, tokens, synapses.row) if out is not None else self.state(dtype, 0, 0)
        out = out or self.no_spikes()
        self.room = max(self.room, self.steps * source.positions * source.lanes)

        def arguments(t):
            # The first stage's potential is stored for all time steps; other buffers hold those of one run.
            lies = addend._replace(at=addend.at + t * addend.step) if addend.values is self.first else addend
            return (
                source, synapses, t * synapses.kernel_step, t * synapses.step, constants, t * constants.offset_step,
                neuron, lies, also, result, out, state[t > 0],
            )  # fmt: skip

        self.calls.append(Call("layer", tokens, arguments, scratch=2))

    def fire(self, potential: Place, tokens: int, channels: int, place: Format, out: Spikes):
        """Add the call of the neurons of a stored potential."""
        lanes, neuron, zero = padded(channels), self.neuron(place), np.zeros(1, place.dtype)
        state = self.state(place.dtype, tokens, lanes)

        def arguments(t):
            lies = potential._replace(at=potential.at + t * potential.step)
            return lies if potential.values is self.first else potential, lanes, zero, neuron, out, state[t > 0]

        self.calls.append(Call("fire", tokens, arguments))

    def encode(self, i: int) -> Place:
        """Add the calls from pixels or spikes to the stage's spikes, `self.words`; return its potential."""
        c, name, place = self.c, f"stage{i}.encode", self.c.formats[f"stage{i}"]
        tokens, channels = c.stage_side(i) ** 2, c.stage_dim(i)
        self.pitch = 3 * padded(channels) // 32
        before, self.words = self.words, np.zeros(self.slots * tokens * self.steps * self.pitch, np.uint32)
        if i == 0:
            potential = self.stem(tokens, channels, place)
        else:
            node = channels // 3
            # The three nodes are written in whole words, the last one beyond the channels.
            lanes = padded(channels) if c.encoding == "plain" else max(padded(channels), 2 * node + padded(node))
            values = np.zeros(self.slots * tokens * self.steps * lanes, place.dtype)
            potential = Place(values, True, tokens * self.steps * lanes, self.steps * lanes, lanes, 0)
            if c.encoding == "plain":
                self.window(name, before, result=potential)
            else:
                self.patch_encoding(name, before, potential, place)
        self.fire(potential, tokens, channels, place, self.spikes(self.words, tokens, self.pitch, channels))
        return potential

    def stem(self, tokens: int, channels: int, place: Format) -> Place:
        """Add the call from bytes of pixels to the first potential."""
        c = self.c
        synapses = self.constants.synapses("stage0.encode", np.int32, 64)
        counts = len(self.net.arrays["stage0.encode.kernel"])
        values = np.zeros(self.slots * tokens * counts * synapses.row, place.dtype)
        step = synapses.row if counts > 1 else 0
        potential = Place(values, True, tokens * counts * synapses.row, counts * synapses.row, step, 0)
        self.first = values
        bytes_of_row = c.image_size * c.in_channels
        side, size = c.stage_side(0), c.patch_size
        corners = np.add.outer(np.arange(side) * size * bytes_of_row, np.arange(side) * size * c.in_channels)
        pixels = np.add.outer(np.arange(size) * bytes_of_row, np.arange(size * c.in_channels)).ravel()
        table = np.minimum(np.arange(padded(pixels.size)), pixels.size - 1) * synapses.row
        self.room = max(self.room, 8 * pixels.size)
        self.patch = padded(pixels.size)
        arguments = (
            self.images, bytes_of_row * c.image_size, corners.ravel().astype(np.int64), pixels.astype(np.int64),
            table.astype(np.uint32), synapses, potential,
        )  # fmt: skip
        self.stem_steps = counts
        self.calls.append(Call("stem", tokens, lambda t: arguments, scratch=3, once=True))
        return potential

    def patch_encoding(self, name: str, before: np.ndarray, potential: Place, place: Format):
        """Add the calls of spiking patch encoding's three nodes."""
        tokens, node = self.rows[f"{name}.edge1"].positions, self.rows[f"{name}.edge1"].out
        pitch = padded(node) // 32
        first, second = (
            self.buffer(n, np.uint32, self.slots * tokens * self.steps * pitch) for n in ("node1", "node2")
        )
        at = [potential._replace(at=k * node) for k in range(3)]
        self.window(f"{name}.cells", before, result=potential)
        self.fire(at[0], tokens, node, place, self.spikes(first, tokens, pitch, node))
        self.window(
            f"{name}.edge1", first,
            addend=at[1], result=at[1], neuron=self.neuron(place), out=self.spikes(second, tokens, pitch, node),
        )  # fmt: skip
        self.window(f"{name}.edge2", second, addend=at[2], also=at[0], result=at[2])

    def window(self, name: str, words: np.ndarray, **places):
        """Add the call of a convolution, `layer` over the tokens under each window."""
        row = self.rows[name]
        assert row.window is not None
        size, stride, padding = row.window
        side, channels = math.isqrt(row.positions), row.fan_in // size**2
        below = side * stride
        line = np.arange(side)[:, None] * stride + np.arange(size) - padding
        rows, columns = line[:, None, :, None], line[None, :, None, :]
        inside = (rows >= 0) & (rows < below) & (columns >= 0) & (columns < below)
        near = np.where(inside, rows * below + columns, -1).reshape(side * side, size * size)
        width = padded(channels) // 32
        # The spikes of a stage are stored beside those of its mixing, those of a node alone.
        pitch = 3 * width if stride > 1 else width
        lanes = np.minimum(np.arange(32 * width), channels - 1)
        positions = [lanes + p * channels for p in range(size * size)]
        source = self.source(words, below * below, pitch, near, width, positions, padded(row.out))
        self.layer(name, row.positions, source, self.c.formats[row.place].dtype, **places)

    def block(self, i: int, name: str, potential: Place):
        """Add the calls of a block."""
        c, place = self.c, self.c.formats[f"stage{i}"]
        side, channels = c.stage_side(i), c.stage_dim(i)
        tokens, width, hidden = side * side, padded(channels) // 32, c.expansion * channels
        near = np.arange(tokens)[:, None]
        for axis, layer in ((1, "height"), (2, "width")):
            self.mix(i, f"{name}.{layer}", axis)
        if c.encoding == "plain":
            self.identity(i, f"{name}.identity")

        lanes = np.minimum(np.arange(32 * width), channels - 1)
        fused = self.buffer("fused", place.dtype, self.slots * tokens * self.steps * 32 * width)
        sums = Place(fused, True, tokens * self.steps * 32 * width, self.steps * 32 * width, 32 * width, 0)
        token_words = self.buffer("token", np.uint32, self.slots * tokens * self.steps * width)
        source = self.source(
            self.words, tokens, self.pitch, near, 3 * width, [lanes + p * channels for p in range(3)], 32 * width
        )
        self.layer(
            f"{name}.fuse", tokens, source, place.dtype, neuron=self.neuron(place), addend=potential, result=sums,
            out=self.spikes(token_words, tokens, width, channels),
        )  # fmt: skip

        wide = padded(hidden) // 32
        hidden_words = self.buffer("hidden", np.uint32, self.slots * tokens * self.steps * wide)
        inner = c.formats[f"{name}.hidden"]
        constants = [
            self.net.arrays[f"{name}.expand.{key}"] if c.per_token else None for key in ("threshold", "reset", "below")
        ]
        source = self.source(token_words, tokens, width, near, width, [lanes], 32 * wide)
        self.layer(
            f"{name}.expand", tokens, source, inner.dtype, norm="expand", neuron=self.neuron(inner, *constants),
            out=self.spikes(hidden_words, tokens, wide, hidden),
        )  # fmt: skip

        word = max(place.word, c.formats[self.rows[f"{name}.project"].place].word)
        rows = np.minimum(np.arange(32 * wide), hidden - 1)
        source = self.source(hidden_words, tokens, wide, near, wide, [rows], 32 * width)
        self.layer(
            f"{name}.project", tokens, source, np.dtype(f"int{word}"), norm="project", neuron=self.neuron(place),
            addend=sums, out=self.spikes(self.words, tokens, self.pitch, channels),
        )  # fmt: skip

    def mix(self, i: int, name: str, axis: int):
        """Add the call of row or column mixing along an axis."""
        c, place = self.c, self.c.formats[name]
        side, width = c.stage_side(i), padded(c.stage_dim(i)) // 32
        token = self.steps * self.pitch
        other, along = (token, side * token) if axis == 1 else (side * token, token)
        mixture, blocks = self.constants.mixture(name, place.dtype, side), (side + 3) // 4
        geometry = Axis(side * side * token, other, along, self.pitch, axis * width, width, side)
        neuron, seen = self.neuron(place), valid(c.stage_dim(i))
        state = self.state(place.dtype, side, width * blocks * 128)

        words = self.words

        def arguments(t):
            return words, geometry, mixture, t * mixture.kernel_step, t * mixture.step, neuron, seen, state[t > 0]

        self.calls.append(Call("mix", side, arguments))

    def identity(self, i: int, name: str):
        """Add the call of the identity's neurons of "plain" encoding."""
        c, place = self.c, self.c.formats[name]
        tokens, channels = c.stage_side(i) ** 2, c.stage_dim(i)
        lanes = padded(channels)
        entries = [self.net.arrays[f"{name}.{key}"] for key in ("low", "high")]
        low, high = (flat(x, lanes, place.dtype) for x in entries)
        step = lanes if len(entries[0]) > 1 else 0
        neuron, out = self.neuron(place), self.spikes(self.words, tokens, self.pitch, channels)
        state = self.state(place.dtype, tokens, lanes)
        self.calls.append(
            Call("identity", tokens, lambda t: (lanes, low, high, t * step, step, neuron, out, state[t > 0]))
        )

    def head(self):
        """Add the call of the head, which sums a row of weights for each spike."""
        c = self.c
        last = c.stages - 1
        tokens, channels = c.stage_side(last) ** 2, c.stage_dim(last)
        synapses = self.constants.synapses("head", c.formats["head"].dtype)
        lanes = np.minimum(np.arange(padded(channels)), channels - 1)
        source = self.source(
            self.words, tokens, self.pitch, np.arange(tokens)[:, None], padded(channels) // 32, [lanes], synapses.row
        )
        self.logits = np.zeros((self.slots, self.steps, synapses.row), np.int32)
        result = Place(self.logits.ravel(), True, self.steps * synapses.row, 0, synapses.row, 0)
        self.room = max(self.room, tokens * padded(channels))

        def arguments(t):
            return source, tokens, synapses, t * synapses.kernel_step, t * synapses.step, result

        self.calls.append(Call("head", synapses.row, arguments, scratch=1, unit=128))
