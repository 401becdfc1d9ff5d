"""Normalization over time, batch and space: BatchNorm, tdBN, TEBN and LayerNorm.

Statistics are always taken over batch and time together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from spiking_mlp_jax.nn.module import Module
from spiking_mlp_jax.nn.neuron import potential_dtype

if TYPE_CHECKING:
    from jaxtyping import Array, Float

EPSILON = 1e-5
MOMENTUM = 0.1


class BatchNorm(Module):
    """Batch normalization over one feature axis, and its two variants for spiking networks.

    Args:
        features: length of the feature axis.
        axis: feature axis of the input: channels, rows, columns or tokens.
        step_scales: None, or T learned scales, one per time step (TEBN).
        gain: constant factor after the affine map; alpha * v_threshold makes it tdBN.
        time_axis: of the input, for `step_scales`.

    As in PyTorch, running averages have momentum 0.1 and hold the unbiased variance. Statistics, affine map and result
    are at least float32. Inside `jax.shard_map` statistics are those of each device's shard of the batch; `sync_axes`
    names mesh axes over which they are shared.

    References:
        Ioffe, Szegedy, "Batch normalization", 2015; Zheng et al., "Going deeper with directly-trained larger spiking
        neural networks" (tdBN), AAAI 2021; Duan et al., "Temporal effective batch normalization in spiking neural
        networks" (TEBN), NeurIPS 2022.
    """

    def __init__(
        self, features: int, axis: int = -1, *, step_scales: int | None = None, gain: float = 1.0, time_axis: int = 1
    ):
        self.axis, self.time_axis = axis, time_axis
        self.gain = gain
        self.use_running_average = False
        self.sync_axes: tuple[str, ...] = ()
        self.scale = nnx.Param(jnp.ones(features, float))
        self.bias = nnx.Param(jnp.zeros(features, float))
        self.step_scale = None if step_scales is None else nnx.Param(jnp.ones(step_scales, float))
        self.mean = nnx.BatchStat(jnp.zeros(features, float))
        self.var = nnx.BatchStat(jnp.ones(features, float))
        self.num_batches = nnx.BatchStat(jnp.zeros((), jnp.int32))

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "B T *shape"], repeats: int = 1) -> Float[Array, "B T *shape"]:
        """Normalize x and, in training mode, update the running averages.

        Args:
            x: potentials.
            repeats: number of equal values that each entry of x stands for; it only affects the unbiased variance.
                The stem runs once per image but counts as T equal steps.

        Returns:
            x's shape, at least float32; with step scales, a time axis of length 1 becomes T.
        """
        if self.use_running_average:
            shape = feature_shape(x, self.axis)
            factor, offset = affine(
                self.mean[...].reshape(shape), self.var[...].reshape(shape), self.scale[...], self.bias[...], self.gain
            )
            dtype = potential_dtype(x.dtype)
            y = x.astype(dtype) * factor.astype(dtype) + offset.astype(dtype)
        else:
            outputs: Any = batch_normalize(
                x, self.scale[...], self.bias[...], self.axis % x.ndim, self.gain, self.sync_axes
            )
            y, mean, var = outputs
            update_running_averages(self, mean, var, x.size // x.shape[self.axis] * repeats)
        if self.step_scale is not None:
            shape = [-1 if i == self.time_axis % x.ndim else 1 for i in range(x.ndim)]
            y = y * self.step_scale[...].reshape(shape).astype(y.dtype)
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Called by `nnx.view`.

        Args:
            use_running_average: True normalises by the running averages, False by the batch; None changes nothing.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


def update_running_averages(norm: BatchNorm, mean: Array, var: Array, count: int) -> None:
    """Update a norm's averages with a batch's statistics, any shape, over `count` values per feature and device."""
    count *= devices_along(norm.sync_axes)
    # A single value has no unbiased variance; PyTorch raises, here the biased one (0) is used.
    unbiased = var * (count / max(count - 1, 1))
    for average, value in ((norm.mean, mean), (norm.var, unbiased)):
        value = jax.lax.stop_gradient(value).astype(average.dtype).reshape(-1)
        average[...] = (1 - MOMENTUM) * average[...] + MOMENTUM * value
    norm.num_batches[...] = norm.num_batches[...] + 1


class LayerNorm(Module):
    """Layer normalization of each image and time step over the given axes, with an affine map.

    Args:
        shape: lengths of the normalized axes.
        axes: the normalized axes of the input, ascending.

    Statistics and result are at least float32.

    References: Ba, Kiros, Hinton, "Layer normalization", 2016.
    """

    def __init__(self, shape: tuple[int, ...], axes: tuple[int, ...]):
        self.axes = axes
        self.scale = nnx.Param(jnp.ones(shape, float))
        self.bias = nnx.Param(jnp.zeros(shape, float))

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "B T *shape"]) -> Float[Array, "B T *shape"]:
        """Normalize x."""
        axes = [axis % x.ndim for axis in self.axes]
        shape = [n if i in axes else 1 for i, n in enumerate(x.shape)]
        wide = x.astype(potential_dtype(x.dtype))
        centred = wide - jnp.mean(wide, axes, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + EPSILON)
        return (y * self.scale[...].reshape(shape) + self.bias[...].reshape(shape)).astype(wide.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def batch_normalize(
    x: Float[Array, "..."],
    scale: Float[Array, "C"],
    bias: Float[Array, "C"],
    axis: int,
    gain: float,
    over: tuple[str, ...] = (),
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Normalize x by its own statistics. x is the only residual of its size.

    Args:
        x: any shape, floating.
        scale, bias: affine map of the features.
        axis: feature axis, not negative.
        gain: constant factor after the affine map.
        over: mesh axes whose devices share the statistics.

    Returns:
        x's shape, at least float32; mean and biased variance of each feature, with the other axes of length 1. The
        latter two have no gradient.
    """
    wide = x.astype(potential_dtype(x.dtype))
    mean, var = moments(wide, axis, over)
    factor, offset = affine(mean, var, scale, bias, gain)
    return wide * factor + offset, mean, var


