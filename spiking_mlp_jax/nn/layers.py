"""Layers shared by all parts of a network: neurons, linear maps of spikes, convolutions."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from spiking_mlp_jax.nn.dynamics import Constants, Mode
from spiking_mlp_jax.nn.fused import TIME_AXIS, normalize_and_fire, potential_shape
from spiking_mlp_jax.nn.kernels.sharding import match_vma
from spiking_mlp_jax.nn.module import Module
from spiking_mlp_jax.nn.neuron import plif_weight, potential_dtype, rest, run, with_axes
from spiking_mlp_jax.nn.norm import BatchNorm, LayerNorm, feature_shape, uniform_fan_in, update_running_averages
from spiking_mlp_jax.nn.surrogate import SURROGATES

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class Neuron(Module):
    """A layer of neurons.

    Args:
        kind: "lif", "if" (no leak) or "plif", which learns tau through a parameter w.
        channels: with "plif", learn a tau for each of this many channels, the last axis; None: one tau.
        tau: membrane time constant in steps; the initial one for "plif".
        v_threshold, v_reset, decay_input, detach_reset, backend: as in `nn.neuron.lif`.
        surrogate: a name in `SURROGATES`.
        surrogate_alpha: its sharpness.
        time_steps: T; needed if inputs may have a time axis of length 1 that stands for T equal steps.
        time_axis: of the input; `fire` and the layers of `models` need 1.
        dtype: of the spikes; None: the input's.
    """

    def __init__(
        self,
        kind: str = "lif",
        *,
        channels: int | None = None,
        tau: float = 2.0,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        decay_input: bool = True,
        detach_reset: bool = True,
        surrogate: str = "sigmoid",
        surrogate_alpha: float = 4.0,
        time_steps: int | None = None,
        time_axis: int = TIME_AXIS,
        dtype: str | None = None,
        backend: str = "auto",
    ):
        self.kind, self.tau, self.v_threshold, self.v_reset = kind, tau, v_threshold, v_reset
        self.decay_input, self.detach_reset = decay_input, detach_reset
        self.surrogate, self.surrogate_alpha = surrogate, surrogate_alpha
        self.time_steps, self.time_axis, self.dtype, self.backend = time_steps, time_axis, dtype, backend
        shape = () if channels is None else (channels,)
        self.w = nnx.Param(jnp.full(shape, plif_weight(tau), float)) if kind == "plif" else None

    @jax.named_scope("neuron")
    def __call__(self, x: Float[Array, "B T *shape"]) -> Float[Array, "B T *shape"]:
        """Spikes, 0 or 1, of neurons that start at rest and receive x."""
        mode, k = equations(self, potential_dtype(x.dtype))
        time = self.time_axis
        steps, k = self.time_steps or x.shape[time], with_axes(k, x.ndim - 1)
        outputs: Any = run(mode, time, steps, *match_vma((k, x, rest(k, x, time))))
        spikes, _ = outputs
        return spikes.astype(self.dtype or x.dtype)


# A function: what is not an array, such as Mode, may not leave a method under nnx.tabulate.
def equations(neuron: Neuron, dtype) -> tuple[Mode, Constants]:
    """The equations of a layer of neurons and their constants, in the given dtype."""
    mode = Mode(
        leaky=neuron.kind != "if",
        decay_input=neuron.decay_input,
        hard_reset=neuron.v_reset is not None,
        detach_reset=neuron.detach_reset,
        surrogate=SURROGATES[neuron.surrogate](neuron.surrogate_alpha),
        learned=neuron.w is not None,
        backend=neuron.backend,
    )
    tau = neuron.tau if neuron.w is None else 1 / jax.nn.sigmoid(neuron.w[...])
    values = tau, neuron.v_threshold, neuron.v_reset or 0.0
    return mode, Constants(*(jnp.asarray(value, dtype) for value in values))


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
    """Spikes and potential of neurons with input skip + norm(z + bias + feature_bias).

    Args:
        norm: updates its running averages in training mode.
        neuron: the neurons.
        z: output of a linear map, without its bias.
        bias: of that map, over the last axis of z.
        feature_bias: the same, but over feature_axis, which must be the axis of a BatchNorm.
        feature_axis: axis of feature_bias in z.
        skip: added to the normalized values; its time axis may have length 1. With z [B, T, H * W, C] it may be
            [B, T, H, W, C], then the results are too: reshaping the sum instead is a copy on a TPU.

    Returns:
        (spikes, 0 or 1, in z's dtype; potential, the input of the neurons, at least float32), both of z's shape.
    """
    if isinstance(norm, BatchNorm) and not norm.use_running_average and norm.step_scale is None:
        mode, k = equations(neuron, potential_dtype(z.dtype))
        axis = norm.axis % z.ndim
        neurons = z if skip is None else skip
        inputs = match_vma((with_axes(k, neurons.ndim - 1), z, bias, norm.scale[...], norm.bias[...], skip))
        spikes, potential, mean, var = normalize_and_fire(  # pyright: ignore[reportGeneralTypeIssues]
            mode, axis, norm.gain, norm.sync_axes, *inputs
        )
        if feature_bias is not None:
            # Batch statistics cancel what is constant over a feature; only the running mean depends on it.
            mean = mean.reshape(-1) + feature_bias
        update_running_averages(norm, mean, var, z.size // z.shape[axis])
        return spikes, potential
    # Biases are added in at least float32, as in training.
    wide = z.astype(potential_dtype(z.dtype))
    if bias is not None:
        wide = wide + bias.reshape(feature_shape(z, -1))
    if feature_bias is not None:
        wide = wide + feature_bias.reshape(feature_shape(z, feature_axis))
    potential = norm(wide)
    if skip is not None:
        potential = skip + potential.reshape(potential_shape(z, skip))
    return neuron(potential).astype(z.dtype), potential


def product(a: Float[Array, "..."], b: Float[Array, "..."], dimension_numbers) -> Float[Array, "..."]:
    """`jax.lax.dot_general` that accumulates in at least float32 and rounds to the dtype of a and b.

    Matrix units do so anyway; on CPUs XLA uses them only for products that ask for it.
    """
    wide = potential_dtype(a.dtype)
    return jax.lax.dot_general(a, b, dimension_numbers, preferred_element_type=wide).astype(a.dtype)


@jax.custom_vjp
def spike_dense(spikes: Float[Array, "... C"], kernel: Float[Array, "C D"]) -> Float[Array, "... D"]:
    """A linear map of spikes, 0 or 1, saved as bool for the backward pass: one byte per spike."""
    return product(spikes, kernel, (((spikes.ndim - 1,), (0,)), ((), ())))


def _dense_forward(spikes, kernel):
    return spike_dense(spikes, kernel), (spikes.astype(bool), kernel)


def _dense_backward(residuals, dy):
    spikes, kernel = residuals
    # Plain matrix products, with dy computed once: without the barrier XLA recomputes its producer, transposed.
    dy = jax.lax.optimization_barrier(dy).reshape(-1, dy.shape[-1])
    flat = spikes.astype(dy.dtype).reshape(-1, spikes.shape[-1])
    dkernel = product(flat, dy, (((0,), (0,)), ((), ())))
    return product(dy, kernel, (((1,), (1,)), ((), ()))).reshape(spikes.shape), dkernel


spike_dense.defvjp(_dense_forward, _dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mix_axis(x: Float[Array, "B T H W C"], kernel: Float[Array, "side side"], axis: int) -> Float[Array, "B T H W C"]:
    """Apply kernel [out, in] along one axis of the spikes x, saved as bool for the backward pass.

    A batch of matrix products, over the axes before, with the axes after as columns: nothing is transposed.

    Args:
        x: spikes, 0 or 1.
        kernel: in x's dtype.
        axis: 2 (height) or 3 (width).

    Examples:
        A spike in row 1 selects column 1 of the kernel.

        >>> x = jnp.zeros((1, 1, 2, 1, 1)).at[0, 0, 1].set(1.0)
        >>> mix_axis(x, jnp.array([[1.0, 2.0], [3.0, 4.0]]), 2).ravel().tolist()
        [2.0, 4.0]
    """
    x3 = _around(x, axis)
    y = product(_repeated(kernel, x3), x3, (((2,), (1,)), ((0,), (0,))))
    return y.reshape(x.shape)


def _mix_forward(x, kernel, axis):
    return mix_axis(x, kernel, axis), (x.astype(bool), kernel)


def _mix_backward(axis, residuals, dy):
    x, kernel = residuals
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


def linear(fan_in: int, fan_out: int, *, use_bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear map of the last axis, kernel [in, out], initialized as in PyTorch."""
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


class Conv(Module):
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
    """Square convolution with equal stride and zero padding on both axes, computed in x's dtype.

    B and T are merged with B leading, so that a batch sharded over devices is not gathered.
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
    # Without overlap a convolution is one matrix product, which XLA runs far faster on a CPU.
    b, t, h, w, c = x.shape
    k = kernel.shape[0]
    patches = x.reshape(b, t, h // k, k, w // k, k, c).transpose(0, 1, 2, 4, 3, 5, 6)
    return patches.reshape(b, t, h // k, w // k, k * k * c) @ kernel.reshape(k * k * c, -1)
