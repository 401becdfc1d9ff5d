"""Fit saved weights to another number of classes or image size, for fine-tuning.

Three kinds of variables depend on the size of the grid: the matrices that mix rows and columns, their biases and norms,
and the norms per token. `docs/finetuning.md` compares ways to resize them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.nn.layers import linear

# Fields that change shapes and in which saved weights may differ.
ADAPTABLE = ("image_size", "num_classes")
_PER_POSITION = ("scale", "bias", "mean", "var")


def describe(where: str, model: ModelConfig) -> str:
    """A description of what `adapt` does to the weights at `where`."""
    saved, _ = weights.read_config(weights.find(where))
    found = [f"the weights of {where}"]
    if saved.image_size != model.image_size:
        found.append(f"mixing and token norms resampled from {saved.image_size} to {model.image_size} px")
    if saved.num_classes != model.num_classes:
        found.append(f"a new head ({saved.num_classes} classes there, {model.num_classes} now)")
    return ", with ".join(found)


def resize_matrix(old: int, new: int, method: str = "linear") -> np.ndarray:
    """The matrix [new, old], float64, that resizes `old` positions to `new` over the same field of view.

    `method` is one of `jax.image.resize`'s: "linear" interpolates between the centres of the positions, and when
    shrinking averages with a triangle that scales with the distance of the new ones. Each row sums to 1.

    Examples:
        >>> resize_matrix(2, 4).tolist()
        [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    resized = np.asarray(jax.image.resize(jnp.eye(old, dtype=float), (new, old), method), np.float64)
    return resized / resized.sum(1, keepdims=True)


def adapt(
    network: SpikingMLP, model: ModelConfig, seed: int, matrix: Callable[[int, int], np.ndarray] = resize_matrix
) -> tuple[Any, Any]:
    """Variables of a network, resized for another image size or number of classes.

    Args:
        network: with concrete arrays.
        model: a configuration whose variables differ in shape only through ADAPTABLE.
        seed: of the new head, which is initialized if the number of classes differs.
        matrix: function like `resize_matrix`.

    Returns:
        params and stats, nnx.States in `model`'s shapes; the network's own arrays if sizes are equal.
    """
    saved = network.config
    _, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)
    if saved.num_classes != model.num_classes:
        head = linear(model.stage_dim(model.stages - 1), model.num_classes, rngs=nnx.Rngs(seed))
        params["head"] = nnx.state(head, nnx.Param)
    if saved.image_size == model.image_size:
        return params, stats
    resampled = _resampled(params, saved, model, matrix)
    return resampled, _with_variances(_resampled(stats, saved, model, matrix), params, resampled, matrix)


def _resampled(state, saved, model, matrix):
    """An nnx.State with the variables of the grid resampled; blocks are on the leading axis."""
    flat = []
    for path, variable in nnx.to_flat_state(state):
        value = np.asarray(variable[...])
        if "blocks" in path:
            stage: Any = path[1]
            old, new = saved.stage_side(stage), model.stage_side(stage)
            found = _of_the_grid(path, value, matrix(old, new), matrix(new, old), saved.per_token)
            if found is not None:
                variable = variable.replace(jnp.asarray(found, value.dtype))
        flat.append((path, variable))
    return nnx.from_flat_state(flat)


def _with_variances(stats, old, new, matrix):
    """Running averages with the variances of mixed inputs rescaled as for independent inputs.

    The variance of a sum of independent inputs is proportional to the sum of squared weights, which resampling shrinks.
    """
    before, flat = dict(nnx.to_flat_state(old)), dict(nnx.to_flat_state(stats))
    for path, variable in nnx.to_flat_state(new):
        norm = (*path[:-1], "norm", "var")
        if path[-1] == "kernel" and path[-2] in ("height", "width") and norm in flat:
            squares, there = (np.square(np.asarray(v[...], np.float64)).sum(-1) for v in (variable, before[path]))
            ratio = squares / (there @ matrix(there.shape[-1], squares.shape[-1]).T + np.finfo(np.float32).tiny)
            value = flat[norm][...]
            flat[norm] = flat[norm].replace((value * jnp.asarray(ratio, value.dtype)).astype(value.dtype))
    return nnx.from_flat_state(flat)


def _of_the_grid(path, value, there, back, per_token):
    new, old = there.shape
    if "height" in path or "width" in path:
        if path[-1] == "kernel":
            # Resize to the old positions, mix, resize to the new ones: rows keep their sums, so that a constant input
            # gives the old output. Interpolating the matrix as an image would scale the sums by new / old.
            return there @ value.astype(np.float64) @ back
        if path[-1] in _PER_POSITION:
            return np.einsum("ni,di...->dn...", there, value)
    if per_token and path[-3] == "channel" and path[-2] in ("hidden_norm", "norm") and path[-1] in _PER_POSITION:
        grid = value.reshape(-1, old, old)
        return np.einsum("ni,mj,dij->dnm", there, there, grid).reshape(-1, new * new)
    return None
