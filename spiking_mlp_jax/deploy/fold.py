"""Folds every batch norm of a trained network into the weights, biases and thresholds around it.

In evaluation a norm is y = a x + c for each of its features. Where a and c go depends on its place:

    after a linear layer, features = its outputs             a into the weights, c into the bias
    per token, before a neuron (`norm_features="token"`)     the neuron divides by a: threshold / a, offset c / a; a
                                                             negative a reverses the comparison, with a = 0 the neuron
                                                             sees only c
    per token, before a sum                                  a scale per token remains, because weights are shared
    on spikes ("plain" encoding)                             one of two values, for 0 and for 1
    before the head                                          the head's weights and bias, with the mean over tokens

tdBN is a batch norm with a constant factor. TEBN's scales give each time step its own weights and biases. All of this
is exact in real arithmetic; folding is computed in float64.

References: Li et al., arXiv 2306.12465, section on multiplication-free inference; Jacob et al., "Quantization and
training of neural networks for efficient integer-arithmetic-only inference", CVPR 2018 (folding).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spiking_mlp_jax.deploy.forward import Folded, Observe
from spiking_mlp_jax.deploy.network import as_array
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.folder import check_finite
from spiking_mlp_jax.models.pixels import Pixels, check_statistics
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP, nan_where_not_finite
from spiking_mlp_jax.models.topology import Layer, layers
from spiking_mlp_jax.nn.norm import EPSILON
from spiking_mlp_jax.utils.settings import usual_settings

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FoldedNet:
    """A network without norms, for evaluation only.

    Attributes:
        arrays: weights, biases, thresholds, by layer name ("stage0.block1.fuse"); see `fold`. A leading axis S is 1,
            or T where each time step has its own.
        config: the network it came from.
        mean: of the pixels in [0, 1], per channel, which the inputs were normalized with.
        std: likewise.
        pixels: the network's preprocessing, or None.
    """

    arrays: dict[str, dict[str, Array]]
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    mean: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    std: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    pixels: Pixels | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(self, images: Float[Array, "B H W C"], observe: Observe | None = None) -> Float[Array, "T B K"]:
        """Logits of normalized images, those of the network in evaluation mode.

        Args:
            images: normalized pixels, floating.
            observe: when given, called with the name of each layer and what it multiplies by its weights,
                [B, T, ..., fan_in].

        Raises:
            InputError: images of another shape or type than the network's.
        """
        c = self.config
        expected = (c.image_size, c.image_size, c.in_channels)
        if not isinstance(images, jax.Array):
            images = jnp.asarray(as_array(images, "images"))
        if images.ndim != 4 or images.shape[1:] != expected or not images.shape[0]:
            raise InputError(f"images must be [batch, {', '.join(map(str, expected))}], got {images.shape}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"images must be normalized floating-point pixels, got {images.dtype}")
        dtype = jnp.promote_types(images.dtype, self.arrays["head"]["kernel"].dtype)
        images = images.astype(dtype)
        return Folded(self.arrays, c, observe).logits(images) + nan_where_not_finite(images)[None]


@usual_settings()
def fold(model: SpikingMLP, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None) -> FoldedNet:
    """Fold a trained network.

    Args:
        model: with concrete parameters and running statistics; in any mode. It is not changed.
        mean: of the pixels in [0, 1], per channel, that its inputs are normalized with; by default `model.pixels`, or
            0 if that is None. `quantize` and exports of pixels use it.
        std: likewise; 1 if `model.pixels` is None.

    Returns:
        a network with the same logits. Its arrays, with S = T for TEBN and else 1:

            encode, cells, edge1, edge2, height, width, fuse, expand, project, head
                kernel [S, fan_in, out], bias [S, out]; a convolution's fan_in is (row, column, channel)
            identity   low, high [S, C]: the potential for no spike and for a spike ("plain" encoding)
            expand     with token features also offset [S, N] and threshold, reset, below, constant [N]
            project    with token features also scale [N], offset [S, N]
            neurons    tau, for each layer of neurons, with neuron="plif"

    Raises:
        InputError: the network has LayerNorms, whose statistics depend on the input; NaN or inf in a tensor; mean and
            std do not fit its channels.

    Examples:
        >>> from spiking_mlp_jax.models import weights
        >>> model, _ = weights.load(weights.find("fashion_mnist"))
        >>> folded = fold(model)
        >>> {name: x.shape for name, x in folded.arrays["stage0.block0.fuse"].items()}
        {'kernel': (1, 144, 48), 'bias': (1, 48)}
    """
    if not isinstance(model, SpikingMLP):
        raise InputError(f"fold takes a SpikingMLP, got a {type(model).__name__}")
    c = model.config
    if c.norm == "layer":
        raise InputError(
            'norm="layer" cannot be folded: LayerNorm divides by a deviation that differs between images and steps; '
            'train with norm="batch", "tdbn" or "tebn"'
        )
    dtype = jnp.promote_types(model.head.kernel.dtype, jnp.float32)
    # On the host: slices of device arrays would each be compiled.
    state = jax.device_get(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    values = {path: np.asarray(variable[...], np.float64) for path, variable in nnx.to_flat_state(state)}
    check_finite({".".join(map(str, path)): x for path, x in values.items()}, "the model")
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for layer in layers(c):
        own = {path: x for path, x in values.items() if path[:-1] in layer.paths}
        own = own if layer.block is None else {path: x[layer.block] for path, x in own.items()}
        arrays[layer.name] = _fold_layer(layer, own, dtype, c)
        if layer.neurons and c.neuron == "plif":
            arrays[f"{layer.neurons.short}.neurons"] = {"tau": 1 + np.exp(-own[*layer.neurons.path, "w"])}
    pixels = model.pixels or Pixels((0.0,) * c.in_channels, (1.0,) * c.in_channels)
    mean, std = pixels.mean if mean is None else tuple(mean), pixels.std if std is None else tuple(std)
    check_statistics(mean, std, c.in_channels)
    return FoldedNet(
        {
            layer: {name: jnp.asarray(x, None if x.dtype == bool else dtype) for name, x in entries.items()}
            for layer, entries in arrays.items()
        },
        c,
        mean,
        std,
        model.pixels and dataclasses.replace(model.pixels, mean=mean, std=std),
    )


@dataclasses.dataclass
class _Norm:
    """A norm in evaluation, y = scale x + offset; `steps` [S] are TEBN's factors of both at each step."""

    scale: np.ndarray
    offset: np.ndarray
    steps: np.ndarray


