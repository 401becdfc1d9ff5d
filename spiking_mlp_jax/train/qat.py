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
from spiking_mlp_jax.models.topology import layers
from spiking_mlp_jax.nn.norm import EPSILON
from spiking_mlp_jax.train.config import Config


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
    rows = [row for row in layers(config) if row.kernels]
    found: dict[Any, Any] = {
        kernel: (row, norm) for row in rows for kernel, norm in zip(row.kernels, row.norms, strict=True)
    }
    gain = config.v_threshold if config.norm == "tdbn" else 1.0
    rounded = {}
    for path, variable in flat.items():
        value = variable[...]
        if path[-1] == "kernel":
            layer, norm = found[path[:-1]]
            # Kernels are [..., in, out], but those that mix rows or columns [out, in]; those of blocks are stacked.
            mixing, first = layer.axis < -1, 0 if layer.block is None else 1
            factor = jnp.ones((), value.dtype)
            if layer.norm != "tokens":
                factor = flat[*norm, "scale"][...] * jax.lax.rsqrt(averages[*norm, "var"][...] + EPSILON) * gain
                shape = [1] * value.ndim
                shape[:first] = value.shape[:first]
                shape[-2 if mixing or layer.norm == "inputs" else -1] = -1
                factor = factor.reshape(shape)
            inputs = -1 if mixing else tuple(range(first, value.ndim - 1))
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
