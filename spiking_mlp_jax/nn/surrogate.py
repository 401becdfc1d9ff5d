"""Spike functions: a Heaviside step forward, a smooth surrogate of its derivative backward.

Each surrogate is a function of its sharpness `alpha` that returns a spike function `u -> spikes`, where
u = potential - threshold. All integrate to one over u but `dspike`, whose family is normalized on [-1/2, 1/2].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Elementwise: u to spikes, any shape, floating.
SpikeFunction = Callable[[jax.Array], jax.Array]


def spike_function(derivative: Callable[[jax.Array], jax.Array]) -> SpikeFunction:
    """Spike function with a surrogate derivative.

    Args:
        derivative: elementwise ds/du, the same shape and dtype as u.

    Returns:
        A function of u (any shape, floating) that returns exactly 1 where u >= 0 and 0 elsewhere, in u's dtype,
        and whose gradient is the cotangent times `derivative(u)`. NaN does not spike.

    References:
        Neftci, Mostafa, Zenke, "Surrogate gradient learning in spiking neural networks", 2019.

    Examples:
        >>> spike = spike_function(lambda u: jnp.maximum(0, 1 - jnp.abs(u)))
        >>> spike(jnp.array([-0.5, 0.0, 0.5])).tolist()
        [0.0, 1.0, 1.0]
        >>> jax.vmap(jax.grad(spike))(jnp.array([-0.5, 0.0, 2.0])).tolist()
        [0.5, 1.0, 0.0]
    """

    @jax.custom_vjp
    def spike(u):
        u = jnp.asarray(u)
        return (u >= 0).astype(u.dtype)

    def forward(u):
        return spike(u), jnp.asarray(u)

    spike.defvjp(forward, lambda u, cotangent: (cotangent * derivative(u),))
    return spike


def _check_alpha(alpha: float) -> float:
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a positive number, got {alpha}")
    return float(alpha)


def sigmoid(alpha: float = 4.0) -> SpikeFunction:
    """Derivative of the logistic function: alpha * s(alpha u) * (1 - s(alpha u)). The paper's choice, alpha 4.

    Examples:
        >>> float(jax.grad(sigmoid(4.0))(0.0))
        1.0
    """
    alpha = _check_alpha(alpha)

    def derivative(u):
        s = jax.nn.sigmoid(alpha * u)
        return alpha * s * (1 - s)

    return spike_function(derivative)


def atan(alpha: float = 2.0) -> SpikeFunction:
    """Derivative of atan(pi/2 alpha u) / pi + 1/2, which is alpha/2 / (1 + (pi/2 alpha u)^2).

    References: Fang et al., "Incorporating learnable membrane time constant ...", ICCV 2021.
    """
    alpha = _check_alpha(alpha)
    slope = math.pi / 2 * alpha

    def derivative(u):
        # Clipped where the square would overflow: there infinities would make the second derivative NaN.
        largest = float(jnp.finfo(u.dtype).max)
        bound = min(0.9 * math.sqrt(largest) / slope, largest)
        return alpha / 2 / (1 + (slope * jnp.clip(u, -bound, bound)) ** 2)

    return spike_function(derivative)


def triangle(alpha: float = 1.0) -> SpikeFunction:
    """Triangle of height alpha and base 2 / alpha: alpha * max(0, 1 - alpha |u|).

    References: Bellec et al., "Long short-term memory and learning-to-learn in networks of spiking neurons", 2018.
    """
    alpha = _check_alpha(alpha)
    return spike_function(lambda u: alpha * jnp.maximum(0, 1 - alpha * jnp.abs(u)))


def rectangle(alpha: float = 1.0) -> SpikeFunction:
    """Rectangle of height alpha and width 1 / alpha, centred on the threshold; its edges count as inside.

    References: Wu et al., "Spatio-temporal backpropagation for training high-performance SNNs", 2018.
    """
    alpha = _check_alpha(alpha)
    return spike_function(lambda u: alpha * (jnp.abs(u) <= 0.5 / alpha).astype(u.dtype))


def dspike(alpha: float = 2.0) -> SpikeFunction:
    """DSpike family: alpha / (2 tanh(alpha/2)) / cosh(alpha u)^2 for |u| <= 1/2 and 0 outside.

    A small alpha is nearly the straight-through estimator on that window, a large one nearly the step itself.

    References: Li et al., "Differentiable spike: rethinking gradient-descent for training SNNs", NeurIPS 2021.
    """
    alpha = _check_alpha(alpha)
    height = alpha / (2 * math.tanh(alpha / 2))

    def derivative(u):
        inside = jnp.abs(u) <= 0.5
        # 1 / cosh(x)^2 is 4 e / (1 + e)^2 with e = exp(-2 |x|), which cannot overflow. Kernels have no cosh.
        e = jnp.exp(-2 * alpha * jnp.minimum(jnp.abs(u), 0.5))
        return jnp.where(inside, 4 * height * e / (1 + e) ** 2, 0).astype(u.dtype)

    return spike_function(derivative)


SURROGATES: dict[str, Callable[[float], SpikeFunction]] = {
    "sigmoid": sigmoid,
    "atan": atan,
    "triangle": triangle,
    "rectangle": rectangle,
    "dspike": dspike,
}
