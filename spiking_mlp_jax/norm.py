"""Normalisation over time, batch and space: BatchNorm, tdBN, TEBN and LayerNorm.

Inputs are potentials [B, T, ...] with the batch on axis 0 and time on axis 1. Statistics are always taken over B
and T together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

EPSILON = 1e-5
MOMENTUM = 0.1


class BatchNorm(nnx.Module):
    """Batch normalisation of one feature axis, with the two variants for spiking networks.

    Args:
        features: length of the feature axis.
        axis: which axis of the input holds the features: channels, rows, columns or tokens.
        step_scales: None, or the number T of learned scales, one a time step (TEBN).
        gain: constant factor after the affine map; alpha * v_threshold makes it tdBN.

    The running averages move by 0.1 a batch and keep the unbiased variance, as PyTorch's do. The statistics and
    the affine map are computed in at least float32, the result has the input's dtype.

    References:
        Ioffe, Szegedy, "Batch normalization", 2015; Zheng et al., "Going deeper with directly-trained larger spiking
        neural networks" (tdBN), AAAI 2021; Duan et al., "Temporal effective batch normalization in spiking neural
        networks" (TEBN), NeurIPS 2022.
    """

    def __init__(self, features: int, axis: int = -1, *, step_scales: int | None = None, gain: float = 1.0):
        self.axis = axis
        self.gain = gain
        self.use_running_average = False
        self.scale = nnx.Param(jnp.ones(features, float))
        self.bias = nnx.Param(jnp.zeros(features, float))
        self.step_scale = None if step_scales is None else nnx.Param(jnp.ones(step_scales, float))
        self.mean = nnx.BatchStat(jnp.zeros(features, float))
        self.var = nnx.BatchStat(jnp.ones(features, float))
        self.num_batches = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x: Float[Array, "B T *shape"], repeats: int = 1) -> Float[Array, "B T *shape"]:
        """Normalises x, and in training mode updates the running averages.

        Args:
            x: potentials.
            repeats: how often each entry of x stands for equal values, which only the unbiased variance sees.
                The stem is computed once an image but counts as T equal steps.

        Returns:
            x's shape and dtype; with step scales a time axis of length 1 becomes T.
        """
        axis = self.axis % x.ndim
        shape = [1] * x.ndim
        shape[axis] = x.shape[axis]
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        wide = x.astype(dtype)
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            others = [i for i in range(x.ndim) if i != axis]
            mean = jnp.mean(wide, others)
            var = jnp.mean(jnp.square(wide - mean.reshape(shape)), others)
            self._update_running_averages(mean, var, x.size // x.shape[axis] * repeats)
        factor = self.scale[...] * jax.lax.rsqrt(var + EPSILON) * self.gain
        offset = self.bias[...] * self.gain - mean * factor
        y = wide * factor.reshape(shape).astype(dtype) + offset.reshape(shape).astype(dtype)
        if self.step_scale is not None:
            y = y * self.step_scale[...].reshape((1, -1) + (1,) * (x.ndim - 2)).astype(dtype)
        return y.astype(x.dtype)

    def _update_running_averages(self, mean, var, count):
        # A single value has no unbiased variance; PyTorch refuses it, here the biased one is kept.
        unbiased = var * (count / max(count - 1, 1))
        for average, value in ((self.mean, mean), (self.var, unbiased)):
            value = jax.lax.stop_gradient(value).astype(average.dtype)
            average[...] = (1 - MOMENTUM) * average[...] + MOMENTUM * value
        self.num_batches[...] = self.num_batches[...] + 1


class LayerNorm(nnx.Module):
    """Layer normalisation of each image and time step over the given axes, with an affine map over them.

    Args:
        shape: lengths of the normalised axes.
        axes: which axes of the input they are, ascending.

    Statistics are computed in at least float32, the result has the input's dtype.

    References: Ba, Kiros, Hinton, "Layer normalization", 2016.
    """

    def __init__(self, shape: tuple[int, ...], axes: tuple[int, ...]):
        self.axes = axes
        self.scale = nnx.Param(jnp.ones(shape, float))
        self.bias = nnx.Param(jnp.zeros(shape, float))

    def __call__(self, x: Float[Array, "B T *shape"]) -> Float[Array, "B T *shape"]:
        """Normalises x, any shape that has the axes."""
        axes = [axis % x.ndim for axis in self.axes]
        shape = [n if i in axes else 1 for i, n in enumerate(x.shape)]
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - jnp.mean(wide, axes, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + EPSILON)
        return (y * self.scale[...].reshape(shape) + self.bias[...].reshape(shape)).astype(x.dtype)


def uniform_fan_in(key: Array, shape: Sequence[int], fan_in: int) -> Float[Array, "..."]:
    """PyTorch's default initialisation of weights and biases: uniform in +-1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, float, -bound, bound)
