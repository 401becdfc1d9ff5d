"""Figures of a sweep: accuracy against the varied field, operations, latency, and time steps in test.

Every seed is a point, a bar spans the seeds, and a larger mark is their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from spiking_mlp_jax.analysis import plots
from spiking_mlp_jax.analysis.plots import plain, write
from spiking_mlp_jax.sweep.plan import Sweep
from spiking_mlp_jax.sweep.table import MEASURES, Row, Spread

# With shapes, so that runs differ in greyscale too.
COLOURS = (*plots.COLOURS, plots.GREY, "#000000")
MARKERS = "osD^vPX*"


def plot_sweep(sweep: Sweep, table: Sequence[Row], folder: Path) -> list[Path]:
    """Draws the figures that have results as PNG files and returns their paths."""
    figures = {"accuracy": accuracy_figure(sweep, table)}
    figures["accuracy_operations"] = operations_figure(sweep, table)
    figures["accuracy_latency"] = latency_figure(sweep, table)
    figures["accuracy_time_steps"] = steps_figure(sweep, table)
    figures["time_steps"] = matrix_figure(sweep, table)
    return [write(figure, folder / f"{name}.png") for name, figure in figures.items() if figure is not None]


def accuracy_figure(sweep: Sweep, table: Sequence[Row]) -> Figure | None:
    """Accuracy against the sweep's x field, a line for each setting of the other fields; without x, by run.

    Args:
        sweep: the sweep.
        table: from `table.rows`. None is returned where no row has an accuracy.
    """
    table = [row for row in table if "accuracy" in row.measures]
    if not table:
        return None
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    if sweep.x is None:
        for index, row in enumerate(table):
            _draw(axes, index, row.measures["accuracy"], *_look(index), None, 0.15)
        turned: Mapping[str, Any] = dict(rotation=25, ha="right", rotation_mode="anchor") if len(table) > 4 else {}
        axes.set_xticks(range(len(table)), [label(sweep, row) for row in table], **turned)
        axes.set_xlim(-0.6, len(table) - 0.4)
        axes.set_xlabel(", ".join(sweep.varied) or "run")
    else:
        at = sweep.varied.index(sweep.x)
        groups: dict[Any, list[Row]] = {}
        for row in table:
            groups.setdefault(repr(row.values[:at] + row.values[at + 1 :]), []).append(row)
        ticks = sorted({row.values[at] for row in table})
        width = 0.012 * ((ticks[-1] - ticks[0]) or 1.0)
        for index, group in enumerate(groups.values()):
            group = sorted(group, key=lambda row: row.values[at])
            # Side by side where several have the same x.
            aside = 2.5 * width * (index - (len(groups) - 1) / 2)
            name = label(sweep, group[0], without=sweep.x) if len(groups) > 1 else None
            _line(axes, index, [(row.values[at] + aside, row.measures["accuracy"]) for row in group], name, width)
        if len(ticks) <= 10:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlabel({"time_steps": "time steps T"}.get(sweep.x, sweep.x))
        if len(groups) > 1:
            axes.legend(frameon=False, fontsize=8)
    _finish(axes, sweep, table)
    return figure


def operations_figure(sweep: Sweep, table: Sequence[Row]) -> Figure | None:
    """Accuracy against synaptic operations per image; None where nothing has them."""
    table = [row for row in table if {"accuracy", "synaptic_operations"} <= row.measures.keys()]
    if not table:
        return None
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, sweep, table, "synaptic_operations", "accuracy")
    axes.set_xlabel("synaptic operations per image (million)")
    _finish(axes, sweep, table)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def latency_figure(sweep: Sweep, table: Sequence[Row]) -> Figure | None:
    """Accuracy against time per image, one image at a time and in batches; filled marks: float, hollow ones: int8.

    None where nothing was timed.
    """
    table = [row for row in table if {"accuracy", "float_ms"} <= row.measures.keys()]
    if not table:
        return None
    figure = Figure(figsize=(10.4, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    kinds = (
        ("float_ms", "integer_ms", "one image at a time"),
        ("float_batch_ms", "integer_batch_ms", "a batch at a time"),
    )
    for axes, (floating, integer, title) in zip(panels, kinds, strict=True):
        _scatter(axes, sweep, table, floating, "accuracy")
        compiled = [row for row in table if {integer, "integer_accuracy"} <= row.measures.keys()]
        _scatter(axes, sweep, compiled, integer, "integer_accuracy", hollow=True, every=table)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        # Within a decade, 1, 2 and 5 may leave a single tick.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("milliseconds per image")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3, which="both")
        axes.set_axisbelow(True)
    panels[0].set_ylabel("test accuracy (%)")
    handles, names = panels[0].get_legend_handles_labels()
    handles += [
        panels[0].plot([], [], "o", color=plots.GREY)[0],
        panels[0].plot([], [], "o", color=plots.GREY, markerfacecolor="white")[0],
    ]
    figure.legend(
        handles,
        [*names, "float, jitted", "int8 engine"],
        loc="outside right upper",
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(f"{sweep.title}; {_seeds(table)}", fontsize=10, parse_math=False)
    return figure


def steps_figure(sweep: Sweep, table: Sequence[Row]) -> Figure | None:
    """Accuracy of every run against the time steps it is tested with; `matrix_figure` has the numbers.

    Args:
        sweep: the sweep.
        table: from `table.rows`. None is returned where there is one number of steps.
    """
    table = [row for row in table if row.by_time_steps]
    if not table or len(sweep.test_time_steps) == 1:
        return None
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.subplots()
    width = 0.012 * (sweep.test_time_steps[-1] - sweep.test_time_steps[0])
    for index, row in enumerate(table):
        aside = 1.5 * width * (index - (len(table) - 1) / 2)
        points = [(s + aside, row.by_time_steps[s]) for s in sweep.test_time_steps if s in row.by_time_steps]
        _line(axes, index, points, _train_label(sweep, row), width / 2)
    axes.set_xticks(sweep.test_time_steps)
    axes.set_xlabel("time steps T in test")
    _finish(axes, sweep, table)
    title = "trained with" if sweep.varied == ("time_steps",) else None
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, title=title)
    return figure


def matrix_figure(sweep: Sweep, table: Sequence[Row]) -> Figure | None:
    """Accuracy of every run (rows) tested with every number of time steps (columns); None where there is one.

    Args:
        sweep: the sweep.
        table: from `table.rows`.
    """
    table = [row for row in table if row.by_time_steps]
    if not table or len(sweep.test_time_steps) == 1:
        return None
    columns = sweep.test_time_steps
    means = np.array(
        [[100 * row.by_time_steps[s].mean if s in row.by_time_steps else np.nan for s in columns] for row in table]
    )
    size = 1.6 + 1.15 * len(columns) + 1.2, 1.5 + 0.62 * len(table)
    figure = Figure(figsize=(max(size[0], 5.4), max(size[1], 3.2)), layout="constrained")
    axes = figure.subplots()
    low, high = float(np.nanmin(means)), float(np.nanmax(means))
    image = axes.imshow(means, cmap="cividis", norm=Normalize(low, max(high, low + 1e-3)), aspect="auto")
    for y, row in enumerate(table):
        for x, steps in enumerate(columns):
            spread = row.by_time_steps.get(steps)
            dark = spread is not None and 100 * spread.mean <= low + 0.55 * (high - low)
            if spread is None:
                place: Mapping[str, Any] = dict(facecolor="#eeeeee", edgecolor="#bbbbbb", hatch="////", linewidth=0)
                axes.fill_between([x - 0.5, x + 0.5], y - 0.5, y + 0.5, **place)
            text = "n/a" if spread is None else f"{100 * spread.mean:.2f}"
            if spread is not None and spread.std is not None:
                text += f"\n± {100 * spread.std:.2f}"
            bold = "bold" if steps == row.time_steps else "normal"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black", weight=bold)
    axes.set_xticks(range(len(columns)), [str(steps) for steps in columns])
    axes.set_yticks(range(len(table)), [_train_label(sweep, row) for row in table])
    axes.set(xlabel="time steps in test", ylabel="trained with" if sweep.varied == ("time_steps",) else "run")
    axes.set_title(f"test accuracy (%), {_seeds(table)}; bold: as trained", fontsize=10)
    figure.colorbar(image, ax=axes, label="%")
    return figure


def label(sweep: Sweep, row: Row, without: str | None = None) -> str:
    """A run's values of the varied fields."""
    pairs = [(field, value) for field, value in zip(sweep.varied, row.values, strict=True) if field != without]
    if not pairs:
        return plain(row.name)
    shown = [f"T={value}" if field == "time_steps" else _value(field, value) for field, value in pairs]
    return plain(", ".join(shown))


