"""Controls of a receptive field: an untrained network and shuffled pixels.

The third control, shifted spikes, is in `spike_triggered.Moments`.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.nn.norm import MOMENTUM


def untrained_network(config: ModelConfig, images: Iterable[Float[np.ndarray, "B H W C"]], *, seed: int) -> SpikingMLP:
    """A network at initialisation, with the running averages of its norms set to the statistics of the images.

    With running averages of 0 and 1 most layers would never fire.

    Args:
        config: of the trained network.
        images: normalised pixels, batches of one size; their statistics are averaged.
        seed: of the weights.

    Returns:
        the network, in evaluation mode.

    Raises:
        InputError: there are no images.
    """
    batches = [jnp.asarray(batch) for batch in images]
    if not batches:
        raise InputError("an untrained network needs images for the statistics of its norms: give at least one batch")
    model = SpikingMLP(config, rngs=nnx.Rngs(seed))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    @jax.jit
    def show(stats, images):
        model = nnx.merge(graphdef, params, stats, copy=True)
        model(images)
        return nnx.state(model, nnx.BatchStat)

    # A running average moves by a known share towards a batch's statistics, so these can be recovered.
    moved = [show(stats, batch) for batch in batches]
    stats = jax.tree.map(lambda old, *new: _settled(old, jnp.stack(new)), stats, *moved)
    model = nnx.merge(graphdef, params, stats)
    model.eval()
    return model


def _settled(old, new):
    if not jnp.issubdtype(old.dtype, jnp.floating):
        return new[-1]
    return (old + (new - old).mean(0) / MOMENTUM).astype(old.dtype)


def shuffled_pixels(
    field: Float[np.ndarray, "H W"], rng: np.random.Generator, block: int | None = None
) -> Float[np.ndarray, "H W"]:
    """The same pixels in random order.

    Args:
        field: a map.
        rng: of the order.
        block: side of the squares within which pixels are shuffled; None for the whole map. Squares of the size of a
            token's patch preserve the position and size of a field.

    Raises:
        InputError: the squares do not divide the map.
    """
    field = np.asarray(field)
    height, width = field.shape
    rows, columns = (block, block) if block is not None else (height, width)
    if rows < 1 or height % rows or width % columns:
        raise InputError(f"a map of {height} x {width} pixels does not divide into squares of {block}")
    squares = field.reshape(height // rows, rows, width // columns, columns).swapaxes(1, 2)
    mixed = rng.permuted(squares.reshape(*squares.shape[:2], -1), axis=-1).reshape(squares.shape)
    return mixed.swapaxes(1, 2).reshape(height, width)


def main_colour(field: Float[np.ndarray, "H W C"]) -> tuple[Float[np.ndarray, "H W"], float]:
    """The map [H, W] of a colour field along its dominant direction of colour.

    Returns:
        the map, signed so that the direction has a positive sum (bright rather than dark);
        its share of the field's energy: 1 for a grey field, 0 for one that is zero.

    References: the first term of the singular value decomposition of the pixels [H W, C].
    """
    flat = np.asarray(field, np.float64).reshape(-1, field.shape[-1])
    u, s, v = np.linalg.svd(flat, full_matrices=False)
    sign = 1.0 if v[0].sum() >= 0 else -1.0
    total = np.sum(s**2)
    return (sign * u[:, 0] * s[0]).reshape(field.shape[:2]), float(s[0] ** 2 / total) if total else 0.0
