"""Spiking neurons over all time steps at once: LIF, IF and LIF with a learnable time constant (PLIF).

The equations are in `nn/dynamics.py`. Only a neuron's input is kept for the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from spiking_mlp_jax.nn import dispatch
from spiking_mlp_jax.nn.dynamics import BACKENDS, Constants, Mode
from spiking_mlp_jax.nn.kernels.sharding import vary_alike
from spiking_mlp_jax.nn.surrogate import SpikeFunction, sigmoid

if TYPE_CHECKING:
    from jaxtyping import Array, Float

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
    time_steps: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "T *shape"], Float[Array, "*shape"]]:
    """Leaky integrate-and-fire neurons.

    Second derivatives are those of reverse mode twice (`jax.jacrev(jax.grad(...))`): `jax.jvp`, and so `jax.hessian`,
    raise JAX's TypeError for functions with a gradient of their own.

    Args:
        x: input current, floating, with T time steps along `time_axis`.
        tau: membrane time constant in steps, at least 1. May be an array or traced scalar, then it is not checked
            and has a gradient.
        v_threshold: firing threshold, above `v_reset`. Likewise.
        v_reset: potential after a spike; None is a soft reset, which subtracts the threshold instead.
        decay_input: whether the input leaks as the potential does (divided by tau).
        detach_reset: whether no gradient flows through the spike in the reset.
        surrogate: spike function of h - v_threshold.
        v_init: potential before the first step, the final potential of an earlier call to go on from it;
            when None it is `v_reset`, or 0 with a soft reset.
        time_axis: where time is in x.
        time_steps: T; only needed when x's time axis has length 1 and stands for T equal steps.
        backend: "auto", "xla" or "pallas", as in `ModelConfig.neuron_backend`.

    Returns:
        spikes: exactly 0 or 1, [T, *shape] in x's dtype.

        v: potential after the last step, x's shape without the time axis. Potentials are float32 where x is narrower.

    Raises:
        ValueError: tau < 1, a threshold that is not above v_reset, no time steps or another number than
            `time_steps`, x not floating, or an unknown backend.

    Examples:
        An input above the threshold fires at every third step, and then starts anew.

        >>> spikes, v = lif(jnp.full(7, 1.3))
        >>> spikes.tolist()
        [0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
        >>> round(float(v), 4)
        0.65
    """
    if isinstance(tau, int | float) and not tau >= 1:
        raise ValueError(f"tau must be at least 1 step, but it is {tau}")
    mode = Mode(True, decay_input, v_reset is not None, detach_reset, surrogate, backend=backend)
    return _checked_run(mode, (tau, v_threshold, v_reset), x, v_init, time_axis, time_steps)


def integrate_and_fire(
    x: Float[Array, "T *shape"],
    *,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    detach_reset: bool = True,
    surrogate: SpikeFunction = PAPER_SURROGATE,
    v_init: Float[Array, "*shape"] | float | None = None,
    time_axis: int = 0,
    time_steps: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "T *shape"], Float[Array, "*shape"]]:
    """IF neurons, which do not leak: h = v + x. Arguments, results and errors as in `lif`.

    Examples:
        >>> integrate_and_fire(jnp.array([0.5, 0.5, 0.5]))[0].tolist()
        [0.0, 1.0, 0.0]
    """
    mode = Mode(False, False, v_reset is not None, detach_reset, surrogate, backend=backend)
    return _checked_run(mode, (1.0, v_threshold, v_reset), x, v_init, time_axis, time_steps)


def plif(
    x: Float[Array, "T *shape"], w: Float[Array, ""], **lif_arguments
) -> tuple[Float[Array, "T *shape"], Float[Array, "*shape"]]:
    """Parametric LIF: as `lif`, with 1 / tau = sigmoid(w) learned through the scalar w.

    `lif_arguments` are those of `lif` but tau. See `plif_weight` for the w that stands for a tau.

    References: Fang et al., "Incorporating learnable membrane time constant ...", ICCV 2021.
    """
    return lif(x, tau=1 / jax.nn.sigmoid(w), **lif_arguments)


def plif_weight(tau: float) -> float:
    """The w with 1 / sigmoid(w) = tau.

    Raises:
        ValueError: tau is not above 1 (w would be infinite).

    Examples:
        >>> round(plif_weight(3.0), 4)
        -0.6931
    """
    if not tau > 1:
        raise ValueError(f"a learnable tau starts above 1 step, but it is {tau}")
    return -math.log(tau - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def run(mode: Mode, k: Constants, x: Array, v: Array, axis: int, steps: int) -> tuple[Array, Array]:
    """`lif` without its checks and defaults.

    Args:
        mode: the equations.
        k: their constants.
        x: input with time on `axis`; of length 1 there it stands for `steps` equal ones.
        v: potential before the first step, x's shape without the time axis; its dtype is the potential's.
        axis: not negative.
        steps: T.

    Returns:
        (spikes, 0 or 1 in x's dtype; potential after the last step).
    """
    fired, v = dispatch.forward(mode, k, _wide(x, v, axis, steps), v, axis)
    return fired.astype(x.dtype), v


def _run_forward(mode, k, x, v, axis, steps):
    return run(mode, k, x, v, axis, steps), (k, x, v)


def _run_backward(mode, axis, steps, kept, cotangents):
    k, x, v = kept
    ds, dv = cotangents
    dx, dv, dk = dispatch.backward(mode, k, _wide(x, v, axis, steps), v, axis, ds.astype(v.dtype), dv)
    if x.shape[axis] != steps:
        dx = jnp.sum(dx, axis, keepdims=True)
    return jax.tree.map(jnp.zeros_like, k) if dk is None else dk, dx.astype(x.dtype), dv


run.defvjp(_run_forward, _run_backward)


def potential_dtype(dtype) -> jnp.dtype:
    """In which dtype potentials are, for inputs of the given one: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def _wide(x, v, axis, steps):
    return jnp.broadcast_to(x, (*x.shape[:axis], steps, *x.shape[axis + 1 :])).astype(v.dtype)


def _checked_run(mode, constants, x, v_init, time_axis, time_steps):
    x = jnp.asarray(x)
    _, v_threshold, v_reset = constants
    if mode.backend not in BACKENDS:
        raise ValueError(f'a neuron\'s backend is "auto", "xla" or "pallas", but it is {mode.backend!r}')
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"a neuron's input must be floating, but it is {x.dtype}")
    if x.ndim == 0 or x.shape[time_axis] < 1:
        raise ValueError(f"a neuron needs at least one time step on axis {time_axis}, but x is {x.shape}")
    if isinstance(v_threshold, int | float) and isinstance(v_reset, int | float) and not v_threshold > v_reset:
        raise ValueError(f"v_threshold ({v_threshold}) must be above v_reset ({v_reset})")
    axis = time_axis % x.ndim
    steps = x.shape[axis] if time_steps is None else time_steps
    if x.shape[axis] not in (1, steps):
        raise ValueError(f"x must have 1 or {steps} time steps on axis {time_axis}, but it is {x.shape}")
    dtype = potential_dtype(x.dtype)
    # Python's numbers have no gradient; NumPy's and JAX's may be anything.
    learned = not all(value is None or type(value) in (int, float) for value in constants)
    mode = dataclasses.replace(mode, learned=learned)
    k = Constants(*(jnp.asarray(0.0 if value is None else value, dtype) for value in constants))
    v = jnp.asarray(k.v_reset if v_init is None else v_init, dtype)
    k, x, v = vary_alike((k, x, jnp.broadcast_to(v, x.shape[:axis] + x.shape[axis + 1 :])))
    return run(mode, k, x, v, axis, steps)
