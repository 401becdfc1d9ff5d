"""Figures that compare training runs, or the file formats of one network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from spiking_mlp_jax.analysis.activity.stream import in_network_order
from spiking_mlp_jax.analysis.plots import BLUE, COLOURS, GREEN, GREY, ORANGE, plain, running_mean
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.topology import fan_out, neuron_counts
from spiking_mlp_jax.train.logging import read_metrics


def layer_rates(workdir: str | os.PathLike[str]) -> dict[str, float]:
    """Mean firing rate of each layer in a run's last evaluation, in the order of the network.

    Args:
        workdir: of the run.

    Raises:
        InputError: there is no evaluation, or no weights.
    """
    config, _ = weights.read_config(Path(workdir) / "weights")
    return in_network_order(_evaluation(workdir)["firing_rates"], config)


def synaptic_operations(workdir: str | os.PathLike[str]) -> float:
    """Mean synaptic operations of a test image, from the firing rates of a run's last evaluation.

    Args:
        workdir: of the run. `models.topology` says what is counted.

    Raises:
        InputError: there is no evaluation, or no weights.
    """
    config, _ = weights.read_config(Path(workdir) / "weights")
    rates = layer_rates(workdir)
    counts, reached = neuron_counts(config), fan_out(config)
    return config.time_steps * sum(rate * counts[name] * reached[name] for name, rate in rates.items())


def compare_runs(workdirs: Mapping[str, str | os.PathLike[str]]) -> Figure:
    """Training loss of several runs, and test accuracy against synaptic operations.

    Args:
        workdirs: of finished runs, by their label.

    Raises:
        InputError: there are no runs, or a run has no evaluation.
    """
    if not workdirs:
        raise InputError("there are no runs to compare: give at least one workdir")
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    points = []
    for i, (name, workdir) in enumerate(workdirs.items()):
        colour = COLOURS[i % len(COLOURS)]
        lines = [line for line in read_metrics(workdir) if line["split"] == "train" and line.get("loss") is not None]
        left.plot(
            [line["step"] for line in lines],
            running_mean(np.array([line["loss"] for line in lines])),
            color=colour,
            label=plain(name),
        )
        points.append((synaptic_operations(workdir) / 1e6, 100 * _evaluation(workdir)["accuracy"]))
        right.plot(*points[-1], "o", color=colour, markersize=8)
        right.annotate(plain(name), points[-1], xytext=(8, -3), textcoords="offset points", fontsize=9)
    right.plot(*zip(*points, strict=True), color=GREY, linewidth=0.8, zorder=0)
    left.set(xlabel="training step", ylabel="loss, running mean")
    left.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    left.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    left.legend(frameon=False)
    right.set(xlabel="synaptic operations per image (million)", ylabel="test accuracy (%)")
    right.margins(x=0.25, y=0.2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def _evaluation(workdir):
    path = Path(workdir) / "evaluation.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): give the workdir of a finished run") from error


class Ran(NamedTuple):
    """A network in one format, and its logits.

    Attributes:
        path: of the file or folder.
        logits: of each image, mean over time steps.
    """

    path: Path
    logits: Float[np.ndarray, "B K"]


def formats_figure(ran: Mapping[str, Ran], labels: Int[np.ndarray, "B"]) -> Figure:
    """Size, accuracy and agreement of each format.

    Args:
        ran: by label; the others are compared with the first.
        labels: classes of the images.

    Raises:
        InputError: there are no formats, or they have logits of other numbers of images or classes.
    """
    if not ran:
        raise InputError("there are no formats to draw: give at least one")
    first = next(iter(ran.values())).logits
    for name, one in ran.items():
        if one.logits.shape != first.shape or len(labels) != len(first):
            raise InputError(f'"{name}" answered {one.logits.shape} for {len(labels)} images, the first {first.shape}')
    classes = {name: one.logits.argmax(1) for name, one in ran.items()}
    expected = first.argmax(1)
    panels = {
        "size (kB)": ([_size(one.path) / 1000 for one in ran.values()], BLUE, "{:,.0f}"),
        "accuracy (%)": ([100 * np.mean(found == labels) for found in classes.values()], GREEN, "{:.1f}"),
        "same class as the first (%)": ([100 * np.mean(x == expected) for x in classes.values()], ORANGE, "{:.1f}"),
        "largest difference of a logit": ([np.abs(one.logits - first).max() for one in ran.values()], GREY, "{:.2g}"),
    }
    figure = Figure(figsize=(11.5, 1.3 + 0.36 * len(ran)), layout="constrained")
    rows = np.arange(len(ran))
    for axes, (title, (values, colour, form)) in zip(figure.subplots(1, 4, sharey=True), panels.items(), strict=True):
        axes.barh(rows, values, height=0.7, color=colour)
        for row, value in enumerate(values):
            text = form.format(value) if value else "0"
            axes.annotate(text, (value, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_xlim(0, 1.3 * max(*values, 1e-30))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    axes = figure.axes[0]
    axes.set_yticks(rows, [plain(name) for name in ran], fontsize=9)
    axes.set_ylim(len(ran) - 0.4, -0.6)
    return figure


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
