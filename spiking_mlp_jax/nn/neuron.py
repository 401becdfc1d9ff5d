"""Spiking neurons over all time steps at once: LIF, IF and LIF with a learnable time constant (PLIF).

The equations are in `nn/dynamics.py`: `lif` calls `run`, whose gradient is written out, and `run` calls
`dynamics.forward` or the kernel of `nn/kernels/neuron.py`. The input is the only residual of the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from spiking_mlp_jax.nn import dynamics
from spiking_mlp_jax.nn.dynamics import BACKENDS, MAX_UNROLLED_STEPS, Constants, Mode
from spiking_mlp_jax.nn.kernels.sharding import match_vma, on_one_device
from spiking_mlp_jax.nn.surrogate import SURROGATES, SpikeFunction, sigmoid

if TYPE_CHECKING:
    from jaxtyping import Array, Float

PAPER_SURROGATE = sigmoid(4.0)


def lif(
    x: Float[Array, "T *shape"],
    *,
    tau: float | Float[Array, "..."] = 2.0,
    v_threshold: float | Float[Array, "..."] = 1.0,
    v_reset: float | Float[Array, "..."] | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = True,
    surrogate: SpikeFunction | None = None,
    v_init: Float[Array, "*shape"] | float | None = None,
    time_axis: int = 0,
    time_steps: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "T *shape"], Float[Array, "*shape"]]:
    """Leaky integrate-and-fire neurons.

    For second derivatives use reverse mode twice (`jax.jacrev(jax.grad(...))`): like every `jax.custom_vjp`, this has
    no `jax.jvp`, and so no `jax.hessian`.

    Args:
        x: input current, floating, with T time steps along `time_axis`.
        tau: membrane time constant in steps, at least 1. An array is not checked, and has a gradient of its own shape;
            it broadcasts to the neurons' shape, which is x's without the time axis, e.g. [C] is one tau per channel.
        v_threshold: firing threshold, above `v_reset`. May be an array, as tau; so may `v_reset`.
        v_reset: potential after a spike; None: soft reset, which subtracts the threshold instead.
        decay_input: whether the input is divided by tau, as the leak is.
        detach_reset: stop the gradient through the spike in the reset.
        surrogate: spike function of h - v_threshold; None: the paper's, `surrogate.sigmoid(4.0)`.
        v_init: potential before the first step, e.g. the final potential of an earlier call to continue it;
            None: `v_reset`, or 0 with a soft reset.
        time_axis: axis of x that is time.
        time_steps: T; only needed if x's time axis has length 1 and stands for T equal steps.
        backend: "auto", "xla" or "pallas", as in `ModelConfig.neuron_backend`.

    Returns:
        spikes: exactly 0 or 1, [T, *shape], in x's dtype.

        v: potential after the last step, x's shape without the time axis; at least float32.

    Raises:
        ValueError: tau < 1, v_threshold not above v_reset, an array that does not broadcast to the neurons' shape, no
            time steps or not `time_steps`, x not floating, a surrogate that is not a spike function, or an unknown
            backend.

    Examples:
        With this input above the threshold, a neuron fires every third step.

        >>> spikes, v = lif(jnp.full(7, 1.3))
        >>> spikes.tolist()
        [0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
        >>> round(float(v), 4)
        0.65
    """
    if isinstance(tau, int | float) and not tau >= 1:
        raise ValueError(f"tau must be at least 1 step, got {tau}")
    mode = Mode(True, decay_input, v_reset is not None, detach_reset, surrogate or PAPER_SURROGATE, backend=backend)
    return _checked_run(mode, (tau, v_threshold, v_reset), x, v_init, time_axis, time_steps)


def integrate_and_fire(
    x: Float[Array, "T *shape"],
    *,
    v_threshold: float | Float[Array, "..."] = 1.0,
    v_reset: float | Float[Array, "..."] | None = 0.0,
    detach_reset: bool = True,
    surrogate: SpikeFunction | None = None,
    v_init: Float[Array, "*shape"] | float | None = None,
    time_axis: int = 0,
    time_steps: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "T *shape"], Float[Array, "*shape"]]:
    """Integrate-and-fire neurons, without a leak: h = v + x. Arguments, results and errors as in `lif`.

    Examples:
        >>> integrate_and_fire(jnp.array([0.5, 0.5, 0.5]))[0].tolist()
        [0.0, 1.0, 0.0]
    """
    mode = Mode(False, False, v_reset is not None, detach_reset, surrogate or PAPER_SURROGATE, backend=backend)
    return _checked_run(mode, (1.0, v_threshold, v_reset), x, v_init, time_axis, time_steps)


def plif(
    x: Float[Array, "T *shape"], w: Float[Array, "..."], **lif_arguments
) -> tuple[Float[Array, "T *shape"], Float[Array, "*shape"]]:
    """Parametric LIF neurons: `lif` with 1 / tau = sigmoid(w), where w is learned; w broadcasts as tau does.

    `lif_arguments` are those of `lif` except tau; `plif_weight` gives the w of a tau.

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
        raise ValueError(f"a learned tau must be above 1 step, got {tau}")
    return -math.log(tau - 1)


def _checked_run(mode, constants, x, v_init, time_axis, time_steps):
    x = jnp.asarray(x)
    _, v_threshold, v_reset = constants
    if mode.backend not in BACKENDS:
        raise ValueError(f'backend must be "auto", "xla" or "pallas", got {mode.backend!r}')
    if not callable(mode.surrogate) or mode.surrogate in SURROGATES.values():
        given = f"surrogate.{mode.surrogate.__name__}" if callable(mode.surrogate) else repr(mode.surrogate)
        raise ValueError(f"surrogate must be a spike function, e.g. surrogate.sigmoid(4.0), got {given}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating, got {x.dtype}")
    if not -x.ndim <= time_axis < x.ndim:
        raise ValueError(f"time_axis must be an axis of x, which has shape {x.shape}, got {time_axis}")
    if x.shape[time_axis] < 1:
        raise ValueError(f"x must have at least one time step on axis {time_axis}, got shape {x.shape}")
    if isinstance(v_threshold, int | float) and isinstance(v_reset, int | float) and not v_threshold > v_reset:
        raise ValueError(f"v_threshold must be above v_reset ({v_reset}), got {v_threshold}")
    axis = time_axis % x.ndim
    steps = x.shape[axis] if time_steps is None else time_steps
    if x.shape[axis] not in (1, steps) or steps < 1:
        raise ValueError(f"x must have 1 or time_steps={steps} time steps on axis {time_axis}, got shape {x.shape}")
    dtype = potential_dtype(x.dtype)
    # Python numbers have no gradient; NumPy and JAX values may.
    learned = not all(value is None or type(value) in (int, float) for value in constants)
    mode = dataclasses.replace(mode, learned=learned)
    k: Any = Constants(*(jnp.asarray(0.0 if value is None else value, dtype) for value in constants))
    neurons = x.shape[:axis] + x.shape[axis + 1 :]
    start = {} if v_init is None else {"v_init": jnp.asarray(v_init, dtype)}
    for name, value in {**k._asdict(), **start}.items():
        # One that has more axes, even of length 1, would change the shape of the potential.
        if value.ndim > len(neurons) or any(
            n not in (1, m) for n, m in zip(value.shape[::-1], neurons[::-1], strict=False)
        ):
            raise ValueError(f"{name} must broadcast to the neurons' shape {neurons}, got shape {value.shape}")
    v = _per_neuron(start.get("v_init", k.v_reset), x, axis)
    return run(mode, axis, steps, *match_vma((with_axes(k, len(neurons)), x, v)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def run(mode: Mode, axis: int, steps: int, k: Constants, x: Array, v: Array) -> tuple[Array, Array]:
    """`lif` without checks and defaults.

    Args:
        mode: the equations.
        axis: time axis of x, not negative.
        steps: T; if x's time axis has length 1, x stands for T equal steps.
        k: constants of the equations.
        x: input.
        v: potential before the first step, x's shape without the time axis; its dtype is the potential's.

    Returns:
        (spikes, 0 or 1 in x's dtype; potential after the last step).
    """
    fired, v = forward(mode, axis, k, _all_steps(x, v, axis, steps), v)
    return fired.astype(x.dtype), v


def _run_forward(mode, axis, steps, k, x, v):
    return run(mode, axis, steps, k, x, v), (k, x, v)


def _run_backward(mode, axis, steps, residuals, cotangents):
    k, x, v = residuals
    ds, dv = cotangents
    dx, dv, dk = backward(mode, axis, k, _all_steps(x, v, axis, steps), v, ds.astype(v.dtype), dv)
    if x.shape[axis] != steps:
        dx = jnp.sum(dx, axis, keepdims=True)
    return jax.tree.map(jnp.zeros_like, k) if dk is None else dk, dx.astype(x.dtype), dv


run.defvjp(_run_forward, _run_backward)


def forward(mode: Mode, axis: int, k: Constants, x: Array, v: Array) -> tuple[Array, Array]:
    """`dynamics.forward`, or the kernel that computes the same, by mode.backend."""
    return _program("forward", mode, axis, k, x)(k, x, v)


def backward(
    mode: Mode, axis: int, k: Constants, x: Array, v: Array, ds: Array, dv: Array
) -> tuple[Array, Array, Constants | None]:
    """`dynamics.backward`, or the kernel that computes the same, by mode.backend."""
    return _program("backward", mode, axis, k, x)(k, x, v, ds, dv)


def _program(name: str, mode: Mode, axis: int, k: Constants, x: Array) -> Callable[..., Any]:
    plain = functools.partial(getattr(dynamics, name), mode, axis)
    few = mode.backend == "auto" and x.shape[axis] <= MAX_UNROLLED_STEPS
    shared = all(value.ndim == 0 for value in k)  # the kernels read the constants as scalars
    if mode.backend == "xla" or few or x.dtype == jnp.float64 or not shared:
        return plain
    # Imported here because Pallas is slow to import.
    from spiking_mlp_jax.nn.kernels import neuron as kernels

    def kernel(target, interpret=False):
        if not kernels.fits(x.shape, axis, target):
            return plain
        return functools.partial(getattr(kernels, name), mode, axis, target=target, interpret=interpret)

    branches = {"cuda": kernel("gpu"), "tpu": on_one_device(kernel("tpu"), plain)}
    if mode.backend == "pallas":
        branches["cpu"] = kernel("gpu", interpret=True)
    # The platform is known at lowering, not at tracing: a traced function holds a branch for each.
    chosen = jax.custom_jvp(lambda *inputs: jax.lax.platform_dependent(*inputs, default=plain, **branches))
    # Kernels have no derivative; second derivatives are those of XLA's program.
    chosen.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return chosen


def with_axes(k: Constants, ndim: int) -> Constants:
    """The constants with as many axes as the neurons have, where they are arrays; leading ones have length 1."""
    return Constants(*(x.reshape((1,) * (ndim - x.ndim) + x.shape) if x.ndim else x for x in k))


def rest(k: Constants, x: Array, axis: int) -> Array:
    """The resting potential v_reset of each neuron: x's shape without the time axis."""
    return _per_neuron(k.v_reset, x, axis)


def potential_dtype(dtype) -> jnp.dtype:
    """The dtype of potentials for inputs of the given one: at least float32."""
    # Only float64 is wider. `jnp.promote_types` would follow the user's jax_numpy_dtype_promotion, and refuse bfloat16.
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _per_neuron(v, x, axis):
    return jnp.broadcast_to(v, x.shape[:axis] + x.shape[axis + 1 :])


def _all_steps(x, v, axis, steps):
    return jnp.broadcast_to(x, (*x.shape[:axis], steps, *x.shape[axis + 1 :])).astype(v.dtype)
