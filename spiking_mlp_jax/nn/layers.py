"""What every part of the network is built from: a configured neuron, norm, linear map and convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.nn import neuron
from spiking_mlp_jax.nn.dynamics import Constants, Mode
from spiking_mlp_jax.nn.fused import normalize_and_fire, potential_shape
from spiking_mlp_jax.nn.kernels.sharding import vary_alike
from spiking_mlp_jax.nn.neuron import potential_dtype
from spiking_mlp_jax.nn.norm import BatchNorm, LayerNorm, feature_shape, uniform_fan_in
from spiking_mlp_jax.nn.surrogate import SURROGATES

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Called with the name and value of an intermediate, see `SpikingMLP.__call__`.
Record = Callable[[str, jax.Array], None]


class Neuron(nnx.Module):
    """A layer of the configured neurons; holds a parameter, w, only for "plif"."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.w = nnx.Param(jnp.asarray(neuron.plif_weight(config.tau), float)) if config.neuron == "plif" else None

    @jax.named_scope("neuron")
    def __call__(self, x: Float[Array, "B T *shape"]) -> Float[Array, "B T *shape"]:
        """Spikes, 0 or 1, for the potentials x; a time axis of length 1 stands for T equal steps."""
        c = self.config
        common: dict[str, Any] = dict(
            v_threshold=c.v_threshold,
            v_reset=c.v_reset,
            detach_reset=c.detach_reset,
            surrogate=SURROGATES[c.surrogate](c.surrogate_alpha),
            time_axis=1,
            time_steps=c.time_steps,
            backend=c.neuron_backend,
        )
        if c.neuron == "if":
            spikes, _ = neuron.integrate_and_fire(x, **common)
        elif self.w is not None:
            spikes, _ = neuron.plif(x, self.w[...], decay_input=c.decay_input, **common)
        else:
            spikes, _ = neuron.lif(x, tau=c.tau, decay_input=c.decay_input, **common)
        return spikes.astype(compute_dtype(c) or x.dtype)

    def equations(self, dtype) -> tuple[Mode, Constants]:
        """The neurons' equations and constants, for potentials of the given dtype."""
        c = self.config
        mode = Mode(
            leaky=c.neuron != "if",
            decay_input=c.decay_input,
            hard_reset=c.v_reset is not None,
            detach_reset=c.detach_reset,
            surrogate=SURROGATES[c.surrogate](c.surrogate_alpha),
            learned=self.w is not None,
            backend=c.neuron_backend,
        )
        tau = c.tau if self.w is None else 1 / jax.nn.sigmoid(self.w[...])
        return mode, Constants(*(jnp.asarray(value, dtype) for value in (tau, c.v_threshold, c.v_reset or 0.0)))


