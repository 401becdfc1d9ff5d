"""What a neuron does in one time step and what its gradient is, and both over all steps.

One step, with input x, potential v before the step and h after charging:

    charge   h = v + (x - (v - v_reset)) / tau        decay_input=True
             h = v - (v - v_reset) / tau + x          decay_input=False
             h = v + x                                not leaky
    fire     s = 1 if h >= v_threshold else 0
    reset    v = h (1 - s) + v_reset s                hard reset
             v = h - v_threshold s                    soft reset (v_reset is 0 in the charge)

The gradient is written out, so that nothing but x has to be kept for it: h is computed again. The network's plain
path (`forward`, `backward`) and its kernel (`nn/kernels/neuron.py`) share these steps; `nn/dispatch.py` chooses.

References: Gerstner et al., "Neuronal dynamics", chapter 1; the discrete form is SpikingJelly's.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from spiking_mlp_jax.nn.surrogate import SpikeFunction

if TYPE_CHECKING:
    from jaxtyping import Array

# Above this many steps the loop is compiled once instead of being unrolled: compile time over a little speed.
MAX_UNROLLED_STEPS = 8

BACKENDS = ("auto", "xla", "pallas")


@dataclasses.dataclass(frozen=True)
class Mode:
    """Which of the equations a neuron follows; hashable, because a compiled function depends on it.

    Attributes:
        leaky: False for IF neurons.
        decay_input: whether the input leaks as the potential does.
        hard_reset: whether a spike resets the potential to v_reset or subtracts the threshold.
        detach_reset: whether no gradient flows through the spike in the reset.
        surrogate: spike function of h - v_threshold.
        learned: whether the constants take part in the gradient.
        backend: one of BACKENDS, see `ModelConfig.neuron_backend`; read by `nn/dispatch.py` only.
    """

    leaky: bool
    decay_input: bool
    hard_reset: bool
    detach_reset: bool
    surrogate: SpikeFunction
    learned: bool = False
    backend: str = "xla"


class Constants(NamedTuple):
    """Scalars of the potential's dtype: time constant in steps, threshold, potential after a spike."""

    tau: Array
    v_threshold: Array
    v_reset: Array


def step(mode: Mode, k: Constants, v: Array, x: Array) -> tuple[Array, tuple[Array, Array]]:
    """One time step, elementwise: the potential after it, and (whether each neuron fired, h)."""
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
    """The gradient of one time step, elementwise.

    Args:
        mode: the equations.
        k: their constants.
        dv: cotangent of the potential after the step.
        ds: cotangent of the spikes.
        v: potential before the step.
        x: input.
        fired: whether each neuron fired.
        h: charged potential.

    Returns:
        cotangent of v; and (cotangent of x, each neuron's share of the constants' cotangents or None).
    """
    if not mode.detach_reset:
        ds = ds + dv * (k.v_reset - h if mode.hard_reset else -k.v_threshold)
    (du,) = jax.vjp(mode.surrogate, h - k.v_threshold)[1](ds)
    kept = jnp.where(fired, 0, dv)  # what went through the reset where it was the identity
    dh = du + (kept if mode.hard_reset else dv)
    decayed = mode.leaky and mode.decay_input
    dx = dh / k.tau if decayed else dh
    dk = None
    if mode.learned:
        leak = (v - k.v_reset - (x if decayed else 0)) / (k.tau * k.tau) if mode.leaky else 0
        dk = Constants(
            tau=dh * leak,
            v_threshold=-du if mode.hard_reset else kept - dv - du,
            v_reset=(dh / k.tau if mode.leaky else 0) + (dv - kept if mode.hard_reset else 0) + jnp.zeros_like(v),
        )
    return dh * (1 - 1 / k.tau) if mode.leaky else dh, (dx, dk)


def forward(mode: Mode, k: Constants, x: Array, v: Array, axis: int) -> tuple[Array, Array]:
    """All time steps.

    Args:
        mode: the equations.
        k: their constants.
        x: input, with time on `axis`, of the potential's dtype.
        v: potential before the first step, x's shape without the time axis.
        axis: not negative.

    Returns:
        whether each neuron fired, bool of x's shape; and the potential after the last step.
    """
    v, seen = _loop(lambda v, x: step(mode, k, v, x), v, _steps(x, axis))
    return _join(_each(lambda y: y[0], seen), axis), v


def charged(mode: Mode, k: Constants, x: Array, v: Array, axis: int) -> Array:
    """The potential h of every step before it fires, x's shape: a neuron fires where h - v_threshold >= 0.

    Arguments as for `forward`, which takes the same steps.
    """
    _, seen = _loop(lambda v, x: step(mode, k, v, x), v, _steps(x, axis))
    return _join(_each(lambda y: y[1], seen), axis)


def backward(
    mode: Mode, k: Constants, x: Array, v: Array, axis: int, ds: Array, dv: Array
) -> tuple[Array, Array, Constants | None]:
    """The gradient of `forward`, from its arguments alone.

    Args:
        mode, k, x, v, axis: as they went into `forward`.
        ds: cotangent of the spikes, x's shape and dtype.
        dv: cotangent of the last potential.

    Returns:
        cotangents of x and v; and those of the constants, None unless mode.learned.
    """

    def again(v, x):
        after, (fired, h) = step(mode, k, v, x)
        return after, (v, x, fired, h)

    _, seen = _loop(again, v, _steps(x, axis))

    def back(dv, inputs):
        ds, seen = inputs
        return step_backward(mode, k, dv, ds, *seen)

    cotangents = _steps(ds, axis)
    inputs = list(zip(cotangents, seen, strict=True)) if isinstance(cotangents, list) else (cotangents, seen)
    dv, outputs = _loop(back, dv, inputs, reverse=True)
    dk = None
    if mode.learned:
        shares = _each(lambda y: y[1], outputs)
        sums = [jax.tree.map(jnp.sum, share) for share in (shares if isinstance(shares, list) else [shares])]
        dk = jax.tree.map(lambda *parts: sum(parts), *sums)
    return _join(_each(lambda y: y[0], outputs), axis), dv, dk


def _steps(x: Array, axis: int) -> list[Array] | Array:
    """One array a step for few steps, else one array with time leading."""
    if x.shape[axis] > MAX_UNROLLED_STEPS:
        return jnp.moveaxis(x, axis, 0)
    return [jax.lax.squeeze(part, (axis,)) for part in jax.lax.split(x, (1,) * x.shape[axis], axis)]


def _loop(body, carry, xs: Any, reverse: bool = False):
    """`jax.lax.scan`, written out when xs is a list, which the outputs then are too."""
    if not isinstance(xs, list):
        return jax.lax.scan(body, carry, xs, reverse=reverse)
    outputs = []
    for x in reversed(xs) if reverse else xs:
        carry, output = body(carry, x)
        outputs.append(output)
    return carry, outputs[::-1] if reverse else outputs


def _each(f, outputs):
    return [f(output) for output in outputs] if isinstance(outputs, list) else f(outputs)


def _join(outputs: list[Array] | Array, axis: int) -> Array:
    return jnp.stack(outputs, axis) if isinstance(outputs, list) else jnp.moveaxis(outputs, 0, axis)
