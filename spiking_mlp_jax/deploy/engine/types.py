"""What the compiled kernels take: named tuples of flat arrays and of distances in them, counted in elements."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


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
    valid: np.ndarray  # uint32, a bit for each channel that exists


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
    """A map's kernel int8 [S, fan_in, row] and its shift and bias [S, row] in the dtype that it is computed in."""

    kernel: np.ndarray
    row: int
    left: np.ndarray
    half: np.ndarray
    right: np.ndarray
    bias: np.ndarray
    kernel_step: int
    step: int


class TokenNorm(NamedTuple):
    """A token's own constants: `terms` signed shifts, an offset, and whether nothing but that is left."""

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
    """Where neurons keep their potential between calls, if they do."""

    values: np.ndarray
    begin: bool  # from the reset potential
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