def _value(field, value):
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    return f"{field} {value:g}" if is_number else value if isinstance(value, str) else f"{field} {value}"


def _train_label(sweep, row):
    name = label(sweep, row)
    return name if "time_steps" in sweep.varied else f"{name} (T={row.time_steps})"


def _scatter(axes: Axes, sweep: Sweep, table, across: str, up: str, hollow: bool = False, every=None) -> None:
    order = [row.name for row in (table if every is None else every)]
    factor = MEASURES[across][1]
    for row in table:
        colour, marker = _look(order.index(row.name))
        x, y = row.measures[across], row.measures[up]
        face = "white" if hollow else colour
        if len(x.values) == len(y.values):
            xs, ys = factor * np.array(x.values), 100 * np.array(y.values)
            axes.plot(xs, ys, marker, color=colour, markersize=3.5, alpha=0.6, markerfacecolor=face, zorder=2)
        middle = factor * x.mean, 100 * y.mean
        axes.plot([factor * x.low, factor * x.high], [middle[1]] * 2, color=colour, linewidth=1, zorder=1)
        axes.plot([middle[0]] * 2, [100 * y.low, 100 * y.high], color=colour, linewidth=1, zorder=1)
        name = None if hollow else label(sweep, row)
        style: Mapping[str, Any] = dict(markersize=8, markerfacecolor=face, markeredgecolor=colour, linestyle="none")
        axes.plot(*middle, marker=marker, color=colour, label=name, zorder=3, **style)