def _normalize_forward(x, scale, bias, axis, gain, over):
    outputs: Any = batch_normalize(x, scale, bias, axis, gain, over)
    return outputs, (x, scale, bias, *outputs[1:])


def _normalize_backward(axis, gain, over, residuals, cotangents):
    x, scale, bias, mean, var = residuals
    wide = x.astype(mean.dtype)
    dx, dscale, dbias = batch_norm_backward(cotangents[0], wide - mean, var, scale, gain, over)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


batch_normalize.defvjp(_normalize_forward, _normalize_backward)


def moments(
    x: Float[Array, "..."], axis: int, over: tuple[str, ...] = ()
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Mean and biased variance over all axes but one, which stay with length 1.

    Devices along the mesh axes `over` are included, in two all-reduces: a single one of sums and sums of squares would
    cancel for values far from 0.
    """
    others = [i for i in range(x.ndim) if i != axis]
    mean = mean_over(jnp.mean(x, others, keepdims=True), over)
    return mean, mean_over(jnp.mean(jnp.square(x - mean), others, keepdims=True), over)


def mean_over(x: Array, axes: tuple[str, ...]) -> Array:
    """Mean over the devices along mesh axes; x itself if there are none."""
    return jax.lax.pmean(x, axes) if axes else x


def devices_along(axes: tuple[str, ...]) -> int:
    """Number of devices along mesh axes, inside `jax.shard_map`; 1 if there are none."""
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def affine(mean: Array, var: Array, scale: Array, bias: Array, gain: float) -> tuple[Array, Array]:
    """Factor and offset of the normalization y = x * factor + offset, in the mean's shape."""
    factor = scale.reshape(mean.shape).astype(mean.dtype) * jax.lax.rsqrt(var + EPSILON) * gain
    return factor, bias.reshape(mean.shape).astype(mean.dtype) * gain - mean * factor


def batch_norm_backward(
    dy: Float[Array, "..."],
    centred: Float[Array, "..."],
    var: Array,
    scale: Array,
    gain: float,
    over: tuple[str, ...] = (),
) -> tuple[Float[Array, "..."], Float[Array, "C"], Float[Array, "C"]]:
    """Gradient of a normalization by batch statistics, in two sums and one pass.

    Args:
        dy: cotangent of the result.
        centred: x - mean, in dy's shape and dtype.
        var: biased variance, with the other axes of length 1.
        scale, gain, over: as in `batch_normalize`.

    Returns:
        cotangents of x, scale and bias, for the sum of the losses of all devices along `over`; those of scale and bias
        are this device's summand.

    References: Ioffe, Szegedy, "Batch normalization", 2015, section 3.
    """
    # dy is read three times. Without the barrier XLA would recompute its producer for each.
    dy = jax.lax.optimization_barrier(dy)
    others = [i for i in range(dy.ndim) if var.shape[i] == 1]
    count = dy.size // var.size * devices_along(over)
    deviation = jax.lax.rsqrt(var + EPSILON)
    dbias = jnp.sum(dy, others, keepdims=True)
    dscale = jnp.sum(dy * centred, others, keepdims=True) * deviation
    factor = scale.reshape(var.shape).astype(dy.dtype) * deviation * gain
    all_dbias, all_dscale = jax.lax.psum((dbias, dscale), over) if over else (dbias, dscale)
    dx = factor * (dy - (all_dbias + centred * (deviation * all_dscale)) / count)
    return dx, (dscale * gain).reshape(-1), (dbias * gain).reshape(-1)


def feature_shape(x: Array, axis: int) -> tuple[int, ...]:
    """x's shape with all axes but the feature axis of length 1."""
    return tuple(n if i == axis % x.ndim else 1 for i, n in enumerate(x.shape))


def uniform_fan_in(key: Array, shape: Sequence[int], fan_in: int) -> Float[Array, "..."]:
    """PyTorch's default initialization of weights and biases: uniform in +-1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, float, -bound, bound)
