"""The folded and the integer network as JAX programs: linear layers and neurons, and nothing between them.

The integer program computes the integers of `reference.py`, and is what `audit` reads: every operation is an addition,
a comparison, a selection or a shift, and each product has a spike or a bit for an operand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from spiking_mlp_jax.models.topology import Walk, short

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

Observe = Callable[[str, Any], None]


class _Forward(Walk):
    """One pass. Spikes and potentials are [B, T, H, W, C]; a potential's time axis has length 1 if all steps are equal.

    Args:
        c: a ModelConfig or a Description.
        observe: called with the name of each layer and what it multiplies by its weights, [B, T, ..., fan_in].
    """

    def __init__(self, c: Any, observe: Observe | None):
        super().__init__(c)
        self.observe = observe

    def logits(self, images):
        """[T, B, K] for images [B, H, W, C]."""
        return jnp.moveaxis(self.run(images[:, None]), 1, 0)

    def scope(self, name):
        return jax.named_scope(name)

    def linear(self, layer, spikes):
        x = spikes if layer.window is None else windows(spikes, *layer.window)
        return jnp.moveaxis(self._map(layer, jnp.moveaxis(x, layer.axis, -1)), -1, layer.axis)

    def _map(self, layer, x):
        """The layer's potential for its inputs [B, T, ..., fan_in]."""
        raise NotImplementedError

    def _products(self, layer, x, kernel, multiply):
        """x times kernel [S, fan_in, out]: at every step its own where S = T."""
        if self.observe is not None:
            self.observe(layer.name, x)
        if len(kernel) == 1:
            return multiply(x, kernel[0])
        x = jnp.broadcast_to(x, (x.shape[0], len(kernel), *x.shape[2:]))
        return jnp.stack([multiply(x[:, t], kernel[t]) for t in range(len(kernel))], 1)

    def _steps(self, x, reset, step):
        """Spikes at all time steps, from `step(potential, input) -> fired, potential`."""
        x = jnp.broadcast_to(x, (x.shape[0], self.c.time_steps, *x.shape[2:]))
        with jax.named_scope("neuron"):
            v = jnp.broadcast_to(reset, x[:, 0].shape)
            spikes = []
            for t in range(self.c.time_steps):
                fired, v = step(v, x[:, t])
                spikes.append(fired)
            return jnp.stack(spikes, 1)

    def add(self, a, b, place):
        return a + b

    def split(self, potential):
        return jnp.split(potential, 3, -1)

    def concat(self, parts):
        return jnp.concatenate(parts, -1)


class Folded(_Forward):
    """A pass of a `FoldedNet`.

    Args:
        arrays: its arrays.
        c: its ModelConfig.
        observe: see `FoldedNet.__call__`.
    """

    def __init__(self, arrays: dict[str, dict[str, Any]], c: Any, observe: Observe | None = None):
        super().__init__(c, observe)
        self.arrays = arrays

    def _map(self, layer, x):
        entries = self.arrays[layer.name]
        z = self._products(layer, x, entries["kernel"], jnp.matmul) + _per_step(entries["bias"], x.ndim)
        if layer.norm != "tokens":
            return z
        if "scale" in entries:
            with jax.named_scope("norm"):
                return z * per_token(entries["scale"][None], x) + per_token(entries["offset"], x)
        return jnp.where(per_token(entries["constant"][None], x), 0, z) + per_token(entries["offset"], x)

    def identity(self, layer, spikes):
        low, high = (_per_step(self.arrays[layer.name][key], spikes.ndim) for key in ("low", "high"))
        return jnp.where(spikes > 0, high, low)

    def head(self, layer, spikes):
        return self._map(layer, jnp.sum(spikes, (2, 3)))

    def fire(self, neurons, potential):
        c, below = self.c, None
        tau = self.arrays[f"{neurons.short}.neurons"]["tau"] if c.neuron == "plif" else c.tau
        threshold, reset = c.v_threshold, jnp.asarray(c.v_reset or 0.0, potential.dtype)
        if neurons.per_token:
            keys = ("threshold", "reset", "below")
            threshold, reset, below = (per_token(self.arrays[neurons.layer][key], potential) for key in keys)
            reset = reset.astype(potential.dtype)

        def step(v, x) -> tuple[Bool[Array, "*shape"], Float[Array, "*shape"]]:
            # The equations of `dynamics.step`, except that `below` reverses a comparison.
            if c.neuron == "if":
                h = v + x
            elif c.decay_input:
                h = v + (x - (v - reset)) / tau
            else:
                h = v - (v - reset) / tau + x
            u = h - threshold
            fired = u >= 0 if below is None else jnp.where(below, u <= 0, u >= 0)
            return fired, jnp.where(fired, u if c.v_reset is None else reset, h)

        return self._steps(potential, reset, step).astype(potential.dtype)