def _look(index: int) -> tuple[str, str]:
    """Colour and marker of a run or group; the first 64 differ."""
    return COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def _line(axes: Axes, index: int, points: Sequence[tuple[float, Spread]], name: str | None, width: float) -> None:
    """Draws spreads at several x and a line through their means."""
    colour, marker = _look(index)
    axes.plot([x for x, _ in points], [100 * y.mean for _, y in points], color=colour, linewidth=1.2, zorder=1)
    for i, (x, y) in enumerate(points):
        _draw(axes, x, y, colour, marker, None if i else name, width)


def _draw(axes: Axes, x: float, spread: Spread, colour: str, marker: str, name: str | None, width: float) -> None:
    """Draws seeds, their span and their mean at one x; the seeds spread up to `width` beside it."""
    values = 100 * np.array(spread.values)
    axes.plot([x, x], [values.min(), values.max()], color=colour, linewidth=1, zorder=1)
    xs = x + np.linspace(-width, width, len(values))
    axes.plot(xs, values, "o", color=colour, markersize=3.5, alpha=0.6, zorder=2)
    style: Mapping[str, Any] = dict(markersize=7, linestyle="none", markeredgecolor="white")
    axes.plot(x, values.mean(), marker=marker, color=colour, label=name, zorder=3, **style)


def _finish(axes: Axes, sweep: Sweep, table) -> None:
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"{sweep.title}; {_seeds(table)}", fontsize=10, parse_math=False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.margins(y=0.1)


def _seeds(table) -> str:
    counts = sorted({len(row.done) for row in table})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{many} seed{'s' * (counts[-1] > 1)}"
