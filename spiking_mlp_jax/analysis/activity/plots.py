"""Figures of a network's activity: one row per layer, then one panel per layer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from spiking_mlp_jax.analysis.activity.measure import Activity, Information
from spiking_mlp_jax.analysis.activity.membrane import Membrane
from spiking_mlp_jax.analysis.activity.rates import DeadAndSaturated, Rates
from spiking_mlp_jax.analysis.activity.similarity import Similarity
from spiking_mlp_jax.analysis.activity.stream import spikes_of_first
from spiking_mlp_jax.analysis.activity.trains import Intervals
from spiking_mlp_jax.analysis.plots import BLUE, GREEN, GREY, ORANGE, RED, beside, label, name_rows, spike_raster, write
from spiking_mlp_jax.analysis.samples import labelled_batches
from spiking_mlp_jax.data.sources import Source, spaced
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.train.logging import to_json
from spiking_mlp_jax.utils.files import write_whole
from spiking_mlp_jax.utils.settings import usual_settings

MANY = 50  # layers above which rows are narrower
PANELS, COLUMNS = 24, 5


def step_colours(steps: int) -> list[str]:
    """A colour-blind safe colour for each time step: up to 5 of Okabe and Ito, otherwise dark to light."""
    if steps <= 5:
        return [BLUE, ORANGE, GREEN, RED, GREY][:steps]
    ramp = matplotlib.colormaps["cividis"]
    return [matplotlib.colors.to_hex(ramp(i / (steps - 1))) for i in range(steps)]


def rates_by_step(rates: Rates) -> Figure:
    """Heat map of the firing rate of each layer at each step."""
    names = list(rates.step)
    values = 100 * np.array([rates.step[name] for name in names])
    steps = values.shape[1]
    figure, size = _rows(names, 3.6 + 0.55 * min(steps, 16))
    axes = figure.subplots()
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=max(float(values.max()), 1), aspect="auto")
    name_rows(axes, names, size)
    ticks = range(0, steps, -(-steps // 16))
    axes.set_xticks(ticks, [str(step + 1) for step in ticks])
    axes.set_xlabel("time step")
    if steps <= 16:
        dark = 0.6 * max(float(values.max()), 1)
        for (row, step), value in np.ndenumerate(values):
            colour = "white" if value > dark else "black"
            axes.text(step, row, _percent(value), ha="center", va="center", fontsize=size, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.6).set_label("neurons that fire (%)")
    axes.set_title(f"firing rate by time step (%), {rates.images:,} images", fontsize=10)
    return figure


def channel_rates(rates: Rates, found: DeadAndSaturated) -> Figure:
    """Firing rate of every channel, and each layer's share of dead and saturated neurons.

    Args:
        rates: over some images.
        found: from `dead_and_saturated` of these rates.
    """
    names = list(rates.channel)
    figure, size = _rows(names, 10.2)
    left, right = figure.subplots(1, 2, width_ratios=[2.2, 1])
    for row, name in enumerate(names):
        values = 100 * rates.channel[name]
        left.plot(values, np.full(len(values), row), "|", color=BLUE, markersize=9 * size / 8, alpha=0.6)
        left.plot([100 * rates.layer[name]], [row], "D", color="black", markersize=3.5, zorder=3)
    marks = {
        "dead_channels": ("x", RED, "silent channel" if found.dead == 0 else f"rate <= {found.dead:g}"),
        "saturated_channels": (
            "s",
            ORANGE,
            "channel that always fires" if found.saturated == 1 else f"rate >= {found.saturated:g}",
        ),
    }
    for kind, (marker, colour, text) in marks.items():
        points = [(100 * rate, row) for row, name in enumerate(names) for rate in _rates_of(rates, found, name, kind)]
        if points:
            left.plot(*np.array(points).T, marker, color=colour, markersize=6, markeredgewidth=1.6, label=text)
    left.plot([], [], "|", color=BLUE, markersize=9, label="channel")
    left.plot([], [], "D", color="black", markersize=3.5, label="layer's mean")
    name_rows(left, names, size)
    left.set(xlabel="firing rate of a channel (%)", xlim=(-1.5, None))
    left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    left.grid(axis="x", alpha=0.3)
    _stop_at_100(left.xaxis)

    shares = [found.units[name].shares() for name in names]
    start = np.zeros(len(names))
    for kind, colour in (("dead_neurons", RED), ("saturated_neurons", ORANGE)):
        width = 100 * np.array([share[kind] for share in shares])
        text = kind.replace("_", " ")
        right.barh(range(len(names)), width, left=start, color=colour, height=0.7, label=text)
        start = start + width
    for row, share in enumerate(shares):
        texts = [_percent(100 * share[kind]) for kind in ("dead_neurons", "saturated_neurons") if share[kind] > 0]
        beside(right, " + ".join(texts), start[row], row, size)
    right.set_yticks([])
    right.set_ylim(left.get_ylim())
    right.set_xlim(0, max(1.25 * float(start.max()), 1))
    right.set_xlabel(f"neurons (%), over {rates.images:,} images")
    _stop_at_100(right.xaxis)
    right.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    right.grid(axis="x", alpha=0.3)
    right.set_axisbelow(True)
    return figure


def spike_trains(intervals: Mapping[str, Intervals]) -> Figure:
    """Spikes per neuron and image, and the intervals between them.

    Args:
        intervals: from `trains.intervals`; without intervals for T = 1.
    """
    names = list(intervals)
    first = intervals[names[0]]
    steps = first.steps
    figure, size = _rows(names, 11.5)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1])
    # The rest of each bar is silent trains.
    start = np.zeros(len(names))
    colours = step_colours(steps)
    for count in range(1, steps + 1):
        width = 100 * np.array([intervals[name].count_shares[count] for name in names])
        left.barh(range(len(names)), width, left=start, color=colours[count - 1], height=0.7, label=str(count))
        start = start + width
    for row, name in enumerate(names):
        independent = 100 * (1 - intervals[name].independent_counts()[0])
        left.plot([independent], [row], "|", color="black", markersize=9, markeredgewidth=1.6)
    left.plot(
        [], [], "|", color="black", markersize=9, markeredgewidth=1.6, label="at least one, if spikes were independent"
    )
    name_rows(left, names, size)
    left.set_xlabel(f"neurons by number of spikes in the {steps} step{'s' * (steps > 1)} of an image (%)")
    _legend(left, steps + 1)
    left.grid(axis="x", alpha=0.3)
    left.set_axisbelow(True)

    start = np.zeros(len(names))
    for length in range(1, steps):
        totals = np.array([max(intervals[name].lengths.sum(), 1) for name in names])
        width = 100 * np.array([intervals[name].lengths[length - 1] for name in names]) / totals
        right.barh(range(len(names)), width, left=start, color=colours[length - 1], height=0.7, label=str(length))
        start = start + width
    right.set_ylim(left.get_ylim())
    right.set_yticks([])
    right.set_xlabel("inter-spike intervals by length in steps (%)")
    if steps > 1:
        right.set_xlim(0, 100)
        _legend(right, steps)
    else:
        right.set_xticks([])
        right.text(0.5, 0.5, "one step: no intervals", transform=right.transAxes, ha="center", color=GREY)
    right.grid(axis="x", alpha=0.3)
    right.set_axisbelow(True)
    return figure


def accuracy_per_step(information: Information) -> Figure:
    """Accuracy, agreement, loss and mutual information by number of steps."""
    steps = np.arange(1, len(information.accuracy) + 1)
    figure = Figure(figsize=(10.2, 3.7), layout="constrained")
    accuracy, loss, bits = figure.subplots(1, 3)
    accuracy.errorbar(
        steps,
        100 * information.accuracy,
        100 * information.errors,
        fmt="o-",
        color=BLUE,
        markersize=5,
        capsize=3,
        label="steps so far, ± standard error",
    )
    accuracy.plot(steps, 100 * information.alone, "s--", color=ORANGE, markersize=4, label="this step alone")
    accuracy.plot(
        steps, 100 * information.agreement, "^:", color=GREY, markersize=5, label="same class as after all steps"
    )
    accuracy.set(ylabel="images (%)", title=f"accuracy, {information.images:,} images")
    accuracy.legend(frameon=False, fontsize=8)
    for step in steps if len(steps) <= 8 else steps[[0, -1]]:
        value = 100 * information.accuracy[step - 1]
        accuracy.annotate(
            f"{value:.1f}", (step, value), xytext=(-4, 5), textcoords="offset points", ha="right", fontsize=8
        )
    loss.plot(steps, information.loss, "o-", color=RED, markersize=5)
    loss.set(ylabel="cross-entropy (nats)", title="loss of the logits so far")
    bits.plot(steps, information.mutual_information, "o-", color=GREEN, markersize=5, label="bias corrected")
    bits.plot(steps, information.plug_in_information, "--", color=GREEN, linewidth=1, label="plug-in")
    bits.axhline(information.label_entropy, color=GREY, linewidth=1)
    bits.annotate(
        "entropy of the labels",
        (steps[0], information.label_entropy),
        xytext=(0, -10),
        textcoords="offset points",
        fontsize=8,
        color=GREY,
    )
    bits.set(ylabel="bits", title="information on the class", ylim=(0, None))
    bits.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in (accuracy, loss, bits):
        axes.set_xlabel("time steps")
        axes.set_xlim(0.5, steps[-1] + 0.5)
        axes.set_xticks(range(1, len(steps) + 1, -(-len(steps) // 8)))
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)
        if axes is not bits:
            axes.margins(y=0.2)
    _stop_at_100(accuracy.yaxis)
    return figure


def _rows(names: Sequence[str], width: float) -> tuple[Figure, float]:
    """A figure as high as its rows need, and their font size."""
    many = len(names) > MANY
    figure = Figure(figsize=(width, 1.5 + (0.12 if many else 0.23) * len(names)), layout="constrained")
    return figure, 5 if many else 8


def _rates_of(rates, found, name, kind):
    return rates.channel[name][getattr(found.units[name], kind)]


def _percent(value: float) -> str:
    """Two or three digits; only exact 0 and 100 look like it."""
    if 0 < value < 0.05:
        return "<0.1"
    if 99.95 <= value < 100:
        return ">99.9"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _stop_at_100(axis: Axis) -> None:
    """Removes ticks above 100 %."""
    low, high = axis.get_view_interval()
    axis.set_ticks([tick for tick in axis.get_majorticklocs() if low <= tick <= min(high, 100)])


def _legend(axes: Axes, entries: int) -> None:
    handles, texts = axes.get_legend_handles_labels()
    order = sorted(range(len(texts)), key=lambda i: not texts[i].isdigit())
    axes.legend(
        [handles[i] for i in order],
        [texts[i] for i in order],
        frameon=False,
        fontsize=8,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=min(entries, 9),
        handlelength=1,
    )


def token_maps(rates: Rates) -> Figure:
    """Where in the image each layer fires, mean over channels, steps and images; at most 24 layers, evenly spaced.

    All maps share one colour scale.
    """
    names = _chosen(rates.token)
    most = 100 * max(float(rates.token[name].max()) for name in names)
    figure, panels = _panels(names, len(rates.token), 2.0, 2.05)
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
    """Membrane potentials before firing, one line per step; at most 24 layers, evenly spaced.

    Densities on a logarithmic scale; the first and last bin include all values beyond.
    """
    names = _chosen(membrane.counts)
    steps = len(membrane.counts[names[0]])
    colours = step_colours(steps)
    width = np.diff(membrane.edges)
    figure, panels = _panels(names, len(membrane.counts), 2.4, 1.85)
    for axes, name in zip(panels, names, strict=True):
        axes.axvspan(membrane.v_threshold, membrane.edges[-1], color="#f6e3da", linewidth=0)
        axes.axvline(membrane.v_threshold, color="black", linewidth=1, linestyle="--")
        for step, counts in enumerate(membrane.counts[name]):
            density = counts / counts.sum() / width
            # Gaps in place of zeros on a logarithmic axis.
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
    figure.supxlabel("membrane potential before firing; the outermost bins include all values beyond", fontsize=9)
    figure.supylabel("density", fontsize=9)
    return figure


def similarity_matrices(similarity: Mapping[str, Similarity]) -> Figure:
    """Similarity of the time steps: CKA on and above the diagonal, RSA below; at most 24 layers, evenly spaced.

    A cross marks undefined values, e.g. of a step at which a layer is silent.
    """
    names = _chosen(similarity)
    steps = len(similarity[names[0]].cka)
    figure, panels = _panels(names, len(similarity), 2.0, 2.1)
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
        figure.colorbar(image, ax=list(panels), shrink=0.5).set_label("CKA above the diagonal, RSA below")
    figure.supxlabel("time step", fontsize=9)
    figure.supylabel("time step", fontsize=9)
    return figure


def _chosen(layers: Mapping[str, Any]) -> list[str]:
    names = list(layers)
    return [names[i] for i in spaced(len(names), PANELS)]


def _panels(names: list[str], of: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(width * columns + 1.0, height * rows + 0.5), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(names) :]:
        axes.remove()
    if len(names) < of:
        figure.suptitle(f"{len(names)} of {of} layers, evenly spaced", fontsize=9)
    return figure, panels[: len(names)]


def figures(activity: Activity) -> dict[str, Figure]:
    """All figures that the activity has data for, by file name."""
    found = {
        "rates_by_step": rates_by_step(activity.rates),
        "token_maps": token_maps(activity.rates),
        "channel_rates": channel_rates(activity.rates, activity.units),
        "spike_trains": spike_trains(activity.intervals),
        "membrane": membrane_histograms(activity.membrane),
    }
    if activity.information is not None:
        found["accuracy_per_step"] = accuracy_per_step(activity.information)
    # A single step only compares with itself.
    if activity.similarity and len(next(iter(activity.similarity.values())).cka) > 1:
        found["similarity"] = similarity_matrices(activity.similarity)
    return found


@usual_settings()
def raster(model: SpikingMLP, source: Source, data: dict[str, Any], class_names: Sequence[str]) -> Figure:
    """Spike raster of a source's first image that can be decoded."""
    images, labels = next(labelled_batches(source, model.config, data, 1))
    logits, spikes = spikes_of_first(model, jnp.asarray(images))
    predicted = class_names[int(logits.mean(0)[0].argmax())]
    pixels = images[0] * np.asarray(data["std"]) + np.asarray(data["mean"])
    title = f"true: {class_names[int(labels[0])]}\npredicted: {predicted}"
    return spike_raster(np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8), spikes, title)


def save(folder: str | os.PathLike[str], drawn: dict[str, Figure], document: dict[str, Any]) -> list[Path]:
    """Writes figures as PNG and, last, activity.json; returns the files.

    Args:
        folder: created if missing.
        drawn: figures by name.
        document: JSON values; NaN becomes null.

    Raises:
        InputError: a file cannot be written.
    """
    paths = [write(figure, Path(folder) / f"{name}.png") for name, figure in drawn.items()]
    write_whole(Path(folder) / "activity.json", to_json(document) + "\n")
    return [*paths, Path(folder) / "activity.json"]