class Integer(_Forward):
    """A pass of an `IntegerNet`: spikes are int8, potentials int32.

    Args:
        arrays: its arrays.
        c: its Description.
        observe: see `IntegerNet.__call__`.
    """

    def __init__(self, arrays: dict[str, Any], c: Any, observe: Observe | None = None):
        super().__init__(c, observe)
        self.arrays = arrays

    def scope(self, name):
        return jax.named_scope(short(name))

    def stem(self, layer, pixels):
        patches = windows(pixels, self.c.patch_size, self.c.patch_size, 0)
        planes = [jnp.bitwise_and(jnp.right_shift(patches, jnp.uint8(bit)), jnp.uint8(1)) for bit in range(8)]
        sums = [self._accumulate(layer, plane.astype(jnp.int8)) for plane in planes]
        return self._scaled(layer, sum(jnp.left_shift(acc, bit) for bit, acc in enumerate(sums)))

    def _map(self, layer, x):
        z = self._scaled(layer, self._accumulate(layer, x))
        if layer.norm != "tokens":
            return z
        entry = lambda key: self.arrays[f"{layer.name}.{key}"]  # noqa: E731
        if f"{layer.name}.constant" in self.arrays:
            z = jnp.where(per_token(entry("constant")[None], x), 0, z)
        else:
            total = jnp.zeros_like(z)
            for exponent, sign in zip(entry("exponents").T, entry("signs").T, strict=True):
                term, sign = shift(z, per_token(exponent[None], x)), per_token(sign[None], x)
                total = total + jnp.where(sign > 0, term, jnp.where(sign < 0, -term, 0))
            z = total
        return z + per_token(jnp.asarray(entry("offset"), jnp.int32), x)

    def identity(self, layer, spikes):
        low, high = (self._per_step(layer, key, spikes.ndim) for key in ("low", "high"))
        return jnp.where(spikes > 0, high, low)

    def head(self, layer, spikes):
        return self._scaled(layer, jnp.sum(self._accumulate(layer, spikes), (2, 3)))

    def _accumulate(self, layer, spikes):
        return self._products(layer, spikes, jnp.asarray(self.arrays[f"{layer.name}.kernel"]), _sum_of_rows)

    def _scaled(self, layer, acc):
        return shift(acc, self._per_step(layer, "shift", acc.ndim)) + self._per_step(layer, "bias", acc.ndim)

    def _per_step(self, layer, key, ndim):
        return _per_step(jnp.asarray(self.arrays[f"{layer.name}.{key}"], jnp.int32), ndim)

    def fire(self, neurons, potential):
        c, form, below = self.c, self.c.formats[neurons.place], None
        threshold, reset = jnp.int32(form.threshold), jnp.int32(form.reset)
        if neurons.per_token:
            keys = ("threshold", "reset", "below")
            threshold, reset, below = (
                per_token(jnp.asarray(self.arrays[f"{neurons.layer}.{key}"]), potential) for key in keys
            )
        level = jnp.left_shift(threshold, c.leak)

        def step(v, x):
            if c.neuron == "if":
                charged = v + x
            else:
                charged = jnp.left_shift(v, c.leak) - v + reset + (x if c.decay_input else jnp.left_shift(x, c.leak))
            fired = charged >= level if below is None else jnp.where(below, charged <= level, charged >= level)
            after = jnp.right_shift(charged - level, c.leak) if c.soft_reset else reset
            return fired, jnp.where(fired, after, jnp.right_shift(charged, c.leak))

        return self._steps(potential, reset, step).astype(jnp.int8)


def shift(x: Int[Array, "..."], by) -> Int[Array, "..."]:
    """x * 2^by by shifts alone, halves rounded up; `by` are constants."""
    by = jnp.asarray(by, jnp.int32)
    left, right = jnp.maximum(by, 0), jnp.maximum(-by, 0)
    half = jnp.where(right > 0, jnp.left_shift(jnp.ones_like(right), jnp.maximum(right - 1, 0)), 0)
    return jnp.right_shift(jnp.left_shift(x, left) + half, right)


def _per_step(values: Float[Array, "S C"], ndim: int):
    """Constants shaped for [B, T, ..., C], with ndim axes."""
    return values.reshape(1, values.shape[0], *(1,) * (ndim - 3), values.shape[1])


def per_token(values: Float[Array, "*S N"], x: Float[Array, "B T H W C"]):
    """Constants shaped for x, [1, S, H, W, 1], or without S for one of its steps, [1, H, W, 1]."""
    return values.reshape(1, *values.shape[:-1], *x.shape[2:4], 1)


def windows(x: Float[Array, "B T H W C"], size: int, stride: int, padding: int) -> Float[Array, "B T H2 W2 k*k*C"]:
    """What is under each window of a square convolution, (row, column, channel) flattened; by copying alone."""
    x = jnp.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding), (0, 0)))
    high, wide = ((n - size) // stride + 1 for n in x.shape[2:4])
    parts = [
        x[:, :, i : i + (high - 1) * stride + 1 : stride, j : j + (wide - 1) * stride + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(parts, -1)


def _sum_of_rows(spikes, kernel):
    return jax.lax.dot_general(spikes, kernel, (((spikes.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
