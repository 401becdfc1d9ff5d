"""What the kernels take: named tuples of flat arrays and of distances in them, counted in elements.

`Constants` packs an integer network's arrays into them: padded, flat, in the dtype in which they are computed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from spiking_mlp_jax.deploy.network import Format, IntegerNet
from spiking_mlp_jax.models.topology import layers


class Neuron(NamedTuple):
    """charged = (v << leak) - (v & keep) + (x << gain) + (reset & pull); fires at `level`; rests at charged >> leak."""

    usual: bool  # leak 1, keep -1, gain 0, hard reset to 0
    leak: int
    keep: int  # -1 or 0
    gain: int
    pull: int  # -1 or 0
    soft: bool
    pitch: int  # of level, reset, below: 1 where each token has its own, else 0
    level: np.ndarray  # int32
    reset: np.ndarray  # int32
    below: np.ndarray  # uint8, fires at or below the level


class Spikes(NamedTuple):
    """Where spikes are written: uint32 words at slot + token + step + at."""

    words: np.ndarray
    used: bool
    slot: int
    token: int
    step: int
    at: int
    valid: np.ndarray  # uint32, a bit for each channel, none for padding


class Source(NamedTuple):
    """The spikes that a layer reads: `width` words at each of a token's `positions`."""

    words: np.ndarray
    slot: int
    step: int
    near: np.ndarray  # int64 [tokens, positions], where a position's words are, or -1
    positions: int
    width: int
    lanes: int  # 32 * width
    table: np.ndarray  # uint32 [positions, lanes], where a spike's row of the kernel starts


class Synapses(NamedTuple):
    """A layer's kernel int8 [S, fan_in, row], and its shift and bias [S, row] in the computed dtype."""

    kernel: np.ndarray
    row: int
    left: np.ndarray
    half: np.ndarray
    right: np.ndarray
    bias: np.ndarray
    kernel_step: int
    step: int


class TokenNorm(NamedTuple):
    """A token's constants: `terms` signed shifts, an offset, and whether the offset is all that remains."""

    terms: int
    left: np.ndarray  # int32 [tokens, terms]
    half: np.ndarray
    right: np.ndarray
    sign: np.ndarray
    has_offset: bool
    offset: np.ndarray  # int32 [S, tokens]
    offset_step: int
    constant: np.ndarray  # uint8 [tokens]
    pitch: int


class Place(NamedTuple):
    """Potentials in memory, at slot + token + step + at."""

    values: np.ndarray
    used: bool
    slot: int
    token: int
    step: int
    at: int


class State(NamedTuple):
    """Where neurons store their potential between calls, if they do."""

    values: np.ndarray
    begin: bool  # at the reset potential
    keep: bool
    slot: int
    token: int


class Axis(NamedTuple):
    """Mixing along one axis of the grid, within the words that hold both its input and its output."""

    slot: int
    other: int  # words from one position of the other axis to the next
    along: int  # and of this axis
    step: int
    to: int  # words from a token's spikes to the outputs
    groups: int  # words of a token
    side: int


class Mixture(NamedTuple):
    """Kernel [S, blocks, side, 4] of 4 outputs each, shift and bias [S, 4 * blocks], in the computed dtype."""

    kernel: np.ndarray
    left: np.ndarray
    half: np.ndarray
    right: np.ndarray
    bias: np.ndarray
    kernel_step: int
    block: int  # 4 * side
    step: int


