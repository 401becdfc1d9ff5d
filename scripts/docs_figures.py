"""Draws the figures of docs/how_it_works.md anew, from the shipped Fashion-MNIST network.

    python -m scripts.docs_figures [FOLDER]

FOLDER is docs/images by default. The other figures there are drawn by the commands that stand beside them.
"""

from __future__ import annotations

import sys

import jax.numpy as jnp
import numpy as np

from spiking_mlp_jax import ModelConfig
from spiking_mlp_jax.analysis import network_plots, neuron_plots, samples
from spiking_mlp_jax.analysis.activity.measure import spikes_of_first
from spiking_mlp_jax.analysis.plots import write
from spiking_mlp_jax.models import weights

# Below the threshold, above it, far above it, silence.
CURRENT = np.repeat([1.3, 0.8, 2.5, 0.0], 6)
NEURONS = {
    "LIF, tau = 2, hard reset (the paper's)": ModelConfig(),
    "LIF, tau = 4": ModelConfig(tau=4.0),
    "LIF, tau = 2, soft reset": ModelConfig(v_reset=None),
    "IF, no leak": ModelConfig(neuron="if"),
}


def main(folder: str = "docs/images") -> None:
    """Draws all of them into a folder."""
    model, meta = weights.load(weights.find("fashion_mnist"))
    images = samples.take(model.config, meta["data"], 16)
    logits, spikes = spikes_of_first(model, jnp.asarray(images.normalised[IMAGE : IMAGE + 1]))
    figures = {
        "neuron_traces": neuron_plots.trace_figure(CURRENT, NEURONS),
        "surrogates": neuron_plots.surrogate_figure(),
        "pixels_to_scores": network_plots.pixels_to_scores(images.raw[IMAGE], spikes, logits[:, 0], images.class_names),
        "mixing": network_plots.mixing_matrices(model),
        "folding": network_plots.folding_figure(network_plots.row_folding(model, images.normalised)),
    }
    for name, figure in figures.items():
        print(write(figure, f"{folder}/{name}.png"))


# Of the sixteen, one whose scores still move after the first step.
IMAGE = 15

if __name__ == "__main__":
    main(*sys.argv[1:2])
