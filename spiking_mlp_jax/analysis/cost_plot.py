"""Figure of a network's operations and energy."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from spiking_mlp_jax.analysis.plots import BLUE, GREEN, GREY, ORANGE, RED, beside, name_rows, plain
from spiking_mlp_jax.deploy.cost import Cost


def cost_figure(cost: Cost) -> Figure:
    """Effective and dense operations of each layer, and energy per image.

    Args:
        cost: from `deploy.cost.cost`. Layers without weights are not shown.
    """
    layers = {name: layer for name, layer in cost.layers.items() if layer.Dense}
    many = len(layers) > 50
    figure = Figure(figsize=(11.5, max(4.6, 1.5 + (0.11 if many else 0.24) * len(layers))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])

    rows = np.arange(len(layers))
    macs = np.array([layer.Effective_MACs for layer in layers.values()])
    acs = np.array([layer.Effective_ACs for layer in layers.values()])
    dense = np.array([layer.Dense for layer in layers.values()])
    left.barh(rows, dense, color="#dddddd", height=0.8, label="dense: all inputs")
    left.barh(rows, acs, color=BLUE, height=0.5, label="effective accumulates")
    left.barh(rows, macs, color=RED, height=0.5, left=acs, label="effective multiply-accumulates")
    size = 5 if many else 7.5
    for row, (done, all_pairs) in enumerate(zip(macs + acs, dense, strict=True)):
        beside(left, f"{100 * done / all_pairs:.0f} %", all_pairs, row, size)
    name_rows(left, list(layers), size)
    left.set_xlim(0, 1.1 * dense.max())
    left.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    left.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    left.set(xlabel=f"synaptic operations per image, {cost.time_steps} time steps")
    share = (cost.total.effective) / cost.total.Dense
    left.set_title(
        f"{cost.total.effective:,.0f} of {cost.total.Dense:,.0f} are effective ({100 * share:.1f} %)", fontsize=10
    )
    left.grid(axis="x", alpha=0.3)
    left.set_axisbelow(True)
    left.legend(
        frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12 if not many else -0.05), ncols=3
    )

    energy = cost.energy()
    parts = {"stem": RED, "body": BLUE, "head": ORANGE, "weights": GREY, "potentials": GREEN}
    labels = {
        "stem": "stem",
        "body": "layers between",
        "head": "head",
        "weights": "fetching weights",
        "potentials": "potentials, activations",
    }
    ticks, names = [], []
    for group, (name, spent) in enumerate(energy.items()):
        for memory in (False, True):
            x, bottom = group + (0.2 if memory else -0.2), 0.0
            for part, colour in parts.items():
                if part in ("weights", "potentials") and not memory:
                    continue
                value = getattr(spent, part) / 1e6
                label = labels[part] if memory and not group else None
                right.bar(x, value, 0.36, bottom=bottom, color=colour, label=label)
                bottom += value
            text = f"{bottom:.3g}"
            right.annotate(
                text, (x, bottom), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8, weight="bold"
            )
        ticks.append(group)
        names.append(name.replace(", ", ",\n"))
    right.set_xticks(ticks, names, fontsize=9)
    right.set_ylabel("energy per image (µJ)")
    right.set_title(
        f"45 nm, {plain(cost.constants.name)}\nleft bar: operations only, right bar: with memory", fontsize=10
    )
    right.grid(axis="y", alpha=0.3)
    right.set_axisbelow(True)
    right.margins(y=0.1)
    right.legend(frameon=False, fontsize=8)
    return figure
