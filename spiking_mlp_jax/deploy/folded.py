"""The folded network's arithmetic: maps of spikes and neurons, and nothing between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from spiking_mlp_jax.deploy.network import as_array
from spiking_mlp_jax.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    from spiking_mlp_jax.deploy.fold import FoldedNet, Observe

HEIGHT, WIDTH = 2, 3


def logits(net: FoldedNet, images: Float[Array, "B H W C"], observe: Observe | None = None) -> Float[Array, "T B K"]:
    """See `FoldedNet.__call__`."""
    c = net.config
    expected = (c.image_size, c.image_size, c.in_channels)
    if not isinstance(images, jax.Array):
        images = jnp.asarray(as_array(images, "images"))
    if images.ndim != 4 or images.shape[1:] != expected or not images.shape[0]:
        raise InputError(f"images must be [batch, {', '.join(map(str, expected))}], but they are {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images must be normalised floating pixels, but they are {images.dtype}")
    run = _Forward(net, observe)
    dtype = net.arrays["head"]["kernel"].dtype
    x = images[:, None].astype(jnp.promote_types(images.dtype, dtype))
    for i in range(c.stages):
        x = run.stage(i, x)
    with jax.named_scope("head"):
        counts = jnp.sum(x, (2, 3))
        scores = run.map("head", counts)
    return jnp.moveaxis(scores, 1, 0)


class _Forward:
    """One pass; its methods are the network's parts."""

    def __init__(self, net: FoldedNet, observe: Observe | None):
        self.net, self.config, self.observe = net, net.config, observe

    def stage(self, i, x):
        with jax.named_scope(f"stage{i}.encode"):
            h = self.encode(i, x)
            x = self.fire(f"stage{i}.encode", h)
        for j in range(self.config.depths[i]):
            x = self.block(f"stage{i}.block{j}", x, h)
        return x

    def encode(self, i, x):
        name, c = f"stage{i}.encode", self.config
        if i == 0:
            return self.map(name, windows(x, c.patch_size, c.patch_size, 0))
        if c.encoding == "plain":
            return self.map(name, windows(x, 2, 2, 0))
        n1, n2, n3 = jnp.split(self.map(f"{name}.cells", windows(x, 3, 2, 1)), 3, -1)
        n2 = n2 + self.map(f"{name}.edge1", windows(self.fire(f"{name}.node1", n1), 3, 1, 1))
        n3 = n3 + n1 + self.map(f"{name}.edge2", windows(self.fire(f"{name}.node2", n2), 3, 1, 1))
        return jnp.concatenate([n1, n2, n3], -1)

    def block(self, name, x, h):
        with jax.named_scope(f"{name}.token"):
            potential = h + self.token(name, x)
            x = self.fire(f"{name}.token", potential)
        with jax.named_scope(f"{name}.channel"):
            return self.fire(f"{name}.channel", potential + self.channel(name, x))

    def token(self, name, x):
        identity = x
        if self.config.encoding == "plain":
            values = self.net.arrays[f"{name}.identity"]
            low, high = (self.per_step(values[key], x.ndim) for key in ("low", "high"))
            identity = self.fire(f"{name}.identity", jnp.where(x > 0, high, low))
        parts = [identity]
        for axis, layer in ((HEIGHT, "height"), (WIDTH, "width")):
            with jax.named_scope(layer):
                along = jnp.moveaxis(x, axis, -1)
                mixed = self.map(f"{name}.{layer}", along)
                parts.append(self.fire(f"{name}.{layer}", jnp.moveaxis(mixed, -1, axis)))
        with jax.named_scope("fuse"):
            return self.map(f"{name}.fuse", jnp.concatenate(parts, -1))

    def channel(self, name, x):
        b, t, h, w, _ = x.shape
        x = x.reshape(b, t, h * w, -1)
        with jax.named_scope("hidden"):
            z = self.map(f"{name}.expand", x)
            entries = self.net.arrays[f"{name}.expand"]
            if "threshold" in entries:
                z = jnp.where(entries["constant"][:, None], 0, z) + self.per_token(entries["offset"])
                constants = [entries[key][:, None] for key in ("threshold", "reset", "below")]
                x = self.fire(f"{name}.hidden", z, *constants)
            else:
                x = self.fire(f"{name}.hidden", z)
        with jax.named_scope("project"):
            z = self.map(f"{name}.project", x)
        entries = self.net.arrays[f"{name}.project"]
        if "scale" in entries:
            with jax.named_scope("norm"):
                z = z * entries["scale"][:, None] + self.per_token(entries["offset"])
        return z.reshape(b, t, h, w, -1)

    def map(self, name, x):
        """x [B, T, ..., fan_in] by the layer's kernel, plus its bias; time axis T where the layer has T kernels."""
        if self.observe is not None:
            self.observe(name, x)
        kernel, bias = (self.net.arrays[name][key] for key in ("kernel", "bias"))
        if kernel.shape[0] == 1:
            return x @ kernel[0] + bias[0]
        x = jnp.broadcast_to(x, (x.shape[0], kernel.shape[0], *x.shape[2:]))
        return jnp.stack([x[:, t] @ kernel[t] + bias[t] for t in range(kernel.shape[0])], 1)

    def per_step(self, values: Float[Array, "S C"], ndim: int):
        return values.reshape(1, values.shape[0], *(1,) * (ndim - 3), values.shape[1])

    def per_token(self, values: Float[Array, "S N"]):
        return values[None, :, :, None]

    def fire(self, name, x, threshold=None, reset=None, below=None):
        """Spikes of the layer's neurons, 0 or 1 in x's dtype."""
        c = self.config
        tau = self.net.arrays[f"{name}.neurons"]["tau"] if c.neuron == "plif" else c.tau
        threshold = c.v_threshold if threshold is None else threshold
        reset = (c.v_reset or 0.0) if reset is None else reset
        x = jnp.broadcast_to(x, (x.shape[0], c.time_steps, *x.shape[2:]))
        with jax.named_scope("neuron"):
            v = jnp.broadcast_to(jnp.asarray(reset, x.dtype), x[:, 0].shape)
            spikes = []
            for t in range(c.time_steps):
                fired, v = self.step(v, x[:, t], tau, threshold, reset, below)
                spikes.append(fired)
            return jnp.stack(spikes, 1).astype(x.dtype)

    def step(self, v, x, tau, threshold, reset, below) -> tuple[Bool[Array, "*shape"], Float[Array, "*shape"]]:
        # The equations of `dynamics.step`, but that `below` turns a comparison round.
        c = self.config
        if c.neuron == "if":
            h = v + x
        elif c.decay_input:
            h = v + (x - (v - reset)) / tau
        else:
            h = v - (v - reset) / tau + x
        u = h - threshold
        fired = u >= 0 if below is None else jnp.where(below, u <= 0, u >= 0)
        return fired, jnp.where(fired, u if c.v_reset is None else reset, h)


def windows(x: Float[Array, "B T H W C"], size: int, stride: int, padding: int) -> Float[Array, "B T H2 W2 k*k*C"]:
    """The pixels under each window of a square convolution, (row, column, channel) flattened; by copying alone."""
    x = jnp.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding), (0, 0)))
    high, wide = ((n - size) // stride + 1 for n in x.shape[2:4])
    parts = [
        x[:, :, i : i + (high - 1) * stride + 1 : stride, j : j + (wide - 1) * stride + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(parts, -1)
