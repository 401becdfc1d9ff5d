"""Draws the figures of docs/how_it_works.md from the shipped Fashion-MNIST network.

    python -m docs.figures.how_it_works [FOLDER]

FOLDER is docs/images by default. The commands that draw the other figures stand beside them in the docs.
"""

from __future__ import annotations

import sys

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from notebooks import network_plots, neuron_plots
from spiking_mlp_jax import ModelConfig
from spiking_mlp_jax.analysis import samples
from spiking_mlp_jax.analysis.activity.stream import spikes_of_first
from spiking_mlp_jax.analysis.plots import write
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP

BLOCKS = 8  # shown of a deep network
IMAGE = 15  # of the sixteen, one whose scores still change after the first step
# Below the threshold, above it, far above it, silence.
CURRENT = np.repeat([1.3, 0.8, 2.5, 0.0], 6)
NEURONS = {
    "LIF, tau = 2, hard reset (the paper's)": ModelConfig(),
    "LIF, tau = 4": ModelConfig(tau=4.0),
    "LIF, tau = 2, soft reset": ModelConfig(v_reset=None),
    "IF, no leak": ModelConfig(neuron="if"),
}


def main(folder: str = "docs/images") -> None:
    """Writes all of them to a folder."""
    model, meta = weights.load(weights.find("fashion_mnist"))
    images = samples.take(model.config, meta["data"], 16)
    logits, spikes = spikes_of_first(model, jnp.asarray(images.normalised[IMAGE : IMAGE + 1]))
    figures = {
        "neuron_traces": neuron_plots.trace_figure(CURRENT, NEURONS),
        "surrogates": neuron_plots.surrogate_figure(),
        "pixels_to_scores": network_plots.pixels_to_scores(images.raw[IMAGE], spikes, logits[:, 0], images.class_names),
        "mixing": mixing_matrices(model),
        "folding": network_plots.folding_figure(network_plots.row_folding(model, images.normalised)),
    }
    for name, figure in figures.items():
        print(write(figure, f"{folder}/{name}.png"))


def mixing_matrices(model: SpikingMLP) -> Figure:
    """Row and column mixing of each block, as trained: what position i takes from position j, in all channels.

    Args:
        model: of a deep network at most 8 blocks are shown, evenly spaced.
    """
    places = [(i, j) for i, depth in enumerate(model.config.depths) for j in range(depth)]
    if len(places) > BLOCKS:
        places = [places[k] for k in np.linspace(0, len(places) - 1, BLOCKS).round().astype(int)]
    figure = Figure(figsize=(1.0 + 2.2 * len(places), 4.6), layout="constrained")
    panels = figure.subplots(2, len(places), squeeze=False)
    for row, (axis, unit) in enumerate((("height", "row"), ("width", "column"))):
        for column, (stage, block) in enumerate(places):
            kernel = np.asarray(getattr(model.stages[stage].blocks.token, axis).kernel[...][block])
            axes, most = panels[row, column], float(np.abs(kernel).max())
            axes.imshow(kernel, cmap="RdBu_r", vmin=-most, vmax=most)
            axes.set_title(f"stage{stage}.block{block}.{axis}\nred {most:.2f}, blue -{most:.2f}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.set_xlabel(f"from {unit}", fontsize=8)
            if not column:
                axes.set_ylabel(f"to {unit}", fontsize=8)
    return figure


if __name__ == "__main__":
    main(*sys.argv[1:2])
