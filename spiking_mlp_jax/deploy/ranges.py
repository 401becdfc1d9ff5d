"""Interval analysis of an integer network: how many bits each of its potentials can need, for any image.

A layer's sum lies between the sums of its negative and of its positive weights, output by output; from there the
smallest and the largest value go through every shift, sum and neuron. Nothing is sampled, so a word that holds the
bounds never overflows. Intermediate values count: a left shift, the half that rounding adds, the charged potential.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from spiking_mlp_jax.deploy.network import Description, IntegerNet, format_names
from spiking_mlp_jax.deploy.reference import charge, shift
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.topology import Walk


class Bounds(NamedTuple):
    """Smallest and largest value, int64 arrays of one shape: [S, out], or per token [S, N, out]."""

    low: np.ndarray
    high: np.ndarray

    def __add__(self, other) -> Bounds:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Bounds(self.low + other.low, self.high + other.high)


def check(net: IntegerNet) -> dict[str, tuple[int, int]]:
    """Prove that no value of a network leaves the word of its format.

    Returns:
        the smallest and largest value at each place (`Description.formats`), over all that happens there.

    Raises:
        InputError: some image could make a value leave its word.
    """
    found = extremes(net.description, net.arrays)
    for place, (low, high) in found.items():
        word = net.description.formats[place].word
        if bits(low, high) > word:
            raise InputError(
                f"potentials at {place} can reach {low} to {high}, which does not fit into {word} bits: quantize the "
                "network again"
            )
    return found


def bits(low: int, high: int) -> int:
    """Bits of the smallest signed word that holds both."""
    return max(int(high), -int(low) - 1, 0).bit_length() + 1


def extremes(c: Description, arrays: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    """The smallest and largest value at each place, see `check`; formats need only thresholds and resets.

    The stem's sum, which always has 32 bits, counts for "stage0" only once it is shifted, but must be proven too.

    Raises:
        InputError: the stem's sum could leave 32 bits.
    """
    analysis = _Analysis(c, arrays)
    analysis.run(None)
    return {place: analysis.found[place] for place in format_names(c)}


class _Analysis(Walk):
    """Potentials are `Bounds`; spikes need none, any of them may be there or not."""

    def __init__(self, c: Description, arrays: dict[str, np.ndarray]):
        super().__init__(c)
        self.arrays = arrays
        self.found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))

    def stem(self, layer, pixels):
        return self.map(layer, times=255)

    def head(self, layer, spikes):
        return self.map(layer, times=self.c.stage_side(self.c.stages - 1) ** 2)

    def identity(self, layer, spikes):
        values = [self.entry(layer.name, key) for key in ("low", "high")]
        return Bounds(np.minimum(*values), np.maximum(*values))

    def linear(self, layer, spikes):
        z = self.map(layer)
        if layer.norm != "tokens":
            return z
        z = Bounds(*(side[:, None] for side in z))
        offset = self.entry(layer.name, "offset")[..., None]
        if f"{layer.name}.constant" in self.arrays:
            constant = self.entry(layer.name, "constant")[:, None]
            return self.seen(layer.place, Bounds(*(np.where(constant, 0, side) + offset for side in z)))
        place, total = layer.stage, Bounds(np.zeros_like(z.low), np.zeros_like(z.high))
        exponents, signs = (self.entry(layer.name, key) for key in ("exponents", "signs"))
        for exponent, sign in zip(exponents.T[..., None], signs.T[..., None], strict=True):
            term = self.shifted(place, z, exponent)
            low = np.where(sign > 0, term.low, np.where(sign < 0, -term.high, 0))
            high = np.where(sign > 0, term.high, np.where(sign < 0, -term.low, 0))
            self.seen(place, Bounds(-term.high, -term.low))
            total = self.seen(place, total + Bounds(low, high))
        return self.seen(place, total + Bounds(offset, offset))

    def add(self, a, b, place):
        # [S, C], or per token [S, N, C].
        a, b = (
            Bounds(*(side[:, None] for side in x)) if x.low.ndim < max(a.low.ndim, b.low.ndim) else x for x in (a, b)
        )
        return self.seen(place, a + b)

    def split(self, potential):
        return [Bounds(*sides) for sides in zip(*(np.split(side, 3, -1) for side in potential), strict=True)]

    def concat(self, parts):
        if parts[-1] is None:
            return None
        return Bounds(*(np.concatenate(np.broadcast_arrays(*sides), -1) for sides in zip(*parts, strict=True)))

    def entry(self, layer: str, key: str) -> np.ndarray:
        return self.arrays[f"{layer}.{key}"].astype(np.int64)

    def map(self, layer, times=1):
        """Bounds [S, out] of a layer's result."""
        kernel, by, bias = (self.arrays[f"{layer.name}.{key}"] for key in ("kernel", "shift", "bias"))
        # Without a copy of the kernel in 64 bits.
        low = np.minimum(kernel, 0).sum(1, dtype=np.int64) * times
        high = np.maximum(kernel, 0).sum(1, dtype=np.int64) * times
        acc = Bounds(low, high)
        if layer.kind == "stem":
            right = np.maximum(-by.astype(np.int64), 0)
            top = int((acc.high + ((np.int64(1) << right) >> 1)).max()), int(acc.low.min())
            if bits(top[1], top[0]) > 32:
                raise InputError(f"the stem's sums can reach {top[1]} to {top[0]}, which does not fit into 32 bits")
            result = Bounds(shift(acc.low, by), shift(acc.high, by))
        else:
            result = self.shifted(layer.place, self.seen(layer.place, acc), by)
        self.seen(layer.place, result)
        bias = bias.astype(np.int64)
        return self.seen(layer.place, result + Bounds(bias, bias))

    def shifted(self, place, x, by):
        by = by.astype(np.int64)
        half = (np.int64(1) << np.maximum(-by, 0)) >> 1
        self.seen(place, Bounds(half, half))
        self.seen(place, Bounds(x.low + half, x.high + half))
        return self.seen(place, Bounds(shift(x.low, by), shift(x.high, by)))

    def fire(self, neurons, potential):
        """Follows the neurons over all steps, from the bounds of their input [S, ...]."""
        c, place, x, below = self.c, neurons.place, potential, None
        threshold, reset = (np.asarray(getattr(c.formats[place], key), np.int64) for key in ("threshold", "reset"))
        if neurons.per_token:
            threshold, reset, below = (
                self.entry(neurons.layer, key)[:, None] for key in ("threshold", "reset", "below")
            )
        level = threshold << c.leak
        self.seen(place, Bounds(level, level))
        v = Bounds(*(np.broadcast_to(reset, x.low.shape[1:]),) * 2)
        for t in range(c.time_steps):
            now = Bounds(*(side[min(t, len(side) - 1)] for side in x))
            self.seen(place, Bounds(v.low << c.leak, v.high << c.leak))
            self.seen(place, Bounds(now.low << c.leak, now.high << c.leak) if not c.decay_input else now)
            charged = self.seen(place, Bounds(charge(c, v.low, now.low, reset), charge(c, v.high, now.high, reset)))
            over = self.seen(place, Bounds(charged.low - level, charged.high - level)) if c.soft_reset else None
            # A neuron that has not fired lies on this side of its level.
            quiet = Bounds(charged.low, np.minimum(charged.high, level - 1))
            if below is not None:
                quiet = Bounds(
                    np.where(below, np.maximum(charged.low, level + 1), quiet.low),
                    np.where(below, charged.high, quiet.high),
                )
            fired = Bounds(over.low >> c.leak, over.high >> c.leak) if over is not None else Bounds(reset, reset)
            v = Bounds(
                np.minimum(np.minimum(quiet.low >> c.leak, quiet.high >> c.leak), fired.low),
                np.maximum(np.maximum(quiet.low >> c.leak, quiet.high >> c.leak), fired.high),
            )
            self.seen(place, v)

    def seen(self, place, x: Bounds) -> Bounds:
        low, high = self.found[place]
        self.found[place] = min(low, int(x.low.min())), max(high, int(x.high.max()))
        return x
