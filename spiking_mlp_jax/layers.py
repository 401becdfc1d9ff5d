"""What every part of the network is built from: a configured neuron, norm, linear map and convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from spiking_mlp_jax import neuron
from spiking_mlp_jax.config import ModelConfig
from spiking_mlp_jax.norm import BatchNorm, uniform_fan_in
from spiking_mlp_jax.surrogate import SURROGATES

# Called with the name and value of an intermediate, see `SpikingMLP.__call__`.
Record = Callable[[str, Array], None]


class Neuron(nnx.Module):
    """A layer of the configured neurons; holds a parameter, w, only for "plif"."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.w = nnx.Param(jnp.asarray(neuron.plif_weight(config.tau), float)) if config.neuron == "plif" else None

    def __call__(self, x: Float[Array, "B T *shape"]) -> Float[Array, "B T *shape"]:
        """Spikes, 0 or 1, for the potentials x; a time axis of length 1 stands for T equal steps."""
        c = self.config
        if x.shape[1] != c.time_steps:
            x = jnp.broadcast_to(x, (x.shape[0], c.time_steps, *x.shape[2:]))
        common: dict[str, Any] = dict(
            v_threshold=c.v_threshold,
            v_reset=c.v_reset,
            detach_reset=c.detach_reset,
            surrogate=SURROGATES[c.surrogate](c.surrogate_alpha),
            time_axis=1,
        )
        if c.neuron == "if":
            return neuron.integrate_and_fire(x, **common)[0]
        if self.w is not None:
            return neuron.plif(x, self.w[...], decay_input=c.decay_input, **common)[0]
        return neuron.lif(x, tau=c.tau, decay_input=c.decay_input, **common)[0]


def batch_norm(config: ModelConfig, features: int, axis: int = -1) -> BatchNorm:
    """The configured batch norm over one axis; with norm="layer" plain BatchNorm, where LayerNorm does not go."""
    return BatchNorm(
        features,
        axis,
        step_scales=config.time_steps if config.norm == "tebn" else None,
        # tdBN: alpha * v_threshold, with alpha = 1.
        gain=config.v_threshold if config.norm == "tdbn" else 1.0,
    )


def linear(config: ModelConfig, fan_in: int, fan_out: int, *, use_bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear map of the last axis, kernel [in, out], initialised as PyTorch does."""
    return nnx.Linear(
        fan_in,
        fan_out,
        use_bias=use_bias,
        dtype=compute_dtype(config),
        param_dtype=float,
        kernel_init=lambda key, shape, dtype: uniform_fan_in(key, shape, fan_in),
        bias_init=lambda key, shape, dtype: uniform_fan_in(key, shape, fan_in),
        rngs=rngs,
    )


def compute_dtype(config: ModelConfig):
    """The dtype layers cast to; None, to follow the parameters (float64 where x64 is on), for "float32"."""
    return None if config.dtype == "float32" else jnp.dtype(config.dtype)


class Conv(nnx.Module):
    """A square convolution without bias, kernel [k, k, in, out], over the height and width of [B, T, H, W, C]."""

    def __init__(self, channels_in: int, channels_out: int, size: int, stride: int, padding: int, *, rngs: nnx.Rngs):
        self.stride, self.padding = stride, padding
        shape = (size, size, channels_in, channels_out)
        self.kernel = nnx.Param(uniform_fan_in(rngs.params(), shape, size * size * channels_in))

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H2 W2 C2"]:
        """Convolves each image and step."""
        return convolve(x, self.kernel[...], self.stride, self.padding)


def convolve(
    x: Float[Array, "B T H W C"], kernel: Float[Array, "k k C C2"], stride: int, padding: int
) -> Float[Array, "B T H2 W2 C2"]:
    """Square convolution with equal stride and zero padding on both axes; computes in x's dtype.

    B and T are merged with B leading, so that a batch sharded over devices stays where it is.
    """
    kernel = kernel.astype(x.dtype)
    size = kernel.shape[0]
    if size == stride and padding == 0:
        return _convolve_patches(x, kernel)
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]),
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _convolve_patches(x, kernel):
    # Windows that do not overlap are one matrix product, which XLA runs far faster on a CPU than a convolution.
    b, t, h, w, c = x.shape
    k = kernel.shape[0]
    patches = x.reshape(b, t, h // k, k, w // k, k, c).transpose(0, 1, 2, 4, 3, 5, 6)
    return patches.reshape(b, t, h // k, w // k, k * k * c) @ kernel.reshape(k * k * c, -1)
