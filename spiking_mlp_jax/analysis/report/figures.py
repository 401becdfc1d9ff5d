"""Small figures for a report: one axes each, so that they stand side by side or, on a phone, one below the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from spiking_mlp_jax.analysis.plots import BLUE, curve

WIDTH, HEIGHT = 4.2, 3.0  # inches


def learning_curve(records: Sequence[Mapping[str, Any]], key: str) -> Figure:
    """Loss or accuracy over the training steps, as `probe.plots.learning_curves` draws them.

    Args:
        records: lines of metrics.jsonl.
        key: "loss" or "accuracy".
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    curve(figure.subplots(), records, key)
    return figure


def accuracy_by_step(accuracy: Sequence[float]) -> Figure:
    """Accuracy if only the first 1, 2, ... T steps are counted.

    Args:
        accuracy: [T], 0 to 1.
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    steps, values = range(1, len(accuracy) + 1), [100 * value for value in accuracy]
    axes.plot(steps, values, "o-", color=BLUE, linewidth=1.8, markersize=6)
    for step, value in zip(steps, values, strict=True):
        if len(values) <= 8 or step in (1, len(values)):
            # Below a point from which the line rises, so that it does not cross the number.
            below = step < len(values) and values[step] > value
            place = (10, -14) if below else (0, 7)
            axes.annotate(f"{value:.1f}", (step, value), xytext=place, textcoords="offset points", ha="center")
    axes.set(xlabel="time steps counted", ylabel="test accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.1, y=0.2)
    axes.grid(alpha=0.3)
    return figure
