"""Token mixing along rows and columns, channel mixing, and the block they form."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from spiking_mlp_jax.config import ModelConfig
from spiking_mlp_jax.layers import Neuron, Record, batch_norm, linear
from spiking_mlp_jax.norm import LayerNorm, uniform_fan_in

HEIGHT, WIDTH, CHANNELS = 2, 3, 4


class AxisMixing(nnx.Module):
    """Mixes the tokens along one axis: LIF(norm(W x + b)), W [out, in] shared by all other positions.

    BatchNorm's features are the positions along the axis; LayerNorm's are the other axis and the channels.
    """

    def __init__(self, config: ModelConfig, stage: int, axis: int, *, rngs: nnx.Rngs):
        side = config.stage_side(stage)
        self.axis = axis
        self.kernel = nnx.Param(uniform_fan_in(rngs.params(), (side, side), side))
        self.bias = nnx.Param(uniform_fan_in(rngs.params(), (side,), side))
        if config.norm == "layer":
            other = WIDTH if axis == HEIGHT else HEIGHT
            self.norm = LayerNorm((side, config.stage_dim(stage)), (other, CHANNELS))
        else:
            self.norm = batch_norm(config, side, axis)
        self.neuron = Neuron(config)

    def __call__(self, x: Float[Array, "B T H W C"], record: Record) -> Float[Array, "B T H W C"]:
        """Spikes for spikes."""
        kernel, bias = self.kernel[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        if self.axis == HEIGHT:
            potential = jnp.einsum("oh,bthwc->btowc", kernel, x) + bias[:, None, None]
        else:
            potential = jnp.einsum("ow,bthwc->bthoc", kernel, x) + bias[:, None]
        potential = self.norm(potential)
        record("potential", potential)
        spikes = self.neuron(potential)
        record("spikes", spikes)
        return spikes


class TokenBlock(nnx.Module):
    """Row and column mixing beside the identity, fused by a 1 x 1 convolution and norm; returns a potential.

    The identity is x itself with "spe" and LIF(norm(x)) with "plain" encoding.
    """

    def __init__(self, config: ModelConfig, stage: int, *, rngs: nnx.Rngs):
        channels = config.stage_dim(stage)
        self.height = AxisMixing(config, stage, HEIGHT, rngs=rngs)
        self.width = AxisMixing(config, stage, WIDTH, rngs=rngs)
        self.identity_norm = batch_norm(config, channels) if config.encoding == "plain" else None
        self.identity_neuron = Neuron(config) if config.encoding == "plain" else None
        self.fuse = linear(config, 3 * channels, channels, use_bias=False, rngs=rngs)
        self.norm = batch_norm(config, channels)

    def __call__(self, x: Float[Array, "B T H W C"], record: Record) -> Float[Array, "B T H W C"]:
        """Potential for spikes."""
        identity = x
        if self.identity_norm is not None and self.identity_neuron is not None:
            potential = self.identity_norm(x)
            record("token.identity.potential", potential)
            identity = self.identity_neuron(potential)
            record("token.identity.spikes", identity)
        a = self.height(x, lambda name, value: record(f"token.height.{name}", value))
        b = self.width(x, lambda name, value: record(f"token.width.{name}", value))
        return self.norm(self.fuse(jnp.concatenate([identity, a, b], -1)))


class ChannelBlock(nnx.Module):
    """Two-layer MLP over the channels of each token: linear, norm, LIF, linear, norm; returns a potential.

    The norms' features are the H * W tokens, as in the official code, or the channels (`norm_features`).
    """

    def __init__(self, config: ModelConfig, stage: int, *, rngs: nnx.Rngs):
        channels, tokens = config.stage_dim(stage), config.stage_side(stage) ** 2
        hidden = config.expansion * channels

        def norm(features):
            if config.norm == "layer":
                return LayerNorm((features,), (-1,))
            if config.norm_features == "token":
                return batch_norm(config, tokens, -2)
            return batch_norm(config, features)

        self.expand = linear(config, channels, hidden, rngs=rngs)
        self.hidden_norm = norm(hidden)
        self.neuron = Neuron(config)
        self.project = linear(config, hidden, channels, rngs=rngs)
        self.norm = norm(channels)

    def __call__(self, x: Float[Array, "B T H W C"], record: Record) -> Float[Array, "B T H W C"]:
        """Potential for spikes."""
        b, t, h, w, c = x.shape
        hidden = self.hidden_norm(self.expand(x.reshape(b, t, h * w, c)))
        record("channel.hidden.potential", hidden.reshape(b, t, h, w, -1))
        spikes = self.neuron(hidden)
        record("channel.hidden.spikes", spikes.reshape(b, t, h, w, -1))
        return self.norm(self.project(spikes)).reshape(x.shape)


class Block(nnx.Module):
    """One block of a stage; its skip connection is always the stage's potential h.

    token = TokenBlock(x); x = LIF(h + token); x = LIF(h + token + ChannelBlock(x))
    """

    def __init__(self, config: ModelConfig, stage: int, *, rngs: nnx.Rngs):
        self.token = TokenBlock(config, stage, rngs=rngs)
        self.token_neuron = Neuron(config)
        self.channel = ChannelBlock(config, stage, rngs=rngs)
        self.channel_neuron = Neuron(config)

    def __call__(
        self, x: Float[Array, "B T H W C"], h: Float[Array, "B T H W C"], record: Record
    ) -> Float[Array, "B T H W C"]:
        """Spikes for spikes.

        Args:
            x: the stage's spikes so far.
            h: the stage's potential; its time axis may have length 1, for T equal steps.
            record: called with the name and value of each intermediate.
        """
        potential = h + self.token(x, record)
        record("token.potential", potential)
        spikes = self.token_neuron(potential)
        record("token.spikes", spikes)
        potential = potential + self.channel(spikes, record)
        record("channel.potential", potential)
        spikes = self.channel_neuron(potential)
        record("channel.spikes", spikes)
        return spikes
