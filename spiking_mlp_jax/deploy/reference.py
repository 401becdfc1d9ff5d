"""The integer network in plain NumPy: slow, clear, and what every other engine is compared with, bit for bit.

It computes in int64 and refuses a value that does not fit its format's word, so that it also tests `ranges`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spiking_mlp_jax.deploy.network import Description, Format, IntegerNet, check_images


def run(net: IntegerNet, images: np.ndarray, steps: int | None = None) -> np.ndarray:
    """Logits of raw pixels.

    Args:
        net: the network.
        images: uint8 [B, H, W, C].
        steps: time steps to run, 1 to T; None for all.

    Returns:
        int32 [steps, B, K], in units of 2^-formats["head"].fraction.

    Raises:
        InputError: images of another shape or type than the network's.
        OverflowError: a value does not fit its word, which `ranges.check` excludes.
    """
    c = net.description
    images = check_images(c, images)
    return _Run(net, c.time_steps if steps is None else steps).logits(images)


def shift(x: np.ndarray, by: np.ndarray | int) -> np.ndarray:
    """x * 2^by, halves rounded up; int64.

    Examples:
        >>> shift(np.array([5, 6, 7, -6]), -2).tolist(), shift(np.array([3]), 2).tolist()
        ([1, 2, 2, -1], [12])
    """
    by = np.asarray(by, np.int64)
    left, right = np.maximum(by, 0), np.maximum(-by, 0)
    half = (np.int64(1) << right) >> 1
    return (((x << left) + half) >> right).astype(np.int64)


def charge(c: Description, v, x, reset):
    """The charged potential times 2^leak, for the potential v and the input x."""
    if c.neuron == "if":
        return v + x
    if c.decay_input:
        return (v << c.leak) - v + x + reset
    return (v << c.leak) - v + (x << c.leak) + reset


class _Run:
    def __init__(self, net: IntegerNet, steps: int):
        self.net, self.c, self.steps = net, net.description, steps

    def logits(self, images):
        x = images
        for i, depth in enumerate(self.c.depths):
            h = self.encode(i, x)
            x = self.fire(h, self.c.formats[f"stage{i}"])
            for j in range(depth):
                x = self.block(i, f"stage{i}.block{j}", x, h)
        # One row of the kernel for every spike, whichever token it is at.
        flat = x.reshape(*x.shape[:2], -1, x.shape[-1])
        acc = sum(self.accumulate("head", flat[:, :, n]) for n in range(flat.shape[2]))
        scores = self.scaled("head", acc, self.c.formats["head"])
        return scores.astype(np.int32)

    # Arrays are [T, B, ...], spikes int64 0 or 1.

    def encode(self, i, x):
        name, c, place = f"stage{i}.encode", self.c, self.c.formats[f"stage{i}"]
        if i == 0:
            # Bit planes of the bytes: each a binary input, the sum of its rows shifted by the bit's place.
            patches = windows(x[None].astype(np.int64), c.patch_size, c.patch_size, 0)
            acc = sum(shift(self.accumulate(name, patches >> bit & 1), bit) for bit in range(8))
            return self.scaled(name, acc, place)
        if c.encoding == "plain":
            return self.map(name, windows(x, 2, 2, 0), place)
        n1, n2, n3 = np.split(self.map(f"{name}.cells", windows(x, 3, 2, 1), place), 3, -1)
        n2 = fits(n2 + self.map(f"{name}.edge1", windows(self.fire(n1, place), 3, 1, 1), place), place.word)
        n3 = n3 + n1 + self.map(f"{name}.edge2", windows(self.fire(n2, place), 3, 1, 1), place)
        return fits(np.concatenate([n1, n2, n3], -1), place.word)

    def block(self, i, name, x, h):
        c, place = self.c, self.c.formats[f"stage{i}"]
        identity = x
        if c.encoding == "plain":
            low, high = (self.per_channel(f"{name}.identity.{key}", x.ndim) for key in ("low", "high"))
            identity = self.fire(np.where(x > 0, high, low), c.formats[f"{name}.identity"])
        parts = [identity]
        for axis, layer in ((2, "height"), (3, "width")):
            place_of_layer = c.formats[f"{name}.{layer}"]
            along = self.map(f"{name}.{layer}", np.moveaxis(x, axis, -1), place_of_layer)
            parts.append(self.fire(np.moveaxis(along, -1, axis), place_of_layer))
        potential = h + self.map(f"{name}.fuse", np.concatenate(parts, -1), place)
        x = self.fire(fits(potential, place.word), place)
        channel = self.channel(name, x.reshape(*x.shape[:2], -1, x.shape[-1]), place)
        return self.fire(fits(potential + channel.reshape(potential.shape), place.word), place)

    def channel(self, name, x, place):
        c, arrays = self.c, self.net.arrays
        hidden = c.formats[f"{name}.hidden"]
        z = self.map(f"{name}.expand", x, hidden)
        if not c.per_token:
            return self.map(f"{name}.project", self.fire(z, hidden), place)
        threshold, reset, below, constant = (
            arrays[f"{name}.expand.{key}"][:, None].astype(np.int64 if key in ("threshold", "reset") else bool)
            for key in ("threshold", "reset", "below", "constant")
        )
        z = fits(np.where(constant, 0, z) + self.per_token(f"{name}.expand.offset"), hidden.word)
        x = self.fire(z, hidden, threshold, reset, below)
        z = self.map(f"{name}.project", x, c.formats[f"{name}.project"])
        exponents, signs = (arrays[f"{name}.project.{key}"].astype(np.int64) for key in ("exponents", "signs"))
        total = 0
        for d in range(exponents.shape[1]):
            term, sign = shift(z, exponents[:, d, None]), signs[:, d, None]
            total = fits(total + np.where(sign > 0, term, np.where(sign < 0, -term, 0)), place.word)
        return fits(total + self.per_token(f"{name}.project.offset"), place.word)

    def map(self, name, spikes, place):
        return self.scaled(name, self.accumulate(name, spikes), place)

    def accumulate(self, name, spikes):
        """The sum of the kernel's rows where there is a spike, [T or 1, B, ..., out]."""
        # NumPy multiplies matrices of float64 far faster than of integers, and these sums are exact in it.
        kernel = self.net.arrays[f"{name}.kernel"].astype(np.float64)
        spikes = spikes.astype(np.float64)
        turns = range(1 if len(spikes) == len(kernel) == 1 else self.steps)
        sums = [spikes[min(t, len(spikes) - 1)] @ kernel[min(t, len(kernel) - 1)] for t in turns]
        return np.stack(sums).astype(np.int64)

    def scaled(self, name, acc, place: Format):
        # Eight bit planes need more than 16 bits: the stem's sum has 32 until it is shifted.
        acc = fits(acc, 32 if name == "stage0.encode" else place.word)
        by, bias = (self.per_channel(f"{name}.{key}", acc.ndim) for key in ("shift", "bias"))
        return fits(shift(acc, by) + bias, place.word)

    def per_channel(self, name, ndim):
        """An array [S, C] against [T, B, ..., C]."""
        values = self.net.arrays[name][: self.steps].astype(np.int64)
        return values.reshape(len(values), *(1,) * (ndim - 2), -1)

    def per_token(self, name):
        """An array [S, N] against [T, B, N, C]."""
        return self.net.arrays[name][: self.steps].astype(np.int64)[:, None, :, None]

    def fire(self, x, place: Format, threshold=None, reset=None, below=None):
        """Spikes for potentials [T or 1, ...]."""
        c = self.c
        threshold = np.int64(place.threshold if threshold is None else threshold)
        reset = np.int64(place.reset if reset is None else reset)
        v = np.broadcast_to(reset, x.shape[1:])
        spikes = []
        for t in range(self.steps):
            charged = fits(charge(c, v, x[min(t, len(x) - 1)], reset), place.word)
            level = fits(threshold << c.leak, place.word)
            fired = charged >= level if below is None else np.where(below, charged <= level, charged >= level)
            after = (charged - level) >> c.leak if c.soft_reset else reset
            v = fits(np.where(fired, after, charged >> c.leak), place.word)
            spikes.append(fired)
        return np.stack(spikes).astype(np.int64)


def windows(x: np.ndarray, size: int, stride: int, padding: int) -> np.ndarray:
    """[T, B, H, W, C] to [T, B, H2, W2, size * size * C]: what is under each window, (row, column, channel)."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding), (0, 0)))
    seen = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))[:, :, ::stride, ::stride]
    seen = seen.transpose(0, 1, 2, 3, 5, 6, 4)
    return seen.reshape(*seen.shape[:4], -1)


def fits(x: Any, word: int) -> np.ndarray:
    """x itself, if a signed word of this many bits holds it.

    Raises:
        OverflowError: it does not.
    """
    low, high = -(1 << (word - 1)), (1 << (word - 1)) - 1
    if np.min(x) < low or np.max(x) > high:
        raise OverflowError(f"a value from {np.min(x)} to {np.max(x)} does not fit into {word} bits")
    return x
