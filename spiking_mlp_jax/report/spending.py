"""How active the layers are, and what the network costs: operations layer by layer, and energy."""

from __future__ import annotations

import numpy as np

from spiking_mlp_jax.infer.cost import Cost
from spiking_mlp_jax.probe.activity import SPIKES
from spiking_mlp_jax.report.markup import bar, number, percent, table, text
from spiking_mlp_jax.report.measure import Measured
from spiking_mlp_jax.train.evaluate import silent_and_saturated

MANY = 30  # layers above which a table scrolls up and down


def activity(measured: Measured) -> str:
    """Firing rates by layer and by step."""
    means = {name: float(rates.mean()) for name, rates in measured.rates.items()}
    silent, saturated = silent_and_saturated(means)
    most = max([float(rates.max()) for rates in measured.rates.values()] + [1e-9])
    steps = len(next(iter(measured.rates.values())))
    rows = []
    for name, rates in measured.rates.items():
        mark = "silent" if name in silent else "saturated" if name in saturated else ""
        each = [] if steps == 1 else [_shaded(rate, most) for rate in rates.tolist()]
        rows.append(
            (
                f"<code>{text(name.removesuffix(SPIKES))}</code>",
                bar(means[name] / most, kind="bad" if mark else ""),
                number(means[name], percent(means[name])) + (f" <strong>{mark}</strong>" if mark else ""),
                *each,
            )
        )
    head = ("layer", "", "mean") + (() if steps == 1 else tuple(f"step {t + 1}" for t in range(steps)))
    told = "No layer is silent (below 0.1 %) or saturated (above 95 %)."
    if silent or saturated:
        told = f"{len(silent)} layers are silent (below 0.1 %), {len(saturated)} saturated (above 95 %)."
    return (
        "<p>The firing rate is the share of a layer's neurons that spike in a time step, here the mean over "
        f"{measured.images:,} test images. {told}</p>"
        + table(head, rows, "Firing rate of each layer, from input to output", kind="bars", tall=len(rows) > MANY)
    )


def _shaded(value, most):
    return f'<span class="shade" style="--p:{np.sqrt(value / most):.3f}">{percent(value)}</span>'


def spending(cost: Cost) -> str:
    """Operations layer by layer, and energy beside a dense and a non-spiking network."""
    total = cost.total
    layers = {name: layer for name, layer in cost.layers.items() if layer.Dense}
    most = max(layer.Dense for layer in layers.values())
    rows = [
        (
            f"<code>{text(name)}</code>",
            bar(layer.effective / most, layer.Dense / most),
            number(layer.effective, f"{layer.effective:,.0f}"),
            f"{layer.Dense:,.0f}",
            percent(layer.effective / layer.Dense),
            "multiply-accumulates" if layer.Effective_MACs else "accumulates",
        )
        for name, layer in layers.items()
    ]
    rows.append(
        (
            "total",
            "",
            number(total.effective, f"{total.effective:,.0f}", "operations"),
            f"{total.Dense:,.0f}",
            percent(total.effective / total.Dense),
            f"{total.Effective_ACs:,.0f} accumulates, {total.Effective_MACs:,.0f} multiply-accumulates",
        )
    )
    energy = cost.energy()
    highest = max(spent.with_memory for spent in energy.values())
    spent_rows = [
        (
            text(name),
            bar(spent.compute / highest, spent.with_memory / highest),
            f"{spent.compute / 1e6:.3g}",
            number(spent.with_memory, f"{spent.with_memory / 1e6:.3g}"),
        )
        for name, spent in energy.items()
    ]
    own, _, dense = energy.values()
    bits = (
        ""
        if total.activation_sparsity is None
        else f" {percent(total.activation_sparsity)} of its neurons' outputs are 0."
    )
    return (
        f"<p>Of {total.Dense:,.0f} pairs of an input and a weight, an image needs {total.effective:,.0f} "
        f"({percent(total.effective / total.Dense)}), because most inputs are not spiking.{bits} Names and definitions "
        f"are NeuroBench's; the counts are exact means over {cost.images:,} test images, evenly spaced, of the "
        f"{cost.network} network.</p>"
        + table(
            ("layer", "", "effective", "dense", "of dense", "kind"),
            rows,
            "Synaptic operations of a mean image, all time steps; faint: dense",
            kind="bars",
            tall=len(rows) > MANY,
        )
        + table(
            ("", "", "operations, µJ", "with memory, µJ"),
            spent_rows,
            f"Energy of an image, 45 nm, {text(cost.constants.name)}; faint: with memory",
            kind="bars",
        )
        + f"<p>An ANN of the same size that runs once takes {dense.compute / own.compute:.1f} times the energy in "
        f"operations, and {dense.with_memory / own.with_memory:.1f} times with memory. These are estimates from "
        "published constants; the module infer/energy.py lists the assumptions and what is left out.</p>"
    )
