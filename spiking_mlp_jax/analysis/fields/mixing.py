"""Mixing weights of the token blocks as profiles over the distance between tokens, and their separable products.

A token block mixes along the height, row i of the result being sum_j W_h[i, j] row j, and likewise along the width.
Row i of W against the offset j - i is the 1-D receptive field of position i on the grid of tokens. The outer product of
a height and a width profile is the 2-D field of both in sequence; the network adds the two branches instead.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP


@dataclasses.dataclass(frozen=True)
class Mixing:
    """The mixing weights of one token block.

    Attributes:
        block: "stage0.block1".
        height: W_h [out, in] along the rows of tokens.
        width: W_w [out, in] along the columns.
    """

    block: str
    height: Float[np.ndarray, "side side"]
    width: Float[np.ndarray, "side side"]


def mixing_weights(model: SpikingMLP) -> list[Mixing]:
    """The mixing weights of every token block, in the order of the network, without their norms."""
    found = []
    for i, stage in enumerate(model.stages):
        token = stage.blocks.token
        heights, widths = (np.asarray(axis.kernel[...], np.float64) for axis in (token.height, token.width))
        found += [Mixing(f"stage{i}.block{j}", heights[j], widths[j]) for j in range(stage.depth)]
    return found


def profiles(weights: Float[np.ndarray, "side side"]) -> Float[np.ndarray, "side offsets"]:
    """Rows of mixing weights, each shifted so that its position is in the middle.

    Args:
        weights: W [out, in].

    Returns:
        [side, 2 side - 1]: entry (i, side - 1 + d) is W[i, i + d], NaN where there is no token i + d.

    Raises:
        InputError: the weights are not a square matrix.
    """
    weights = _square(weights)
    side = len(weights)
    shifted = np.full((side, 2 * side - 1), np.nan)
    for i, row in enumerate(weights):
        shifted[i, side - 1 - i : 2 * side - 1 - i] = row
    return shifted


def mean_profile(weights: Float[np.ndarray, "side side"]) -> Float[np.ndarray, "offsets"]:
    """Mean of each diagonal of W, by offset -(side - 1) to side - 1."""
    side = len(_square(weights))
    return np.array([np.diagonal(weights, offset).mean() for offset in range(1 - side, side)])


def separable_fields(
    height: Float[np.ndarray, "side side"], width: Float[np.ndarray, "side side"]
) -> Float[np.ndarray, "side side side side"]:
    """Outer products of the height and the width profile of every token.

    Args:
        height: W_h [out, in].
        width: W_w [out, in].

    Returns:
        field[i, j, k, l] = W_h[i, k] W_w[j, l]: what token (i, j) of the result takes from token (k, l).
    """
    return np.einsum("ik,jl->ijkl", _square(height), _square(width))


def convolution_share(weights: Float[np.ndarray, "side side"]) -> float:
    """Share of the weights' energy explained by one profile for all positions, 0 to 1.

    1 for a Toeplitz matrix, which is a convolution; (2 side - 1) / side^2 on average for independent random weights.
    """
    weights = _square(weights)
    side = len(weights)
    counts = side - np.abs(np.arange(1 - side, side))
    total = np.sum(weights**2)
    return float(np.sum(counts * mean_profile(weights) ** 2) / total) if total else 0.0


def energy_within(weights: Float[np.ndarray, "side side"], reach: int) -> tuple[float, float]:
    """Locality of mixing.

    Args:
        weights: W [out, in].
        reach: largest distance |j - i|.

    Returns:
        share of the weights' energy (squares) within that distance; the same if all weights were equal, which is the
        mean of untrained weights.
    """
    weights = _square(weights)
    index = np.arange(len(weights))
    near = np.abs(index[:, None] - index) <= reach
    total = np.sum(weights**2)
    return float(np.sum(weights[near] ** 2) / total) if total else 0.0, float(near.mean())


def _square(weights) -> np.ndarray:
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or not weights.size:
        raise InputError(f"mixing weights are square matrices [out, in], but these have the shape {weights.shape}")
    return weights
