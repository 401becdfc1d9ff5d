"""Batch norm, skip connection and neuron as one function, which keeps only the norm's input for the backward pass.

The same composed of `norm.batch_normalize` and `neuron.run` keeps the potential too, and reads and writes it once
more in each direction; tests compare the two.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from spiking_mlp_jax.nn import dispatch
from spiking_mlp_jax.nn.dynamics import Constants, Mode
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
    """Neurons whose input is skip + BatchNorm(z + shift), with the batch's own statistics.

    Args:
        mode: the neurons' equations.
        axis: of the norm's features, not negative.
        gain: the norm's constant factor.
        over: mesh axes whose devices share the norm's statistics.
        k: the neurons' constants; their dtype is the potential's.
        z: what is normalised, as a linear map gives it.
        shift: that map's bias, over the last axis of z, or None.
        scale, bias: the norm's affine map.
        skip: what is added to the normalised values, or None; its time axis may have length 1, for T equal steps.
            Where it has another rank than z, it has z's entries in another shape, which is the neurons' then.

    Returns:
        spikes, 0 or 1 in z's dtype; potential, the neurons' input, in theirs; mean and biased variance of z + shift,
        through which no gradient flows.
    """
    _, mean, var, potential = _potential(axis, gain, over, k, z, shift, scale, bias, skip)
    fired, _ = dispatch.forward(mode, k, potential, _rest(k, potential), TIME_AXIS)
    return fired.astype(z.dtype), potential, mean, var


def _potential(axis, gain, over, k, z, shift, scale, bias, skip, statistics=None):
    wide = z.astype(k.tau.dtype)
    if shift is not None:
        wide = wide + shift.astype(wide.dtype)
    mean, var = moments(wide, axis, over) if statistics is None else statistics
    factor, offset = affine(mean, var, scale, bias, gain)
    potential = wide * factor + offset
    if skip is not None:
        potential = potential.reshape(potential_shape(z, skip)) + skip.astype(wide.dtype)
    return wide, mean, var, potential


def potential_shape(z: Array, skip: Array) -> tuple[int, ...]:
    """The shape of the neurons' input: skip's where that is of another rank, z's otherwise."""
    return z.shape if skip.ndim == z.ndim else skip.shape


def _rest(k, potential):
    return jnp.broadcast_to(k.v_reset, (potential.shape[0], *potential.shape[TIME_AXIS + 1 :]))


def _forward(mode, axis, gain, over, *inputs):
    outputs: Any = normalize_and_fire(mode, axis, gain, over, *inputs)
    return outputs, (inputs, outputs[2:])


def _backward(mode, axis, gain, over, kept, cotangents):
    inputs, statistics = kept
    k, z, shift, scale, bias, skip = inputs
    dspikes, dpotential = cotangents[:2]
    wide, mean, var, potential = _potential(axis, gain, over, *inputs, statistics=statistics)
    rest = _rest(k, potential)
    ds = dspikes.astype(wide.dtype)
    dp, drest, dk = dispatch.backward(mode, k, potential, rest, TIME_AXIS, ds, jnp.zeros_like(rest))
    dp = jax.lax.optimization_barrier(dp + dpotential)
    dwide, dscale, dbias = batch_norm_backward(dp.reshape(wide.shape), wide - mean, var, scale, gain, over)
    dk = jax.tree.map(jnp.zeros_like, k) if dk is None else dk._replace(v_reset=dk.v_reset + jnp.sum(drest))
    dshift = None if shift is None else jnp.sum(dwide, tuple(range(dwide.ndim - 1))).astype(shift.dtype)
    dskip = None
    if skip is not None:
        repeated = skip.shape[TIME_AXIS] != dp.shape[TIME_AXIS]
        dskip = (jnp.sum(dp, TIME_AXIS, keepdims=True) if repeated else dp).astype(skip.dtype)
    return dk, dwide.astype(z.dtype), dshift, dscale.astype(scale.dtype), dbias.astype(bias.dtype), dskip


normalize_and_fire.defvjp(_forward, _backward)
