"""What a receptive field is compared with: an untrained network, shuffled pixels, shuffled spikes.

Shuffled spikes are in `spike_triggered.Moments`, which pairs the counts with earlier stimuli.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from spiking_mlp_jax.config import ModelConfig
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.model import SpikingMLP

PASSES = 60  # of a running average that forgets a tenth of itself each time: 0.2 % of its start are left


def untrained_network(config: ModelConfig, images: Iterable[Float[np.ndarray, "B H W C"]], *, seed: int) -> SpikingMLP:
    """A network before its first training step, whose norms know the statistics of the images.

    With the running averages of a fresh network, 0 and 1, most layers would never fire, and a comparison with them
    would say nothing.

    Args:
        config: of the trained network.
        images: normalised pixels, some batches of one size; they are shown again until the averages have settled.
        seed: of the weights.

    Returns:
        the network, in evaluation mode.

    Raises:
        InputError: there are no images.
    """
    batches = [jnp.asarray(batch) for batch in images]
    if not batches:
        raise InputError("an untrained network needs images for its norms' statistics: give at least one batch")
    model = SpikingMLP(config, rngs=nnx.Rngs(seed))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    @jax.jit
    def show(stats, images):
        model = nnx.merge(graphdef, params, stats, copy=True)
        model(images)
        return nnx.state(model, nnx.BatchStat)

    for i in range(PASSES):
        stats = show(stats, batches[i % len(batches)])
    model = nnx.merge(graphdef, params, stats)
    model.eval()
    return model


def shuffled_pixels(field: Float[np.ndarray, "H W"], rng: np.random.Generator) -> Float[np.ndarray, "H W"]:
    """The same pixels in random order: what a field is without its arrangement."""
    field = np.asarray(field)
    return rng.permutation(field.ravel()).reshape(field.shape)


def main_colour(field: Float[np.ndarray, "H W C"]) -> tuple[Float[np.ndarray, "H W"], float]:
    """The map [H, W] of a field in colour along the one direction of colour that holds most of it.

    Returns:
        the map, signed so that the direction has a positive sum (bright rather than dark, where that can be said);
        the share of the field's energy that it holds, 1 for a grey field, 0 for one that is zero.

    References: the first term of the singular value decomposition of the pixels [H W, C].
    """
    flat = np.asarray(field, np.float64).reshape(-1, field.shape[-1])
    u, s, v = np.linalg.svd(flat, full_matrices=False)
    sign = 1.0 if v[0].sum() >= 0 else -1.0
    total = np.sum(s**2)
    return (sign * u[:, 0] * s[0]).reshape(field.shape[:2]), float(s[0] ** 2 / total) if total else 0.0
