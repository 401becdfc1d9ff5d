"""Which program runs a neuron's steps: XLA's, or the kernel of `nn/kernels/neuron.py`.

The platform is known when a program is lowered and not when it is traced, so a traced function holds both and each
platform takes its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from spiking_mlp_jax.nn import dynamics
from spiking_mlp_jax.nn.dynamics import MAX_UNROLLED_STEPS, Constants, Mode

if TYPE_CHECKING:
    from jaxtyping import Array


def forward(mode: Mode, k: Constants, x: Array, v: Array, axis: int) -> tuple[Array, Array]:
    """`dynamics.forward`, by mode.backend."""
    plain = functools.partial(dynamics.forward, mode, axis=axis)
    return _choose(mode, x, axis, "forward", plain)(k, x, v)


def backward(
    mode: Mode, k: Constants, x: Array, v: Array, axis: int, ds: Array, dv: Array
) -> tuple[Array, Array, Constants | None]:
    """`dynamics.backward`, by mode.backend."""

    def plain(k, x, v, ds, dv):
        return dynamics.backward(mode, k, x, v, axis, ds, dv)

    chosen = _choose(mode, x, axis, "backward", plain)
    if chosen is plain:
        return plain(k, x, v, ds, dv)
    # A kernel has no derivative, so second derivatives are the plain program's.
    differentiable = jax.custom_jvp(chosen)
    differentiable.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return differentiable(k, x, v, ds, dv)


def _choose(mode: Mode, x: Array, axis: int, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The plain function itself, or one that takes the kernel where the platform has it."""
    few = mode.backend == "auto" and x.shape[axis] <= MAX_UNROLLED_STEPS
    if mode.backend == "xla" or few or x.dtype == jnp.float64:
        return plain
    # Imported where it is needed: Pallas takes a while to load.
    from spiking_mlp_jax.nn.kernels import neuron as pallas_neuron
    from spiking_mlp_jax.nn.kernels import sharding as distribute

    def kernel(target, interpret=False):
        if not pallas_neuron.fits(x.shape, axis, target):
            return plain
        function = getattr(pallas_neuron, name)
        return lambda k, x, v, *ds: function(mode, k, x, v, axis, *ds, target=target, interpret=interpret)

    branches = {"cuda": kernel("gpu"), "tpu": distribute.alone(kernel("tpu"), plain)}
    if mode.backend == "pallas":
        branches["cpu"] = kernel("gpu", interpret=True)
    return lambda *inputs: jax.lax.platform_dependent(*inputs, default=plain, **branches)
