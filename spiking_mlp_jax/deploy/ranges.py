"""Interval analysis of an integer network: how many bits each of its potentials can need, whatever the image.

A map's sum lies between that of its negative and that of its positive weights, output by output; every shift, sum and
neuron is followed from there with its smallest and largest value. Nothing is sampled, so a word that holds the bounds
never overflows. Intermediate values count: what is shifted left, the half that rounding adds, the charged potential.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from spiking_mlp_jax.deploy.network import Description, IntegerNet, format_names
from spiking_mlp_jax.deploy.reference import charge, shift
from spiking_mlp_jax.errors import InputError


class Bounds(NamedTuple):
    """Smallest and largest value, int64 arrays of one shape: [S, out], or per token [S, N, out]."""

    low: np.ndarray
    high: np.ndarray

    def __add__(self, other) -> Bounds:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Bounds(self.low + other.low, self.high + other.high)


def check(net: IntegerNet) -> dict[str, tuple[int, int]]:
    """Proves that no value of a network leaves the word of its format.

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
                f"potentials at {place} can reach {low} to {high}, which {word} bits do not hold: quantise the "
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
    return _Analysis(c, arrays).run()


class _Analysis:
    def __init__(self, c: Description, arrays: dict[str, np.ndarray]):
        self.c, self.arrays = c, arrays
        self.found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))

    def run(self):
        for i, depth in enumerate(self.c.depths):
            h = self.encode(i)
            self.fire(f"stage{i}", h)
            for j in range(depth):
                self.block(f"stage{i}", f"stage{i}.block{j}", h)
        last = self.c.stages - 1
        self.map("head", "head", times=self.c.stage_side(last) ** 2)
        return {place: self.found[place] for place in format_names(self.c)}

    def encode(self, i):
        name, place = f"stage{i}.encode", f"stage{i}"
        if i == 0:
            return self.map(name, place, times=255)
        if self.c.encoding == "plain":
            return self.map(name, place)
        n1, n2, n3 = (
            Bounds(*pair) for pair in zip(*(np.split(x, 3, -1) for x in self.map(f"{name}.cells", place)), strict=True)
        )
        self.fire(place, n1)
        n2 = self.seen(place, n2 + self.map(f"{name}.edge1", place))
        self.fire(place, n2)
        n3 = self.seen(place, n3 + n1)
        n3 = self.seen(place, n3 + self.map(f"{name}.edge2", place))
        return Bounds(*(np.concatenate(np.broadcast_arrays(*parts), -1) for parts in zip(n1, n2, n3, strict=True)))

    def block(self, place, name, h):
        if self.c.encoding == "plain":
            values = [self.arrays[f"{name}.identity.{key}"].astype(np.int64) for key in ("low", "high")]
            self.fire(f"{name}.identity", Bounds(np.minimum(*values), np.maximum(*values)))
        for layer in ("height", "width"):
            self.fire(f"{name}.{layer}", self.map(f"{name}.{layer}", f"{name}.{layer}"))
        potential = self.seen(place, h + self.map(f"{name}.fuse", place))
        self.fire(place, potential)
        self.hidden(name)
        self.fire(place, self.seen(place, _tokens(potential, self.c.per_token) + self.project(place, name)))

    def hidden(self, name):
        place, a = f"{name}.hidden", self.arrays
        z = self.map(f"{name}.expand", place)
        if not self.c.per_token:
            return self.fire(place, z)
        constant, below = (a[f"{name}.expand.{key}"][:, None] for key in ("constant", "below"))
        threshold, reset = (a[f"{name}.expand.{key}"].astype(np.int64)[:, None] for key in ("threshold", "reset"))
        offset = a[f"{name}.expand.offset"].astype(np.int64)[..., None]
        z = Bounds(*(np.where(constant, 0, x[:, None]) + offset for x in z))
        self.fire(place, self.seen(place, z), threshold, reset, below)

    def project(self, place, name):
        if not self.c.per_token:
            return self.map(f"{name}.project", place)
        z = _tokens(self.map(f"{name}.project", f"{name}.project"), True)
        exponents, signs = (self.arrays[f"{name}.project.{key}"].astype(np.int64) for key in ("exponents", "signs"))
        total = Bounds(np.zeros_like(z.low), np.zeros_like(z.high))
        for d in range(exponents.shape[1]):
            term = self.shifted(place, z, exponents[:, d, None])
            sign = signs[:, d, None]
            low = np.where(sign > 0, term.low, np.where(sign < 0, -term.high, 0))
            high = np.where(sign > 0, term.high, np.where(sign < 0, -term.low, 0))
            self.seen(place, Bounds(-term.high, -term.low))
            total = self.seen(place, total + Bounds(low, high))
        offset = self.arrays[f"{name}.project.offset"].astype(np.int64)[..., None]
        return self.seen(place, total + Bounds(offset, offset))

    def map(self, name, place, times=1):
        """Bounds [S, out] of a layer's result."""
        kernel, by, bias = (self.arrays[f"{name}.{key}"] for key in ("kernel", "shift", "bias"))
        # Without a copy of the kernel in 64 bits.
        low = np.minimum(kernel, 0).sum(1, dtype=np.int64) * times
        high = np.maximum(kernel, 0).sum(1, dtype=np.int64) * times
        acc = Bounds(low, high)
        if name == "stage0.encode":
            right = np.maximum(-by.astype(np.int64), 0)
            top = int((acc.high + ((np.int64(1) << right) >> 1)).max()), int(acc.low.min())
            if bits(top[1], top[0]) > 32:
                raise InputError(f"the stem's sums can reach {top[1]} to {top[0]}, which 32 bits do not hold")
            result = Bounds(shift(acc.low, by), shift(acc.high, by))
        else:
            result = self.shifted(place, self.seen(place, acc), by)
        self.seen(place, result)
        bias = bias.astype(np.int64)
        return self.seen(place, result + Bounds(bias, bias))

    def shifted(self, place, x, by):
        by = by.astype(np.int64)
        half = (np.int64(1) << np.maximum(-by, 0)) >> 1
        self.seen(place, Bounds(half, half))
        self.seen(place, Bounds(x.low + half, x.high + half))
        return self.seen(place, Bounds(shift(x.low, by), shift(x.high, by)))

    def fire(self, place, x, threshold=None, reset=None, below=None):
        """Follows a layer's neurons over all steps, from the bounds of their input [S, ...]."""
        c, form = self.c, self.c.formats[place]
        level = np.asarray(form.threshold if threshold is None else threshold, np.int64) << c.leak
        reset = np.asarray(form.reset if reset is None else reset, np.int64)
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


def _tokens(x: Bounds, per_token: bool) -> Bounds:
    """[S, C] as [S, 1, C] where other bounds are per token."""
    return Bounds(x.low[:, None], x.high[:, None]) if per_token else x