class Constants:
    """A network's constants, packed once for all programs."""

    def __init__(self, net: IntegerNet):
        self.net, self.c = net, net.description
        self.rows = {row.name: row for row in layers(net.description)}
        self.synapses, self.mixture = functools.cache(self._synapses), functools.cache(self._mixture)

    def neuron(self, place: Format, threshold=None, reset=None, below=None) -> Neuron:
        """A place's neurons, with constants [tokens] per token if given."""
        c = self.c
        pitch = 0 if threshold is None else 1
        level = np.atleast_1d(np.int64(place.threshold) if threshold is None else threshold.astype(np.int64)) << c.leak
        rest = np.atleast_1d(np.int32(place.reset) if reset is None else reset.astype(np.int32))
        turned = np.zeros(1, np.uint8) if below is None else below.astype(np.uint8)
        lif = c.neuron != "if"
        return Neuron(
            usual=bool(lif and c.leak == 1 and c.decay_input and not c.soft_reset and not rest.any()),
            leak=c.leak,
            keep=-1 if lif else 0,
            gain=c.leak if lif and not c.decay_input else 0,
            pull=-1 if lif else 0,
            soft=c.soft_reset,
            pitch=pitch,
            level=level.astype(np.int32),
            reset=rest.copy(),
            below=turned.copy(),
        )

    def _mixture(self, name: str, dtype, side: int) -> Mixture:
        """The weights of row or column mixing, four outputs side by side."""
        kernel = self.net.arrays[f"{name}.kernel"]
        blocks = (side + 3) // 4
        packed = np.zeros((len(kernel), side, 4 * blocks), dtype)
        packed[..., :side] = kernel
        packed = packed.reshape(len(kernel), side, blocks, 4).transpose(0, 2, 1, 3)
        parts = [*shifts(self.net.arrays[f"{name}.shift"], dtype), self.net.arrays[f"{name}.bias"]]
        many = len(kernel) > 1
        left, half, right, bias = (flat(x, 4 * blocks, dtype) for x in parts)
        kernel_step, step = (side * 4 * blocks, 4 * blocks) if many else (0, 0)
        return Mixture(np.ascontiguousarray(packed).ravel(), left, half, right, bias, kernel_step, 4 * side, step)

    def _synapses(self, name: str, dtype, multiple: int = 32) -> Synapses:
        """A layer's weights, rows padded to a multiple of lanes."""
        kernel = self.net.arrays[f"{name}.kernel"]
        out = kernel.shape[2]
        row = -(-out // multiple) * multiple
        left, half, right = shifts(self.net.arrays[f"{name}.shift"], dtype)
        constants = (left, half, right, self.net.arrays[f"{name}.bias"])
        left, half, right, bias = (flat(x, row, dtype) for x in constants)
        many = len(kernel) > 1
        steps = (kernel.shape[1] * row, row) if many else (0, 0)
        return Synapses(flat(kernel, row, np.int8), row, left, half, right, bias, *steps)

    def norm(self, name: str, dtype, tokens: int, kind: str) -> TokenNorm:
        """A token's constants for the "expand" or "project" layer; empty ones for others."""
        arrays = self.net.arrays if self.c.per_token and kind else {}
        exponents = arrays.get(f"{name}.exponents", np.zeros((1, 0), np.int8))
        offset = arrays.get(f"{name}.offset")
        left, half, right = (x.astype(np.int32).ravel() for x in shifts(exponents, dtype))
        signs = arrays.get(f"{name}.signs", exponents)
        some = lambda x: x if x.size else np.zeros(1, x.dtype)  # noqa: E731
        return TokenNorm(
            terms=exponents.shape[1],
            left=some(left),
            half=some(half),
            right=some(right),
            sign=some(signs.astype(np.int32).ravel()),
            has_offset=offset is not None,
            offset=np.zeros(1, np.int32) if offset is None else offset.astype(np.int32).ravel(),
            offset_step=tokens if offset is not None and len(offset) > 1 else 0,
            constant=arrays.get(f"{name}.constant", np.zeros(1, bool)).astype(np.uint8),
            pitch=1 if f"{name}.constant" in arrays else 0,
        )


def padded(channels: int) -> int:
    """Rounded up to whole words of 32."""
    return (channels + 31) // 32 * 32


def shifts(by: np.ndarray, dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """shift(x, by) as ((x << left) + half) >> right, in a word that holds the result."""
    # A proven network has shifts by more bits than a word's only where there is nothing to shift.
    most = 8 * np.dtype(dtype).itemsize - 1
    by = by.astype(np.int64)
    right = np.maximum(-by, 0)
    return np.minimum(np.maximum(by, 0), most), (np.int64(1) << right) >> 1, np.minimum(right, most)


def flat(x: np.ndarray, row: int, dtype) -> np.ndarray:
    """An array with its last axis padded with zeros to `row`, in one dimension."""
    wide = np.zeros((*x.shape[:-1], row), dtype)
    wide[..., : x.shape[-1]] = x
    return wide.ravel()


def valid(channels: int) -> np.ndarray:
    """uint32 words with a bit for every channel, and two more words, which wide stores may read."""
    bits = np.zeros(padded(channels) + 96, np.uint8)
    bits[:channels] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
