"""How active the layers are, and what the network costs: operations layer by layer, and energy."""

from __future__ import annotations

import numpy as np

from spiking_mlp_jax.analysis.activity.measure import SPIKES, Rates, dead_and_saturated
from spiking_mlp_jax.analysis.report.markup import bar, number, percent, small_map, table, text
from spiking_mlp_jax.analysis.report.measure import Measured
from spiking_mlp_jax.deploy.cost import Cost

MANY = 30  # layers above which a table scrolls up and down
MAPS = 24


def activity(measured: Measured) -> str:
    """Firing rates by layer, step and token; units that never or always fire."""
    rates = measured.rates
    found = dead_and_saturated(rates)
    most = max([float(values.max()) for values in rates.step.values()] + [1e-9])
    steps = len(next(iter(rates.step.values())))
    marks = dict.fromkeys(found.silent_layers, "silent") | dict.fromkeys(found.saturated_layers, "saturated")
    rows = []
    for name, rate in rates.layer.items():
        mark = marks.get(name, "")
        each = [] if steps == 1 else [_shaded(value, most) for value in rates.step[name].tolist()]
        shares = found.units[name].shares()
        rows.append(
            (
                f"<code>{text(name.removesuffix(SPIKES))}</code>",
                bar(rate / most, kind="bad" if mark else ""),
                number(rate, percent(rate)) + (f" <strong>{mark}</strong>" if mark else ""),
                *each,
                *(number(shares[kind], percent(shares[kind])) for kind in ("dead_neurons", "saturated_neurons")),
            )
        )
    each = () if steps == 1 else tuple(f"step {t + 1}" for t in range(steps))
    told = "No layer is silent (below 0.1 %) or saturated (above 95 %)."
    if marks:
        silent, saturated = len(found.silent_layers), len(found.saturated_layers)
        told = f"Silent layers (below 0.1 %): {silent}; saturated ones (above 95 %): {saturated}."
    return (
        "<p>The firing rate is the share of a layer's neurons that spike in a time step, here the mean over "
        f"{measured.images:,} test images. {told} A neuron is called dead if it fired for none of these images, and "
        "saturated if it fired at every step of all of them.</p>"
        + table(
            ("layer", "", "mean", *each, "dead", "saturated"),
            rows,
            "Firing rate of each layer, from input to output",
            kind="bars",
            tall=len(rows) > MANY,
        )
        + _token_maps(rates)
    )


def _token_maps(rates: Rates) -> str:
    names = [name for name in rates.token if name.endswith((".encode.spikes", ".token.spikes", ".channel.spikes"))]
    if len(names) > MAPS:
        names = [names[i] for i in np.linspace(0, len(names) - 1, MAPS).round().astype(int)]
    most = max([float(rates.token[name].max()) for name in names] + [1e-9])
    maps = []
    for name in names:
        values = rates.token[name]
        told = f": {percent(float(values.min()))} to {percent(float(values.max()))}"
        maps.append(small_map(values, name.removesuffix(SPIKES), told, most))
    return f'<h3>Where in the image they fire</h3><div class="fields">{"".join(maps)}</div>'


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
        "published constants; the module deploy/energy.py lists the assumptions and what is left out.</p>"
    )