def _norm(path, values, c: ModelConfig) -> _Norm:
    # tdBN's norms have the threshold for a constant gain.
    gain = c.v_threshold if c.norm == "tdbn" else 1.0
    scale = values[*path, "scale"] / np.sqrt(values[*path, "var"] + EPSILON) * gain
    offset = values[*path, "bias"] * gain - values[*path, "mean"] * scale
    return _Norm(scale, offset, values.get((*path, "step_scale"), np.ones(1)))


def _fold_layer(layer: Layer, values, dtype, c: ModelConfig) -> dict[str, np.ndarray]:
    """The arrays of a layer; `values` are its block's."""
    norms = [_norm(path, values, c) for path in layer.norms]
    if layer.kind == "identity":
        (n,) = norms
        return {"low": n.steps[:, None] * n.offset, "high": n.steps[:, None] * (n.scale + n.offset)}
    parts = [_fold_kernel(layer, path, norm, values, dtype, c) for path, norm in zip(layer.kernels, norms, strict=True)]
    # The three nodes of the patch encoding read the same input: one kernel.
    return parts[0] if len(parts) == 1 else {key: np.concatenate([part[key] for part in parts], -1) for key in parts[0]}


def _fold_kernel(layer: Layer, path, norm: _Norm, values, dtype, c: ModelConfig) -> dict[str, np.ndarray]:
    kernel, bias = values[*path, "kernel"], values.get((*path, "bias"), 0.0)
    kernel = kernel.T if layer.axis < -1 else kernel.reshape(-1, kernel.shape[-1])
    steps = norm.steps[:, None]
    factor, offset = steps * norm.scale, steps * norm.offset
    if layer.norm == "outputs":
        return {"kernel": factor[:, None, :] * kernel, "bias": factor * bias + offset}
    if layer.norm == "inputs":
        tokens = c.stage_side(c.stages - 1) ** 2
        return {"kernel": factor[:, :, None] * kernel / tokens, "bias": offset @ kernel + bias}
    each_step = {"kernel": steps[:, :, None] * kernel, "bias": steps * bias}
    if layer.neurons and layer.neurons.per_token:
        return each_step | _thresholds(norm, dtype, c)
    return each_step | {"scale": norm.scale, "offset": offset}


def _thresholds(norm: _Norm, dtype, c: ModelConfig) -> dict[str, np.ndarray]:
    """Constants of neurons that see a z + o, with a and o of each token.

    Divided by a, the neuron sees z + o / a and compares with threshold / a. TEBN's scale s multiplies both terms; it
    goes into z and o, because the potential carried from step to step must keep one unit.
    """
    scale, offset = norm.scale, norm.offset
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        constants = [offset / scale, c.v_threshold / scale, (c.v_reset or 0.0) / scale]
        # As they will be stored: what float64 holds may be too large for float32.
        stored = np.asarray(constants, dtype)
    # A token with a = 0, or with an a so small that dividing overflows, adds nothing to its neurons' input.
    constant = np.asarray(~np.isfinite(stored).all(0))
    plain = [offset, np.full_like(scale, c.v_threshold), np.full_like(scale, c.v_reset or 0.0)]
    offset, threshold, reset = np.where(constant, plain, constants)
    return {
        "offset": norm.steps[:, None] * offset,
        "threshold": threshold,
        "reset": reset,
        "below": (scale < 0) & ~constant,
        "constant": constant,
    }
