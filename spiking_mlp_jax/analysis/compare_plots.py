"""A figure that compares training runs: how they learned, and what accuracy costs in synaptic operations."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from spiking_mlp_jax.analysis.activity.measure import in_network_order
from spiking_mlp_jax.analysis.neuron_plots import COLOURS
from spiking_mlp_jax.analysis.plots import GREY, running_mean
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
    """Synaptic operations of a mean test image, from the firing rates of a run's last evaluation.

    Args:
        workdir: of the run. See `synapses` for what is counted.

    Raises:
        InputError: there is no evaluation, or no weights.
    """
    config, _ = weights.read_config(Path(workdir) / "weights")
    rates = layer_rates(workdir)
    counts, reached = neuron_counts(config), fan_out(config)
    return config.time_steps * sum(rate * counts[name] * reached[name] for name, rate in rates.items())


def compare_runs(workdirs: Mapping[str, str | os.PathLike[str]]) -> Figure:
    """Training loss of several runs, and the test accuracy of each against its synaptic operations.

    Args:
        workdirs: of finished runs, by the name to print.

    Raises:
        InputError: there are none, or a run has no evaluation yet.
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
            label=name,
        )
        points.append((synaptic_operations(workdir) / 1e6, 100 * _evaluation(workdir)["accuracy"]))
        right.plot(*points[-1], "o", color=colour, markersize=8)
        right.annotate(name, points[-1], xytext=(8, -3), textcoords="offset points", fontsize=9)
    right.plot(*zip(*points, strict=True), color=GREY, linewidth=0.8, zorder=0)
    left.set(xlabel="training step", ylabel="loss, running mean")
    left.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    left.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    left.legend(frameon=False)
    right.set(xlabel="synaptic operations an image (million)", ylabel="test accuracy (%)")
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
