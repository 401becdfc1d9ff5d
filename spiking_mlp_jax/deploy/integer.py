"""The integer network as a JAX program: the same integers as `reference.py`, and what `audit` reads.

Every operation is an addition, a comparison, a selection or a shift; each product has a spike or a bit for an operand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from spiking_mlp_jax.deploy.folded import windows
from spiking_mlp_jax.deploy.network import Description, Format, IntegerNet, Observe, check_pixels

if TYPE_CHECKING:
    from jaxtyping import Array, Int, UInt8


def logits(net: IntegerNet, images: UInt8[Array, "B H W C"], observe: Observe | None = None) -> Int[Array, "T B K"]:
    """See `IntegerNet.__call__`."""
    images = jnp.asarray(images)
    check_pixels(net.description, images.shape, images.dtype)
    return _Forward(net, observe).logits(images)


def shift(x: Int[Array, "..."], by) -> Int[Array, "..."]:
    """x * 2^by by shifts alone, halves rounded up; `by` are constants."""
    by = jnp.asarray(by, jnp.int32)
    left, right = jnp.maximum(by, 0), jnp.maximum(-by, 0)
    half = jnp.where(right > 0, jnp.left_shift(jnp.ones_like(right), jnp.maximum(right - 1, 0)), 0)
    return jnp.right_shift(jnp.left_shift(x, left) + half, right)


class _Forward:
    def __init__(self, net: IntegerNet, observe: Observe | None):
        self.net, self.c, self.observe = net, net.description, observe

    def logits(self, images):
        c = self.c
        x = images[:, None]
        for i, depth in enumerate(c.depths):
            with jax.named_scope(f"stage{i}.encode"):
                h = self.encode(i, x)
                x = self.fire(h, c.formats[f"stage{i}"])
            for j in range(depth):
                x = self.block(i, f"stage{i}.block{j}", x, h)
        with jax.named_scope("head"):
            acc = jnp.sum(self.accumulate("head", x), (2, 3))
            return jnp.moveaxis(self.scaled("head", acc), 1, 0)

    # Arrays are [B, T, ...]; spikes int8 0 or 1, potentials int32.

    def encode(self, i, x):
        name, c, place = f"stage{i}.encode", self.c, self.c.formats[f"stage{i}"]
        if i == 0:
            patches = windows(x, c.patch_size, c.patch_size, 0)
            planes = [jnp.bitwise_and(jnp.right_shift(patches, jnp.uint8(bit)), jnp.uint8(1)) for bit in range(8)]
            acc = sum(
                jnp.left_shift(self.accumulate(name, plane.astype(jnp.int8)), bit) for bit, plane in enumerate(planes)
            )
            return self.scaled(name, acc)
        if c.encoding == "plain":
            return self.map(name, windows(x, 2, 2, 0))
        n1, n2, n3 = jnp.split(self.map(f"{name}.cells", windows(x, 3, 2, 1)), 3, -1)
        n2 = n2 + self.map(f"{name}.edge1", windows(self.fire(n1, place), 3, 1, 1))
        n3 = n3 + n1 + self.map(f"{name}.edge2", windows(self.fire(n2, place), 3, 1, 1))
        return jnp.concatenate([n1, n2, n3], -1)

    def block(self, i, name, x, h):
        c, place = self.c, self.c.formats[f"stage{i}"]
        parts = [x]
        if c.encoding == "plain":
            with jax.named_scope(f"{name}.identity"):
                low, high = (self.per_step(f"{name}.identity.{key}", x.ndim) for key in ("low", "high"))
                parts = [self.fire(jnp.where(x > 0, high, low), c.formats[f"{name}.identity"])]
        for axis, layer in ((2, "height"), (3, "width")):
            with jax.named_scope(f"{name}.{layer}"):
                mixed = jnp.moveaxis(self.map(f"{name}.{layer}", jnp.moveaxis(x, axis, -1)), -1, axis)
                parts.append(self.fire(mixed, c.formats[f"{name}.{layer}"]))
        with jax.named_scope(f"{name}.token"):
            potential = h + self.map(f"{name}.fuse", jnp.concatenate(parts, -1))
            x = self.fire(potential, place)
        channel = self.channel(name, x.reshape(*x.shape[:2], -1, x.shape[-1]))
        with jax.named_scope(f"{name}.channel"):
            return self.fire(potential + channel.reshape(potential.shape), place)

    def channel(self, name, x):
        c, arrays = self.c, self.net.arrays
        hidden = c.formats[f"{name}.hidden"]
        with jax.named_scope(f"{name}.hidden"):
            z = self.map(f"{name}.expand", x)
            if c.per_token:
                constants = {key: jnp.asarray(arrays[f"{name}.expand.{key}"])[:, None] for key in _TOKEN_CONSTANTS}
                z = jnp.where(constants.pop("constant"), 0, z) + self.per_token(f"{name}.expand.offset")
                x = self.fire(z, hidden, **constants)
            else:
                x = self.fire(z, hidden)
        with jax.named_scope(f"{name}.project"):
            z = self.map(f"{name}.project", x)
            if not c.per_token:
                return z
            total = jnp.zeros_like(z)
            exponents, signs = (arrays[f"{name}.project.{key}"] for key in ("exponents", "signs"))
            for d in range(exponents.shape[1]):
                term, sign = shift(z, exponents[:, d, None]), jnp.asarray(signs[:, d, None])
                total = total + jnp.where(sign > 0, term, jnp.where(sign < 0, -term, 0))
            return total + self.per_token(f"{name}.project.offset")

    def map(self, name, spikes):
        return self.scaled(name, self.accumulate(name, spikes))

    def accumulate(self, name, spikes):
        if self.observe is not None:
            self.observe(name, spikes)
        kernel = jnp.asarray(self.net.arrays[f"{name}.kernel"])
        if len(kernel) == 1:
            return _accumulate(spikes, kernel[0])
        x = jnp.broadcast_to(spikes, (spikes.shape[0], len(kernel), *spikes.shape[2:]))
        return jnp.stack([_accumulate(x[:, t], kernel[t]) for t in range(len(kernel))], 1)

    def scaled(self, name, acc):
        by = self.per_step(f"{name}.shift", acc.ndim)
        return shift(acc, by) + self.per_step(f"{name}.bias", acc.ndim)

    def per_step(self, name, ndim):
        """An array [S, C] against [B, T, ..., C]."""
        values = self.net.arrays[name]
        return jnp.asarray(values, jnp.int32).reshape(1, len(values), *(1,) * (ndim - 3), -1)

    def per_token(self, name):
        """An array [S, N] against [B, T, N, C]."""
        return jnp.asarray(self.net.arrays[name], jnp.int32)[None, :, :, None]

    def fire(self, x, place: Format, threshold=None, reset=None, below=None):
        c = self.c
        level = jnp.left_shift(jnp.int32(place.threshold) if threshold is None else threshold, c.leak)
        reset = jnp.int32(place.reset) if reset is None else reset
        x = jnp.broadcast_to(x, (x.shape[0], c.time_steps, *x.shape[2:]))
        with jax.named_scope("neuron"):
            v = jnp.broadcast_to(reset, x[:, 0].shape)
            spikes = []
            for t in range(c.time_steps):
                charged = _charge(c, v, x[:, t], reset)
                fired = charged >= level if below is None else jnp.where(below, charged <= level, charged >= level)
                after = jnp.right_shift(charged - level, c.leak) if c.soft_reset else reset
                v = jnp.where(fired, after, jnp.right_shift(charged, c.leak))
                spikes.append(fired)
            return jnp.stack(spikes, 1).astype(jnp.int8)


_TOKEN_CONSTANTS = ("threshold", "reset", "below", "constant")


def _accumulate(spikes, kernel):
    return jax.lax.dot_general(spikes, kernel, (((spikes.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def _charge(c: Description, v, x, reset):
    if c.neuron == "if":
        return v + x
    decayed = jnp.left_shift(v, c.leak) - v + reset
    return decayed + (x if c.decay_input else jnp.left_shift(x, c.leak))
