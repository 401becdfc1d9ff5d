"""Folds every batch norm of a trained network into the weights, biases and thresholds around it.

In evaluation a norm is y = a x + c for each of its features. What becomes of it depends on where it stands:

    after a map of spikes, features = outputs of the map     a goes into the weights, c into the bias
    per token, before a neuron (`norm_features="token"`)     the neuron divides by a: threshold / a, offset c / a; a
                                                             negative a turns the comparison round, a = 0 leaves a
                                                             neuron that sees only c
    per token, before a sum                                  stays: a scale per token, no weight is its own
    on spikes ("plain" encoding)                             one of two values, for 0 and for 1
    before the head                                          into the head's weights and bias, with the mean over tokens

tdBN is a batch norm with a constant factor. TEBN's scales, one a time step, make weights and biases of each step. All
of this is exact in real arithmetic; the folding itself is done in float64.

References: Li et al., arXiv 2306.12465, section on multiplication-free inference; Jacob et al., "Quantization and
training of neural networks for efficient integer-arithmetic-only inference", CVPR 2018 (folding).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.pixels import Pixels, check_statistics
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.nn.norm import EPSILON, BatchNorm

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Observe = Callable[[str, Any], None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FoldedNet:
    """A network without norms, for evaluation only.

    Attributes:
        arrays: weights, biases, thresholds, by layer name ("stage0.block1.fuse"); see `fold`. A leading axis S is 1,
            or T where each time step has its own.
        config: the network it came from.
        mean: of the pixels in [0, 1], per channel, which the inputs were normalised with.
        std: likewise.
    """

    arrays: dict[str, dict[str, Array]]
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    mean: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    std: tuple[float, ...] = dataclasses.field(metadata={"static": True})

    def __call__(self, images: Float[Array, "B H W C"], observe: Observe | None = None) -> Float[Array, "T B K"]:
        """Logits of normalised images, as the network in evaluation mode gives them.

        Args:
            images: normalised pixels, floating.
            observe: when given, called with the name of each layer and what it multiplies by its weights,
                [B, T, ..., fan_in].

        Raises:
            InputError: images of another shape or type than the network's.
        """
        from spiking_mlp_jax.deploy.folded import logits

        return logits(self, images, observe)


def fold(model: SpikingMLP, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None) -> FoldedNet:
    """Folds a trained network.

    Args:
        model: with concrete parameters and running statistics; it is not changed, and its mode does not matter.
        mean: of the pixels in [0, 1], per channel, that its inputs are normalised with; None takes what came with
            the weights (`model.pixels`), or 0 where nothing is known. Only what is made of the folded network needs it.
        std: likewise; 1 where nothing is known.

    Returns:
        a network of the same logits. Its arrays, with S = T for TEBN and else 1:

            encode, cells, edge1, edge2, height, width, fuse, expand, project, head
                kernel [S, fan_in, out], bias [S, out]; a convolution's fan_in is (row, column, channel)
            identity   low, high [S, C]: the potential for no spike and for a spike ("plain" encoding)
            expand     with token features also offset [S, N] and threshold, reset, below, constant [N]
            project    with token features also scale [N], offset [S, N]
            neurons    tau, for each layer of neurons, with neuron="plif"

    Raises:
        InputError: the network has LayerNorms, which depend on what they normalise and so cannot be folded; mean and
            std do not fit its channels.

    Examples:
        >>> from spiking_mlp_jax import weights
        >>> model, _ = weights.load(weights.find("fashion_mnist"))
        >>> folded = fold(model)
        >>> {name: x.shape for name, x in folded.arrays["stage0.block0.fuse"].items()}
        {'kernel': (1, 144, 48), 'bias': (1, 48)}
    """
    if not isinstance(model, SpikingMLP):
        raise InputError(f"a SpikingMLP is folded, not a {type(model).__name__}: give the trained model")
    c = model.config
    if c.norm == "layer":
        raise InputError(
            'a network with norm="layer" cannot be folded: LayerNorm divides by a deviation that each image and step '
            'has of its own, which no constant weights can hold; train with norm="batch", "tdbn" or "tebn"'
        )
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for i, stage in enumerate(model.stages):
        _fold_encoding(arrays, f"stage{i}.encode", stage.encode, c)
        _fold_tau(arrays, f"stage{i}.encode", stage.neuron)
        # On the host first: slices of device arrays would each be compiled.
        graphdef, variables = jax.device_get(nnx.split(stage.blocks))
        for j in range(c.depths[i]):
            block = nnx.merge(graphdef, jax.tree.map(lambda x, j=j: x[j], variables))
            _fold_block(arrays, f"stage{i}.block{j}", block, c)
    pixels = model.pixels or Pixels((0.0,) * c.in_channels, (1.0,) * c.in_channels)
    mean, std = pixels.mean if mean is None else tuple(mean), pixels.std if std is None else tuple(std)
    check_statistics(mean, std, c.in_channels)
    kernel, bias = _array(model.head.kernel), _array(model.head.bias)
    factor, offset = _affine(model.norm)
    tokens = c.stage_side(c.stages - 1) ** 2
    arrays["head"] = {"kernel": factor[:, :, None] * kernel / tokens, "bias": offset @ kernel + bias}
    dtype = jnp.promote_types(model.head.kernel.dtype, jnp.float32)
    return FoldedNet(
        {
            layer: {name: jnp.asarray(x, None if x.dtype == bool else dtype) for name, x in entries.items()}
            for layer, entries in arrays.items()
        },
        c,
        mean,
        std,
    )


def _fold_encoding(arrays, name, encode, config):
    if hasattr(encode, "cells"):
        cells = [
            _fold_map(_flat(cell.kernel), norm) for cell, norm in zip(encode.cells, encode.cell_norms, strict=True)
        ]
        # The three nodes read the same input: one map.
        arrays[f"{name}.cells"] = {key: np.concatenate([cell[key] for cell in cells], -1) for key in cells[0]}
        for i, (edge, norm) in enumerate(zip(encode.edges, encode.edge_norms, strict=True), 1):
            arrays[f"{name}.edge{i}"] = _fold_map(_flat(edge.kernel), norm)
            _fold_tau(arrays, f"{name}.node{i}", encode.neurons[i - 1])
        return
    arrays[name] = _fold_map(_flat(encode.conv.kernel), encode.norm)


def _fold_block(arrays, name, block, config):
    token, channel = block.token, block.channel
    if token.identity_norm is not None:
        factor, offset = _affine(token.identity_norm)
        arrays[f"{name}.identity"] = {"low": offset, "high": factor + offset}
        _fold_tau(arrays, f"{name}.identity", token.identity_neuron)
    for axis in ("height", "width"):
        mixing = getattr(token, axis)
        arrays[f"{name}.{axis}"] = _fold_map(_array(mixing.kernel).T, mixing.norm, _array(mixing.bias))
        _fold_tau(arrays, f"{name}.{axis}", mixing.neuron)
    arrays[f"{name}.fuse"] = _fold_map(_array(token.fuse.kernel), token.norm)
    _fold_tau(arrays, f"{name}.token", block.token_neuron)
    expand = _array(channel.expand.kernel), _array(channel.expand.bias)
    project = _array(channel.project.kernel), _array(channel.project.bias)
    if config.norm_features == "channel":
        arrays[f"{name}.expand"] = _fold_map(expand[0], channel.hidden_norm, expand[1])
        arrays[f"{name}.project"] = _fold_map(project[0], channel.norm, project[1])
    else:
        arrays[f"{name}.expand"] = _fold_into_thresholds(*expand, channel.hidden_norm, config)
        scale, offset, steps = _per_token(channel.norm)
        arrays[f"{name}.project"] = {**_each_step(*project, steps), "scale": scale, "offset": steps[:, None] * offset}
    _fold_tau(arrays, f"{name}.hidden", channel.neuron)
    _fold_tau(arrays, f"{name}.channel", block.channel_neuron)


def _fold_map(kernel, norm, bias: np.ndarray | float = 0.0):
    """A map [fan_in, out] and the norm of its outputs."""
    factor, offset = _affine(norm)
    return {"kernel": factor[:, None, :] * kernel, "bias": factor * bias + offset}


def _fold_into_thresholds(kernel, bias, norm, config):
    """A map [fan_in, out] and the neurons that see a z + c, with a and c of each token.

    Divided by a, the neuron sees z + c / a and compares with threshold / a. TEBN's scale s multiplies both terms; it
    goes into z and c, because the potential carried from step to step must keep one unit.
    """
    scale, offset, steps = _per_token(norm)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        constants = [offset / scale, config.v_threshold / scale, (config.v_reset or 0.0) / scale]
        # As they will be stored: what float64 holds may be too large for float32.
        stored = np.asarray(constants, np.promote_types(norm.scale[...].dtype, np.float32))
    # What a token with a = 0, or one so small that dividing overflows, adds to its neurons' input is nothing.
    constant = ~np.isfinite(stored).all(0)
    plain = [offset, np.full_like(scale, config.v_threshold), np.full_like(scale, config.v_reset or 0.0)]
    constants = np.where(constant, plain, constants)
    return {
        **_each_step(kernel, bias, steps),
        "offset": steps[:, None] * constants[0],
        "threshold": constants[1],
        "reset": constants[2],
        "below": (scale < 0) & ~constant,
        "constant": constant,
    }


def _each_step(kernel, bias, steps):
    return {"kernel": steps[:, None, None] * kernel, "bias": steps[:, None] * bias}


def _affine(norm: BatchNorm):
    """Factor and offset [S, features] of a norm in evaluation."""
    scale, offset, steps = _per_token(norm)
    return steps[:, None] * scale, steps[:, None] * offset


def _per_token(norm: BatchNorm):
    """Factor and offset [features], and the factor of each step [S]."""
    factor = _array(norm.scale) / np.sqrt(_array(norm.var) + EPSILON) * norm.gain
    offset = _array(norm.bias) * norm.gain - _array(norm.mean) * factor
    return factor, offset, np.ones(1) if norm.step_scale is None else _array(norm.step_scale)


def _fold_tau(arrays, name, neuron):
    if neuron.w is not None:
        arrays[f"{name}.neurons"] = {"tau": 1 + np.exp(-_array(neuron.w))}


def _flat(kernel):
    """A convolution's kernel [k, k, in, out] as a matrix [k * k * in, out]."""
    kernel = _array(kernel)
    return kernel.reshape(-1, kernel.shape[-1])


def _array(variable) -> np.ndarray:
    return np.asarray(variable[...], np.float64)
