"""Equations of a neuron and their gradient: one time step, and all of them.

One step, with input x, potential v before the step and h after charging:

    charge   h = v + (x - (v - v_reset)) / tau        decay_input=True
             h = v - (v - v_reset) / tau + x          decay_input=False
             h = v + x                                not leaky
    fire     s = 1 if h >= v_threshold else 0
    reset    v = h (1 - s) + v_reset s                hard reset
             v = h - v_threshold s                    soft reset (v_reset is 0 in the charge)

The gradient is written out so that x is its only residual: the backward pass recomputes h. XLA's program (`forward`,
`backward`) and the Pallas kernel (`nn/kernels/neuron.py`) share the step; `nn/neuron.py` chooses between them.

References: Gerstner et al., "Neuronal dynamics", chapter 1; the discrete form is SpikingJelly's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from spiking_mlp_jax.nn.surrogate import SpikeFunction

if TYPE_CHECKING:
    from jaxtyping import Array

# Longer loops are scanned instead of unrolled: a little slower, but much faster to compile.
MAX_UNROLLED_STEPS = 8

BACKENDS = ("auto", "xla", "pallas")


@dataclasses.dataclass(frozen=True)
class Mode:
    """The equations a neuron follows. Hashable: a static argument of compiled functions.

    Attributes:
        leaky: False for IF neurons.
        decay_input: whether the input is divided by tau, as the leak is.
        hard_reset: True: a spike resets the potential to v_reset; False: it subtracts the threshold.
        detach_reset: stop the gradient through the spike in the reset.
        surrogate: spike function of h - v_threshold.
        learned: whether the constants have gradients.
        backend: one of BACKENDS, see `ModelConfig.neuron_backend`; the equations do not depend on it.
    """

    leaky: bool
    decay_input: bool
    hard_reset: bool
    detach_reset: bool
    surrogate: SpikeFunction
    learned: bool = False
    backend: str = "xla"


class Constants(NamedTuple):
    """Time constant in steps, threshold, potential after a spike.

    In the potential's dtype; scalars, or arrays that broadcast to the neurons' shape (x's without the time axis).
    """

    tau: Array
    v_threshold: Array
    v_reset: Array


def step(mode: Mode, k: Constants, v: Array, x: Array) -> tuple[Array, tuple[Array, Array]]:
    """One time step, elementwise. Returns the potential after it, and (fired, bool; h)."""
    if not mode.leaky:
        h = v + x
    elif mode.decay_input:
        h = v + (x - (v - k.v_reset)) / k.tau
    else:
        h = v - (v - k.v_reset) / k.tau + x
    fired = h - k.v_threshold >= 0
    return jnp.where(fired, k.v_reset if mode.hard_reset else h - k.v_threshold, h), (fired, h)


def step_backward(
    mode: Mode, k: Constants, dv: Array, ds: Array, v: Array, x: Array, fired: Array, h: Array
) -> tuple[Array, tuple[Array, Constants | None]]:
    """Gradient of one time step, elementwise.

    Args:
        mode, k: equations and constants.
        dv, ds: cotangents of the potential after the step and of the spikes.
        v, x: potential before the step, and input.
        fired, h: as returned by `step`.

    Returns:
        cotangent of v; and (cotangent of x, each neuron's contribution to the cotangents of k, or None).
    """
    if not mode.detach_reset:
        ds = ds + dv * (k.v_reset - h if mode.hard_reset else -k.v_threshold)
    (du,) = jax.vjp(mode.surrogate, h - k.v_threshold)[1](ds)
    silent = jnp.where(fired, 0, dv)  # where the reset is the identity
    dh = du + (silent if mode.hard_reset else dv)
    decayed = mode.leaky and mode.decay_input
    dx = dh / k.tau if decayed else dh
    dk = None
    if mode.learned:
        leak = (v - k.v_reset - (x if decayed else 0)) / (k.tau * k.tau) if mode.leaky else 0
        dk = Constants(
            tau=dh * leak,
            v_threshold=-du if mode.hard_reset else silent - dv - du,
            v_reset=(dh / k.tau if mode.leaky else 0) + (dv - silent if mode.hard_reset else 0) + jnp.zeros_like(v),
        )
    return dh * (1 - 1 / k.tau) if mode.leaky else dh, (dx, dk)


def forward(mode: Mode, axis: int, k: Constants, x: Array, v: Array) -> tuple[Array, Array]:
    """All time steps.

    Args:
        mode: the equations.
        axis: time axis of x, not negative.
        k: constants of the equations.
        x: input, in the potential's dtype.
        v: potential before the first step, x's shape without the time axis.

    Returns:
        fired, bool, x's shape; and the potential after the last step.
    """
    v, outputs = _loop(functools.partial(step, mode, k), v, _split(x, axis))
    return _stack([fired for fired, _ in outputs] if isinstance(outputs, list) else outputs[0], axis), v


def charged(mode: Mode, axis: int, k: Constants, x: Array, v: Array) -> Array:
    """The potential h of every step, x's shape; neurons fire where h - v_threshold >= 0. Arguments as in `forward`."""
    _, outputs = _loop(functools.partial(step, mode, k), v, _split(x, axis))
    return _stack([h for _, h in outputs] if isinstance(outputs, list) else outputs[1], axis)


def backward(
    mode: Mode, axis: int, k: Constants, x: Array, v: Array, ds: Array, dv: Array
) -> tuple[Array, Array, Constants | None]:
    """Gradient of `forward`, from its arguments alone.

    Args:
        mode, axis, k, x, v: as in `forward`.
        ds: cotangent of the spikes, x's shape and dtype.
        dv: cotangent of the last potential.

    Returns:
        cotangents of x and v; and of k, None unless mode.learned.
    """

    def recompute(v, x):
        after, (fired, h) = step(mode, k, v, x)
        return after, (v, x, fired, h)

    def body(dv, inputs):
        ds, residuals = inputs
        return step_backward(mode, k, dv, ds, *residuals)

    _, residuals = _loop(recompute, v, _split(x, axis))
    cotangents = _split(ds, axis)
    if isinstance(cotangents, list):
        dv, outputs = _loop(body, dv, list(zip(cotangents, residuals, strict=True)), reverse=True)
        dx, dk = (list(parts) for parts in zip(*outputs, strict=True))
    else:
        dv, (dx, dk) = _loop(body, dv, (cotangents, residuals), reverse=True)
        dk = [dk]
    if mode.learned:
        steps = [jax.tree.map(unbroadcast, parts, k) for parts in dk]
        return _stack(dx, axis), dv, jax.tree.map(lambda *parts: sum(parts), *steps)
    return _stack(dx, axis), dv, None


def unbroadcast(x: Array, like: Array) -> Array:
    """x, summed over the axes along which `like` broadcasts to it: the transpose of broadcasting."""
    lengths = (1,) * (x.ndim - like.ndim) + like.shape
    return jnp.sum(x, [i for i, n in enumerate(lengths) if n == 1]).reshape(like.shape)


def _split(x: Array, axis: int) -> list[Array] | Array:
    """One array for each step if there are few; otherwise one array with time leading."""
    if x.shape[axis] > MAX_UNROLLED_STEPS:
        return jnp.moveaxis(x, axis, 0)
    return [jax.lax.squeeze(part, (axis,)) for part in jax.lax.split(x, (1,) * x.shape[axis], axis)]


def _stack(parts: list[Array] | Array, axis: int) -> Array:
    return jnp.stack(parts, axis) if isinstance(parts, list) else jnp.moveaxis(parts, 0, axis)


def _loop(body, carry, xs: Any, reverse: bool = False):
    """`jax.lax.scan`; unrolled if xs is a list, and then the outputs are a list too."""
    if not isinstance(xs, list):
        return jax.lax.scan(body, carry, xs, reverse=reverse)
    outputs = []
    for x in reversed(xs) if reverse else xs:
        carry, output = body(carry, x)
        outputs.append(output)
    return carry, outputs[::-1] if reverse else outputs
