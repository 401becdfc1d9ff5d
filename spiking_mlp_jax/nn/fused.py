"""Batch norm, skip connection and neuron as one function whose only large residual is the norm's input.

The composition of `norm.batch_normalize` and `neuron.run` would save the potential too, and read and write it once
more in each direction. Tests compare the two.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from spiking_mlp_jax.nn import neuron
from spiking_mlp_jax.nn.dynamics import Constants, Mode, unbroadcast
from spiking_mlp_jax.nn.norm import affine, batch_norm_backward, moments

if TYPE_CHECKING:
    from jaxtyping import Array, Float

TIME_AXIS = 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def normalize_and_fire(
    mode: Mode,
    axis: int,
    gain: float,
    over: tuple[str, ...],
    k: Constants,
    z: Float[Array, "B T *shape"],
    shift: Float[Array, "C"] | None,
    scale: Float[Array, "F"],
    bias: Float[Array, "F"],
    skip: Float[Array, "B T *shape"] | None,
) -> tuple[Float[Array, "B T *shape"], Float[Array, "B T *shape"], Array, Array]:
    """Spikes of neurons with input skip + BatchNorm(z + shift), normalized by batch statistics.

    Args:
        mode: equations of the neurons.
        axis: feature axis of the norm, not negative.
        gain: constant factor of the norm.
        over: mesh axes whose devices share the statistics.
        k: constants of the neurons; their dtype is the potential's.
        z: input of the norm: the output of a linear map, without its bias.
        shift: bias of that map, over the last axis of z, or None.
        scale, bias: the norm's affine map.
        skip: added to the normalized values, or None; a time axis of length 1 stands for T equal steps. If its rank is
            not z's, the neurons take its shape, into which z must reshape.

    Returns:
        spikes, 0 or 1, in z's dtype; potential, the input of the neurons, in k's dtype; mean and biased variance of
        z + shift, which have no gradient.
    """
    _, mean, var, potential = _potential(axis, gain, over, k, z, shift, scale, bias, skip)
    fired, _ = neuron.forward(mode, TIME_AXIS, k, potential, neuron.rest(k, potential, TIME_AXIS))
    return fired.astype(z.dtype), potential, mean, var


def _potential(axis, gain, over, k, z, shift, scale, bias, skip, statistics=None):
    wide = z.astype(k.tau.dtype)
    if shift is not None:
        wide = wide + shift.astype(wide.dtype).reshape((1,) * (wide.ndim - 1) + (-1,))
    mean, var = moments(wide, axis, over) if statistics is None else statistics
    factor, offset = affine(mean, var, scale, bias, gain)
    potential = wide * factor + offset
    if skip is not None:
        potential = potential.reshape(potential_shape(z, skip)) + skip.astype(wide.dtype)
    return wide, mean, var, potential


def potential_shape(z: Array, skip: Array) -> tuple[int, ...]:
    """Shape of the neurons' input: skip's if its rank is not z's, else z's."""
    return z.shape if skip.ndim == z.ndim else skip.shape


def _forward(mode, axis, gain, over, *inputs):
    outputs: Any = normalize_and_fire(mode, axis, gain, over, *inputs)
    return outputs, (inputs, outputs[2:])


def _backward(mode, axis, gain, over, residuals, cotangents):
    inputs, statistics = residuals
    k, z, shift, scale, bias, skip = inputs
    dspikes, dpotential = cotangents[:2]
    wide, mean, var, potential = _potential(axis, gain, over, *inputs, statistics=statistics)
    rest = neuron.rest(k, potential, TIME_AXIS)
    ds = dspikes.astype(wide.dtype)
    dp, drest, dk = neuron.backward(mode, TIME_AXIS, k, potential, rest, ds, jnp.zeros_like(rest))
    dp = jax.lax.optimization_barrier(dp + dpotential)
    dwide, dscale, dbias = batch_norm_backward(dp.reshape(wide.shape), wide - mean, var, scale, gain, over)
    if dk is None:
        dk = jax.tree.map(jnp.zeros_like, k)
    else:
        dk = dk._replace(v_reset=dk.v_reset + unbroadcast(drest, k.v_reset))
    dshift = None if shift is None else jnp.sum(dwide, tuple(range(dwide.ndim - 1))).astype(shift.dtype)
    dskip = None
    if skip is not None:
        repeated = skip.shape[TIME_AXIS] != dp.shape[TIME_AXIS]
        dskip = (jnp.sum(dp, TIME_AXIS, keepdims=True) if repeated else dp).astype(skip.dtype)
    return dk, dwide.astype(z.dtype), dshift, dscale.astype(scale.dtype), dbias.astype(bias.dtype), dskip


normalize_and_fire.defvjp(_forward, _backward)
