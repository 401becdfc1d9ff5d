"""An integer network's numbers as the kernels take them: padded, flat, in the dtype that they are computed in."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from spiking_mlp_jax.deploy.engine.types import Mixture, Neuron, Synapses, TokenNorm
from spiking_mlp_jax.deploy.network import Format, IntegerNet


class Constants:
    """What all programs of a network share; weights are packed once."""

    def __init__(self, net: IntegerNet):
        self.net, self.c = net, net.description
        self._packed: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def neuron(self, place: Format, threshold=None, reset=None, below=None) -> Neuron:
        """The neurons of a place, or with constants [tokens] of each token."""
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

    def synapses(self, name: str, dtype, multiple: int = 32) -> Synapses:
        """A map's weights, rows padded to a multiple of lanes."""
        key = name, np.dtype(dtype)
        with self._lock:
            if key not in self._packed:
                self._packed[key] = self._synapses(name, dtype, multiple)
            return self._packed[key]

    def mixture(self, name: str, dtype, side: int) -> Mixture:
        """Row or column mixing's weights, four outputs side by side."""
        key = name, np.dtype(dtype)
        with self._lock:
            if key not in self._packed:
                self._packed[key] = self._mixture(name, dtype, side)
            return self._packed[key]

    def _mixture(self, name: str, dtype, side: int) -> Mixture:
        kernel = self.net.arrays[f"{name}.kernel"]
        blocks = (side + 3) // 4
        packed = np.zeros((len(kernel), side, 4 * blocks), dtype)
        packed[..., :side] = kernel
        packed = packed.reshape(len(kernel), side, blocks, 4).transpose(0, 2, 1, 3)
        parts = [*shifts(self.net.arrays[f"{name}.shift"], dtype), self.net.arrays[f"{name}.bias"]]
        many = len(kernel) > 1
        left, half, right, bias = (flat(x, 4 * blocks, dtype) for x in parts)
        return Mixture(
            np.ascontiguousarray(packed).ravel(), left, half, right, bias,
            side * 4 * blocks if many else 0, 4 * side, 4 * blocks if many else 0,
        )  # fmt: skip

    def _synapses(self, name: str, dtype, multiple: int) -> Synapses:
        kernel = self.net.arrays[f"{name}.kernel"]
        out = kernel.shape[2]
        row = -(-out // multiple) * multiple
        left, half, right = shifts(self.net.arrays[f"{name}.shift"], dtype)
        constants = (left, half, right, self.net.arrays[f"{name}.bias"])
        left, half, right, bias = (flat(x, row, dtype) for x in constants)
        many = len(kernel) > 1
        return Synapses(
            flat(kernel, row, np.int8),
            row,
            left,
            half,
            right,
            bias,
            kernel.shape[1] * row if many else 0,
            row if many else 0,
        )

    def norm(self, name: str, dtype, tokens: int, kind: str) -> TokenNorm:
        """The constants of a token: of the "expand" or "project" map, or none."""
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
    """Whole words of 32."""
    return (channels + 31) // 32 * 32


def shifts(by: np.ndarray, dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """shift(x, by) as ((x << left) + half) >> right, in a word that holds the result."""
    # A shift by more than the word has bits is only in a proven network where there is nothing to shift.
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
    """uint32 words with a bit for every channel; two more words, which wide stores may read."""
    bits = np.zeros(padded(channels) + 96, np.uint8)
    bits[:channels] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
