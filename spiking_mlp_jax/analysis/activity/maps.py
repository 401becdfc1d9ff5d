"""Figures of a network's activity with one panel a layer: token maps, membrane potentials, similarity of steps.

Each function takes what `probe.activity` computes, and returns a matplotlib Figure.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spiking_mlp_jax.analysis.activity.membrane import Membrane
from spiking_mlp_jax.analysis.activity.plots import label, step_colours
from spiking_mlp_jax.analysis.activity.rates import Rates
from spiking_mlp_jax.analysis.activity.similarity import Similarity

PANELS = 24
COLUMNS = 5


def token_maps(rates: Rates) -> Figure:
    """Where in the image each layer fires, mean over channels, steps and images; at most 24 layers, evenly spaced.

    All maps share one scale of colours.
    """
    names = _chosen(list(rates.token))
    most = 100 * max(float(rates.token[name].max()) for name in names)
    figure, panels = _panels(names, 2.0, 2.05)
    image = None
    for axes, name in zip(panels, names, strict=True):
        image = axes.imshow(100 * rates.token[name], cmap="cividis", vmin=0, vmax=max(most, 1))
        axes.set(xticks=[], yticks=[])
        height, width = rates.token[name].shape
        axes.set_title(f"{label(name)}\n{height} x {width}, mean {100 * rates.layer[name]:.1f} %", fontsize=7.5)
    if image is not None:
        figure.colorbar(image, ax=list(panels), shrink=0.5).set_label("channels that fire in a step (%)")
    return figure


def membrane_histograms(membrane: Membrane) -> Figure:
    """Membrane potentials before firing, a line for each step, with the threshold; at most 24 layers, evenly spaced.

    The heights are densities on a logarithmic scale; what lies beyond the first or last bin is counted in it.
    """
    names = _chosen(list(membrane.counts))
    steps = len(membrane.counts[names[0]])
    colours = step_colours(steps)
    width = np.diff(membrane.edges)
    figure, panels = _panels(names, 2.4, 1.85)
    for axes, name in zip(panels, names, strict=True):
        axes.axvspan(membrane.v_threshold, membrane.edges[-1], color="#f6e3da", linewidth=0)
        axes.axvline(membrane.v_threshold, color="black", linewidth=1, linestyle="--")
        for step, counts in enumerate(membrane.counts[name]):
            density = counts / counts.sum() / width
            # Gaps and not zeros, which a logarithm does not have.
            density = np.where(density > 0, density, np.nan)
            axes.stairs(density, membrane.edges, color=colours[step], linewidth=1.1, baseline=None)
        axes.set_yscale("log")
        axes.set_ylim(1e-3, 20)
        axes.set_xlim(membrane.edges[0], membrane.edges[-1])
        fire = 100 * float(membrane.above(name).mean())
        axes.set_title(f"{label(name)}\n{fire:.1f} % fire", fontsize=7.5)
        axes.tick_params(labelsize=7)
        axes.minorticks_off()
    for step, colour in enumerate(colours):
        panels[0].plot([], [], color=colour, label=str(step + 1))
    panels[0].plot([], [], color="black", linestyle="--", label="threshold")
    handles, texts = panels[0].get_legend_handles_labels()
    if steps > 9:
        handles, texts = [handles[i] for i in (0, steps - 1, -1)], [f"1 to {steps}: first", "last", "threshold"]
    figure.legend(handles, texts, title="time step", loc="outside upper center", ncols=10, frameon=False, fontsize=8)
    figure.supxlabel("membrane potential before firing; the outermost bins hold all beyond", fontsize=9)
    figure.supylabel("density", fontsize=9)
    return figure


def similarity_matrices(similarity: Mapping[str, Similarity]) -> Figure:
    """How alike two steps represent the images: CKA on and above the diagonal, RSA below; at most 24 layers.

    A cross stands where a value does not exist, as for a step at which a layer is silent.
    """
    names = _chosen(list(similarity))
    steps = len(similarity[names[0]].cka)
    figure, panels = _panels(names, 2.0, 2.1)
    image = None
    for axes, name in zip(panels, names, strict=True):
        found = similarity[name]
        shown = np.where(np.tri(steps, k=-1, dtype=bool), found.rsa, found.cka)
        image = axes.imshow(shown, cmap="cividis", vmin=0, vmax=1)
        if steps <= 6:
            for (row, column), value in np.ndenumerate(shown):
                text = "x" if np.isnan(value) else f"{value:.2f}".replace("0.", ".").replace("1.00", "1")
                colour = "black" if value > 0.55 or np.isnan(value) else "white"
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
        ticks = range(0, steps, -(-steps // 6))
        axes.set_xticks(ticks, [str(i + 1) for i in ticks], fontsize=7)
        axes.set_yticks(ticks, [str(i + 1) for i in ticks], fontsize=7)
        axes.set_title(label(name), fontsize=7.5)
    if image is not None:
        figure.colorbar(image, ax=list(panels), shrink=0.5).set_label("above the diagonal CKA, below RSA")
    figure.supxlabel("time step", fontsize=9)
    figure.supylabel("time step", fontsize=9)
    return figure


def _chosen(names: list[str]) -> list[str]:
    if len(names) <= PANELS:
        return names
    return [names[i] for i in np.linspace(0, len(names) - 1, PANELS).round().astype(int)]


def _panels(names: list[str], width: float, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(width * columns + 1.0, height * rows + 0.5), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(names) :]:
        axes.remove()
    return figure, panels[: len(names)]
