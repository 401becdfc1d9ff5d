"""Spiking neurons over all time steps at once: LIF, IF and LIF with a learnable time constant (PLIF).

One step, with input x, potential v before the step and h after charging:

    charge   h = v + (x - (v - v_reset)) / tau        decay_input=True
             h = v - (v - v_reset) / tau + x          decay_input=False
    fire     s = 1 if h >= v_threshold else 0
    reset    v = h (1 - s) + v_reset s                hard reset
             v = h - v_threshold s                    soft reset (v_reset=None; v_reset is 0 in the charge)

References: Gerstner et al., "Neuronal dynamics", chapter 1; the discrete form is SpikingJelly's.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spiking_mlp_jax.surrogate import SpikeFunction, sigmoid

# Above this many steps the loop is compiled once instead of being unrolled: compile time over a little speed.
MAX_UNROLLED_STEPS = 8
PAPER_SURROGATE = sigmoid(4.0)


def lif(
    x: Float[Array, "T *shape"],
    *,
    tau: float | Float[Array, ""] = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = True,
    surrogate: SpikeFunction = PAPER_SURROGATE,
    v_init: Float[Array, "*shape"] | float | None = None,
    time_axis: int = 0,
) -> tuple[Float[Array, "T *shape"], Float[Array, "*shape"]]:
    """Leaky integrate-and-fire neurons.

    Args:
        x: input current, floating, with T time steps along `time_axis`.
        tau: membrane time constant in steps, at least 1. May be a traced scalar, then it is not checked.
        v_threshold: firing threshold, above `v_reset`. May be traced too.
        v_reset: potential after a spike; None is a soft reset, which subtracts the threshold instead.
        decay_input: whether the input leaks as the potential does (divided by tau).
        detach_reset: whether no gradient flows through the spike in the reset.
        surrogate: spike function of h - v_threshold.
        v_init: potential before the first step, the final potential of an earlier call to go on from it;
            when None it is `v_reset`, or 0 with a soft reset.
        time_axis: where time is in x.

    Returns:
        spikes: exactly 0 or 1, x's shape and dtype.
        v: potential after the last step, x's shape without the time axis.

    Raises:
        ValueError: tau < 1, a threshold that is not above v_reset, no time steps, or x not floating.
    """
    if isinstance(tau, int | float) and not tau >= 1:
        raise ValueError(f"tau must be at least 1 step, but it is {tau}")
    rest = 0.0 if v_reset is None else _in_dtype_of(v_reset, x)
    tau = _in_dtype_of(tau, x)

    def charge(v, x):
        if decay_input:
            return v + (x - (v - rest)) / tau
        return v - (v - rest) / tau + x

    return _fire_over_time(x, charge, v_threshold, v_reset, detach_reset, surrogate, v_init, time_axis)


def integrate_and_fire(
    x: Float[Array, "T *shape"],
    *,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    detach_reset: bool = True,
    surrogate: SpikeFunction = PAPER_SURROGATE,
    v_init: Float[Array, "*shape"] | float | None = None,
    time_axis: int = 0,
) -> tuple[Float[Array, "T *shape"], Float[Array, "*shape"]]:
    """IF neurons, which do not leak: h = v + x. Arguments, results and errors as in `lif`."""
    return _fire_over_time(x, lambda v, x: v + x, v_threshold, v_reset, detach_reset, surrogate, v_init, time_axis)


def plif(
    x: Float[Array, "T *shape"], w: Float[Array, ""], **lif_arguments
) -> tuple[Float[Array, "T *shape"], Float[Array, "*shape"]]:
    """Parametric LIF: as `lif`, with 1 / tau = sigmoid(w) learned through the scalar w.

    `lif_arguments` are those of `lif` but tau. See `plif_weight` for the w that stands for a tau.

    References: Fang et al., "Incorporating learnable membrane time constant ...", ICCV 2021.
    """
    return lif(x, tau=1 / jax.nn.sigmoid(w).astype(x.dtype), **lif_arguments)


def plif_weight(tau: float) -> float:
    """The w with 1 / sigmoid(w) = tau.

    Raises:
        ValueError: tau is not above 1 (w would be infinite).
    """
    if not tau > 1:
        raise ValueError(f"a learnable tau starts above 1 step, but it is {tau}")
    return -math.log(tau - 1)


def _fire_over_time(x, charge, v_threshold, v_reset, detach_reset, surrogate, v_init, time_axis):
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"a neuron's input must be floating, but it is {x.dtype}")
    if x.ndim == 0 or x.shape[time_axis] < 1:
        raise ValueError(f"a neuron needs at least one time step on axis {time_axis}, but x is {x.shape}")
    if isinstance(v_threshold, int | float) and isinstance(v_reset, int | float) and not v_threshold > v_reset:
        raise ValueError(f"v_threshold ({v_threshold}) must be above v_reset ({v_reset})")
    steps = x.shape[time_axis]
    v_threshold = _in_dtype_of(v_threshold, x)
    v_reset = None if v_reset is None else _in_dtype_of(v_reset, x)
    v = jnp.full(x.shape[:time_axis] + x.shape[time_axis % x.ndim + 1 :], 0.0 if v_reset is None else v_reset, x.dtype)
    if v_init is not None:
        v = jnp.broadcast_to(jnp.asarray(v_init, x.dtype), v.shape)

    def step(v, x):
        h = charge(v, x)
        s = surrogate(h - v_threshold)
        s_reset = jax.lax.stop_gradient(s) if detach_reset else s
        if v_reset is None:
            return h - s_reset * v_threshold, s
        return h * (1 - s_reset) + s_reset * v_reset, s

    if steps > MAX_UNROLLED_STEPS:
        v, spikes = jax.lax.scan(step, v, jnp.moveaxis(x, time_axis, 0))
        return jnp.moveaxis(spikes, 0, time_axis), v
    # Split rather than indexed: its gradient is one concatenation, not a padded sum for each step.
    spikes = []
    for x_t in jax.lax.split(x, (1,) * steps, time_axis % x.ndim):
        v, s = step(v, jax.lax.squeeze(x_t, (time_axis % x.ndim,)))
        spikes.append(s)
    return jnp.stack(spikes, time_axis), v


def _in_dtype_of(value, x):
    # NumPy and JAX scalars, unlike Python's, would turn the potential into their own dtype.
    return (
        value if isinstance(value, int | float) and not isinstance(value, np.generic) else jnp.asarray(value, x.dtype)
    )