def fire(
    norm: BatchNorm | LayerNorm,
    neuron: Neuron,
    z: Float[Array, "B T *shape"],
    *,
    bias: Float[Array, "C"] | None = None,
    feature_bias: Float[Array, "F"] | None = None,
    feature_axis: int = -1,
    skip: Float[Array, "B T *shape"] | None = None,
) -> tuple[Float[Array, "B T *shape"], Float[Array, "B T *shape"]]:
    """Spikes and potential of neurons whose input is skip + norm(z + bias + feature_bias).

    Args:
        norm: in training mode it updates its running averages.
        neuron: the neurons.
        z: what a linear map gives, without its bias.
        bias: of that map, over the last axis of z.
        feature_bias: likewise, but over feature_axis, which is a BatchNorm's own axis.
        feature_axis: see there.
        skip: added to the normalised values; its time axis may have length 1. With z [B, T, H * W, C] it may also be
            [B, T, H, W, C], and so is the result: on a TPU reshaping what is added is a copy.

    Returns:
        (spikes, 0 or 1 in z's dtype; potential, the neurons' input, at least float32), both of z's shape.
    """
    if isinstance(norm, BatchNorm) and not norm.use_running_average and norm.step_scale is None:
        mode, k = neuron.equations(potential_dtype(z.dtype))
        axis = norm.axis % z.ndim
        inputs = vary_alike((k, z, bias, norm.scale[...], norm.bias[...], skip))
        spikes, potential, mean, var = normalize_and_fire(  # pyright: ignore[reportGeneralTypeIssues]
            mode, axis, norm.gain, norm.sync_axes, *inputs
        )
        if feature_bias is not None:
            # Batch statistics take away what is constant over a feature: only the running mean sees it.
            mean = mean.reshape(-1) + feature_bias
        norm.update_running_averages(mean, var, z.size // z.shape[axis])
        return spikes, potential
    # In training a bias is never rounded to a short dtype, and so it is not here.
    wide = z.astype(potential_dtype(z.dtype))
    if bias is not None:
        wide = wide + bias
    if feature_bias is not None:
        wide = wide + feature_bias.reshape(feature_shape(z, feature_axis))
    potential = norm(wide)
    if skip is not None:
        potential = skip + potential.reshape(potential_shape(z, skip))
    return neuron(potential).astype(z.dtype), potential


def product(a: Float[Array, "..."], b: Float[Array, "..."], dimension_numbers) -> Float[Array, "..."]:
    """`jax.lax.dot_general` whose sums are at least float32, rounded to the dtype of a and b afterwards.

    Matrix units do it so anyway; on CPUs only products that say so are given to them.
    """
    wide = potential_dtype(a.dtype)
    return jax.lax.dot_general(a, b, dimension_numbers, preferred_element_type=wide).astype(a.dtype)


@jax.custom_vjp
def spike_dense(spikes: Float[Array, "... C"], kernel: Float[Array, "C D"]) -> Float[Array, "... D"]:
    """A linear map of spikes, 0 or 1, which are kept as bool for the backward pass, one byte a spike."""
    return product(spikes, kernel, (((spikes.ndim - 1,), (0,)), ((), ())))


def _dense_forward(spikes, kernel):
    return spike_dense(spikes, kernel), (spikes.astype(bool), kernel)


def _dense_backward(kept, dy):
    spikes, kernel = kept
    # Plain products of matrices, with dy computed once: else compilers repeat what it comes from, transposed.
    dy = jax.lax.optimization_barrier(dy).reshape(-1, dy.shape[-1])
    flat = spikes.astype(dy.dtype).reshape(-1, spikes.shape[-1])
    dkernel = product(flat, dy, (((0,), (0,)), ((), ())))
    return product(dy, kernel, (((1,), (1,)), ((), ()))).reshape(spikes.shape), dkernel


spike_dense.defvjp(_dense_forward, _dense_backward)


def batch_norm(config: ModelConfig, features: int, axis: int = -1) -> BatchNorm:
    """The configured batch norm over one axis; with norm="layer" plain BatchNorm, where LayerNorm does not go."""
    return BatchNorm(
        features,
        axis,
        step_scales=config.time_steps if config.norm == "tebn" else None,
        # tdBN: alpha * v_threshold, with alpha = 1.
        gain=config.v_threshold if config.norm == "tdbn" else 1.0,
    )


def linear(fan_in: int, fan_out: int, *, use_bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear map of the last axis, kernel [in, out], initialised as PyTorch does."""
    return nnx.Linear(
        fan_in,
        fan_out,
        use_bias=use_bias,
        param_dtype=float,
        kernel_init=lambda key, shape, dtype: uniform_fan_in(key, shape, fan_in),
        bias_init=lambda key, shape, dtype: uniform_fan_in(key, shape, fan_in),
        rngs=rngs,
    )


def bias_of(linear: nnx.Linear) -> Float[Array, "C"]:
    """The bias of a linear map that has one."""
    assert linear.bias is not None
    return linear.bias[...]


def compute_dtype(config: ModelConfig):
    """The dtype of spikes and maps of them; None for "float32", to follow the parameters (float64 where x64 is on)."""
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
