"""Quantisation-aware training: with the weights that an integer network would have.

In every step the kernels are rounded, and the gradient passes straight through to the kernels themselves. Deployment
folds each norm into the kernel before it rounds (`deploy.fold`), so the grid is that of the folded kernel: for every
output a power of two, times the norm's running factor, through which no gradient flows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.nn.norm import EPSILON
from spiking_mlp_jax.train.config import Config

# The end of a kernel's path, the end of its norm's in its place, and the kernel's axis that the norm's features are.
_NORMS = (
    (("encode", "conv"), ("encode", "norm"), -1),
    (("encode", "cells", "*"), ("encode", "cell_norms", "*"), -1),
    (("encode", "edges", "*"), ("encode", "edge_norms", "*"), -1),
    (("token", "height"), ("token", "height", "norm"), -2),
    (("token", "width"), ("token", "width", "norm"), -2),
    (("token", "fuse"), ("token", "norm"), -1),
    (("channel", "expand"), ("channel", "hidden_norm"), -1),
    (("channel", "project"), ("channel", "norm"), -1),
    (("head",), ("norm",), -2),
)


def quantize_weights(params: Any, stats: Any, config: ModelConfig, bits: int) -> Any:
    """Rounds every kernel as an integer network of this many bits would; biases and norms are unchanged.

    The grid does not include a time step's factors (TEBN), nor norms per token.

    Args:
        params: parameters, an nnx.State of nnx.Param.
        stats: running averages, an nnx.State of nnx.BatchStat.
        config: the network.
        bits: of a weight, 2 to 8.

    Returns:
        params with rounded kernels; the gradient passes through as if nothing had been rounded.

    References: Bengio et al., "Estimating or propagating gradients through stochastic neurons", 2013 (straight-through
    estimator); Jacob et al., CVPR 2018 (training for integer inference, folded norms).
    """
    flat = dict(nnx.to_flat_state(params))
    averages = dict(nnx.to_flat_state(stats))
    rounded = {}
    for path, variable in flat.items():
        value = variable[...]
        if path[-1] == "kernel":
            place, axis = _norm_of(path[:-1])
            factor = jnp.ones((), value.dtype)
            if config.norm_features == "channel" or place[-2:] not in (("channel", "hidden_norm"), ("channel", "norm")):
                gain = config.v_threshold if config.norm == "tdbn" else 1.0
                factor = flat[*place, "scale"][...] * jax.lax.rsqrt(averages[*place, "var"][...] + EPSILON) * gain
                factor = jnp.expand_dims(factor, [i % value.ndim for i in _other_axes(value.ndim, factor.ndim, axis)])
            # Kernels of height and width mixing are [out, in].
            inputs = -1 if path[-2] in ("height", "width") else tuple(_inputs(path, value.ndim))
            value = value + jax.lax.stop_gradient(_rounded(value, factor, inputs, bits) - value)
        rounded[path] = variable.replace(value)
    return nnx.from_flat_state(rounded)


def make_quantized(config: Config, model: ModelConfig) -> Callable[[Any, Any], Any] | None:
    """The rounding of an experiment, a compiled function (params, stats) -> params; None where weight_bits is 0."""
    if not config.weight_bits:
        return None
    return jax.jit(functools.partial(quantize_weights, config=model, bits=config.weight_bits))


def _rounded(kernel, factor, inputs, bits):
    """The kernel on its grid; unchanged where the factor is zero."""
    most = 2 ** (bits - 1) - 1
    folded = kernel * factor
    largest = jnp.max(jnp.abs(folded), inputs, keepdims=True)
    coarse = 2.0 ** -jnp.floor(jnp.log2(most / jnp.maximum(largest, 2.0**-24)))
    # The finest unit that holds the largest weight, or one finer, which clips: with few bits the first leaves most
    # weights of an output zero.
    found = [jnp.clip(jnp.round(folded / unit), -most, most) * unit for unit in (coarse, coarse / 2)]
    lost = [jnp.sum(jnp.square(folded - near), inputs, keepdims=True) for near in found]
    folded = jnp.where(lost[1] < lost[0], found[1], found[0])
    return jnp.where(factor == 0, kernel, folded / jnp.where(factor == 0, 1, factor))


def _norm_of(path):
    for kernel, norm, axis in _NORMS:
        tail = path[-len(kernel) :]
        if len(tail) == len(kernel) and all(b in ("*", a) for a, b in zip(tail, kernel, strict=True)):
            index = tail[-1]
            return (*path[: -len(kernel)], *(index if part == "*" else part for part in norm)), axis
    raise AssertionError(f"no norm is known for the kernel {'.'.join(map(str, path))}")


def _inputs(path, ndim):
    """Axes of a kernel that its outputs sum over: all but the last, and but the leading one of stacked blocks."""
    return range(1 if "blocks" in path else 0, ndim - 1)


def _other_axes(ndim, features, axis):
    """Where a norm's factor, of one feature axis and perhaps one for the blocks, needs axes of length 1."""
    feature = axis % ndim
    return [i for i in range(ndim) if i != feature and not (features == 2 and i == 0)]
