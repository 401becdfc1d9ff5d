"""Token mixing along rows and columns, channel mixing, and the block they form."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.nn.layers import Neuron, Record, batch_norm, bias_of, fire, linear, product, spike_dense
from spiking_mlp_jax.nn.norm import LayerNorm, uniform_fan_in

if TYPE_CHECKING:
    from jaxtyping import Array, Float

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
        z: Array = mix_axis(x, self.kernel[...].astype(x.dtype), self.axis)  # pyright: ignore[reportAssignmentType]
        spikes, potential = fire(self.norm, self.neuron, z, feature_bias=self.bias[...], feature_axis=self.axis)
        record("potential", potential)
        record("spikes", spikes)
        return spikes


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mix_axis(x: Float[Array, "B T H W C"], kernel: Float[Array, "side side"], axis: int) -> Float[Array, "B T H W C"]:
    """kernel [out, in] applied along one axis of x, which are spikes, kept as bool for the backward pass.

    What is before the axis becomes a batch of products of the kernel with what is after it: nothing is transposed.

    Args:
        x: spikes, 0 or 1.
        kernel: in x's dtype.
        axis: HEIGHT or WIDTH.

    Examples:
        A spike in row 1 selects column 1 of the kernel.

        >>> x = jnp.zeros((1, 1, 2, 1, 1)).at[0, 0, 1].set(1.0)
        >>> mix_axis(x, jnp.array([[1.0, 2.0], [3.0, 4.0]]), HEIGHT).ravel().tolist()
        [2.0, 4.0]
    """
    x3 = _around(x, axis)
    y = product(_repeated(kernel, x3), x3, (((2,), (1,)), ((0,), (0,))))
    return y.reshape(x.shape)


def _mix_forward(x, kernel, axis):
    return mix_axis(x, kernel, axis), (x.astype(bool), kernel)


def _mix_backward(axis, kept, dy):
    x, kernel = kept
    dy3 = _around(jax.lax.optimization_barrier(dy), axis)
    x3 = _around(x, axis).astype(dy.dtype)
    dx = product(_repeated(kernel.T, dy3), dy3, (((2,), (1,)), ((0,), (0,))))
    dkernel = jnp.sum(product(dy3, x3, (((2,), (2,)), ((0,), (0,)))), 0)
    return dx.reshape(x.shape), dkernel


mix_axis.defvjp(_mix_forward, _mix_backward)


def _around(x, axis):
    return x.reshape(math.prod(x.shape[:axis]), x.shape[axis], -1)


def _repeated(kernel, x3):
    return jnp.broadcast_to(kernel, (x3.shape[0], *kernel.shape))


class TokenBlock(nnx.Module):
    """Row and column mixing beside the identity, fused by a 1 x 1 convolution; its norm is applied by the block.

    The identity is x itself with "spe" and LIF(norm(x)) with "plain" encoding.
    """

    def __init__(self, config: ModelConfig, stage: int, *, rngs: nnx.Rngs):
        channels = config.stage_dim(stage)
        self.height = AxisMixing(config, stage, HEIGHT, rngs=rngs)
        self.width = AxisMixing(config, stage, WIDTH, rngs=rngs)
        self.identity_norm = batch_norm(config, channels) if config.encoding == "plain" else None
        self.identity_neuron = Neuron(config) if config.encoding == "plain" else None
        self.fuse = linear(3 * channels, channels, use_bias=False, rngs=rngs)
        self.norm = batch_norm(config, channels)

    def __call__(self, x: Float[Array, "B T H W C"], record: Record) -> Float[Array, "B T H W C"]:
        """What the norm is applied to, for spikes."""
        identity = x
        if self.identity_norm is not None and self.identity_neuron is not None:
            with jax.named_scope("identity"):
                identity, potential = fire(self.identity_norm, self.identity_neuron, x)
            record("token.identity.potential", potential)
            record("token.identity.spikes", identity)
        with jax.named_scope("height"):
            a = self.height(x, lambda name, value: record(f"token.height.{name}", value))
        with jax.named_scope("width"):
            b = self.width(x, lambda name, value: record(f"token.width.{name}", value))
        with jax.named_scope("fuse"):
            return spike_dense(jnp.concatenate([identity, a, b], -1), self.fuse.kernel[...].astype(x.dtype))


class ChannelBlock(nnx.Module):
    """Two-layer MLP over the channels of each token: linear, norm, LIF, linear; its last norm is applied by the block.

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

        self.expand = linear(channels, hidden, rngs=rngs)
        self.hidden_norm = norm(hidden)
        self.neuron = Neuron(config)
        self.project = linear(hidden, channels, rngs=rngs)
        self.norm = norm(channels)

    def __call__(self, x: Float[Array, "B T H W C"], record: Record) -> Float[Array, "B T H W C"]:
        """What the last norm is applied to but the bias, [B, T, H * W, C], for spikes."""
        b, t, h, w, c = x.shape
        with jax.named_scope("hidden"):
            z = spike_dense(x.reshape(b, t, h * w, c), self.expand.kernel[...].astype(x.dtype))
            spikes, potential = fire(self.hidden_norm, self.neuron, z, bias=bias_of(self.expand))
        record("channel.hidden.potential", potential.reshape(b, t, h, w, -1))
        record("channel.hidden.spikes", spikes.reshape(b, t, h, w, -1))
        with jax.named_scope("project"):
            return spike_dense(spikes, self.project.kernel[...].astype(x.dtype))


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
        with jax.named_scope("token"):
            spikes, potential = fire(self.token.norm, self.token_neuron, self.token(x, record), skip=h)
        record("token.potential", potential)
        record("token.spikes", spikes)
        with jax.named_scope("channel"):
            z = self.channel(spikes, record)
            bias = bias_of(self.channel.project)
            spikes, potential = fire(self.channel.norm, self.channel_neuron, z, bias=bias, skip=potential)
        record("channel.potential", potential)
        record("channel.spikes", spikes)
        return spikes
