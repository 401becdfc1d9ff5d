"""The spikes themselves: names of layers, rasters of given images, mean firing rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.models.topology import intermediate_names

SPIKES, POTENTIAL = ".spikes", ".potential"
Value = TypeVar("Value")


def in_network_order(layers: Mapping[str, Value], config: ModelConfig) -> dict[str, Value]:
    """The entries from the network's input to its output; `jax.jit` leaves a dict sorted by name.

    Args:
        layers: anything by the name of an intermediate ("stage0.encode.spikes").
        config: of the network; names that it does not have are left out.
    """
    return {name: layers[name] for name in intermediate_names(config) if name in layers}


def firing_rates(model: SpikingMLP, images: Float[Array, "B H W C"]) -> dict[str, float]:
    """Mean firing rate of each layer over the images, its neurons and the time steps.

    Args:
        model: in evaluation mode; a model in training mode gives the rates under the batch's statistics. It
            is not changed.
        images: normalised pixels.

    Returns:
        Spikes per neuron and time step, 0 to 1, by layer ("stage0.encode.spikes",
        "stage0.block0.token.height.spikes"), in the order of the network.
    """

    def rate(name, value):
        return jnp.mean(value, dtype=jnp.float32) if name.endswith(SPIKES) else None

    return {name: float(value) for name, value in observed(model, images, rate)[1].items()}


def spikes_of_first(
    model: SpikingMLP, images: Float[Array, "B H W C"]
) -> tuple[Float[np.ndarray, "T B K"], dict[str, Bool[np.ndarray, "T H W C"]]]:
    """Class scores of some images, and every spike that the first of them causes.

    Args:
        model: in evaluation mode; it is not changed.
        images: normalised pixels.

    Returns:
        logits: at each time step.
        spikes: for each layer, named and ordered as in `firing_rates`, whether each neuron fires at each
            step.
    """

    def keep(name, value):
        # One byte a spike instead of four.
        return value[0].astype(bool) if name.endswith(SPIKES) else None

    logits, seen = observed(model, images, keep)
    return np.asarray(logits), {name: np.asarray(spikes) for name, spikes in seen.items()}


def rasters(model: SpikingMLP, images: Float[Array, "B H W C"]) -> dict[str, Bool[np.ndarray, "B T H W C"]]:
    """Every spike that some images cause; `plots.spike_raster` draws one image's.

    Nothing is summed up here, so a few images are meant: a byte for each neuron, step and image.

    Args:
        model: in evaluation mode; it is not changed.
        images: normalised pixels.

    Returns:
        for each layer, named and ordered as in `firing_rates`, whether each neuron fires at each step.
    """

    def keep(name, value):
        return value.astype(bool) if name.endswith(SPIKES) else None

    return {name: np.asarray(spikes) for name, spikes in observed(model, images, keep)[1].items()}


def observed(model: SpikingMLP, images: Float[Array, "B H W C"], observe):
    """Logits [T, B, K] and what `observe` keeps, in one compiled pass; the dict is in the order of the network."""
    graphdef, variables = nnx.split(model)
    names: list[str] = []

    @jax.jit
    def run(variables, images):
        logits, seen = nnx.merge(graphdef, variables, copy=True)(images, observe=observe)
        # Noted while tracing, because the dict would leave jit sorted by name.
        names[:] = seen
        return logits, list(seen.values())

    logits, values = run(variables, images)
    return logits, dict(zip(names, values, strict=True))
