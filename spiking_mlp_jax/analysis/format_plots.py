"""A figure of one network in several file formats: how large each file is, and whether it still says the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from spiking_mlp_jax.analysis.plots import BLUE, GREEN, GREY, ORANGE
from spiking_mlp_jax.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Ran(NamedTuple):
    """A network in one format, and what it answered.

    Attributes:
        path: of the file or folder.
        logits: of the images, averaged over the time steps.
    """

    path: Path
    logits: Float[np.ndarray, "B K"]


def formats_figure(ran: Mapping[str, Ran], labels: Int[np.ndarray, "B"]) -> Figure:
    """Size, accuracy and agreement of each format, one row each.

    Args:
        ran: by the format's name; the first is what the others are compared with.
        labels: classes of the images.

    Raises:
        InputError: there are none, or they answered for other numbers of images or classes.
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
        "right (%)": ([100 * np.mean(found == labels) for found in classes.values()], GREEN, "{:.1f}"),
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
    axes.set_yticks(rows, list(ran), fontsize=9)
    axes.set_ylim(len(ran) - 0.4, -0.6)
    return figure


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
