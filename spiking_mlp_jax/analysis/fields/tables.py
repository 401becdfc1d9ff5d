"""The tables of a study of receptive fields that the command prints."""

from __future__ import annotations

from typing import Any

from spiking_mlp_jax.analysis.fields.study import KINDS, NETWORKS


def table(document: dict[str, Any]) -> str:
    """The short tables that the command prints; they are Markdown too."""
    layers = document["settings"]["layers"]
    texts = [
        "Effective receptive fields: radius in pixels that holds 50 % and 90 % of the mean squared gradient.",
        _sizes(document["effective_fields"], layers),
        "Units whose spike-triggered average (white noise) or linear field (images) is above all controls, of those "
        "with enough spikes; in brackets the median share of its energy that is not chance, or of the held-out spike "
        "counts' variance that it predicts.",
        _driven(document["spikes"], layers),
        "Units whose spike-triggered covariance has axes beyond the average: with more, and with less variance than "
        "all controls; of those with enough spikes.",
        _axes(document["covariance"], layers),
        f"Share of fields that a Gabor explains (R^2 of at least {document['settings']['limit']}); in brackets without "
        "blobs, and the median R^2. p: one-sided Mann-Whitney, R^2 of the trained above untrained, above the shuffle.",
        _explained(document["gabors"], layers),
        "Mixing weights, height and width: their correlation with the untrained network's; their energy at most one "
        "token away; and Gabors, as above, in the outer products of both.",
        _mixed(document["mixing"]),
    ]
    stem = document["stem"]
    if "why_not" in stem:
        texts.append(f"No Gabors are fitted to the stem's kernels: {stem['why_not']}.")
    else:
        shares = ", ".join(f"{name.replace('_', ' ')} {_share(stem[name])}" for name in stem if name != "kernel")
        texts.append(f"The same for the stem's kernels: {shares}.")
    return "\n\n".join(texts)


def _sizes(fields, layers) -> str:
    kinds = ("half", "ninety")
    sizes = {layer: [fields[name][layer] for name in NETWORKS] for layer in layers}
    rows = [
        [layer, *(f"{size[key]:.1f}" if size else "-" for size in found for key in kinds)]
        for layer, found in sizes.items()
    ]
    uniform = [f"{fields['uniform'][key]:.1f}" for key in ("half", "ninety")]
    header = ["layer", "trained 50 %", "90 %", "untrained 50 %", "90 %"]
    return _grid(header, [*rows, ["if uniform", *uniform, *uniform]])


def _driven(spikes, layers) -> str:
    rows = []
    for layer in layers:
        entries = [spikes[name][layer][kind] for name in NETWORKS for kind in KINDS[:2]]
        cells = [
            f"{e['significant']}/{e['tested']}" + ("" if e["signal"] is None else f" ({e['signal']:.2f})")
            for e in entries
        ]
        rows.append([layer, *cells])
    return _grid(["layer", *(f"{name}, {kind}" for name in NETWORKS for kind in KINDS[:2])], rows)


def _axes(changes, layers) -> str:
    rows = []
    for layer in layers:
        entries = [changes[name][layer][kind] for name in NETWORKS for kind in KINDS[:2]]
        rows.append([layer, *("-" if entry is None else _counted(entry) for entry in entries)])
    return _grid(["layer", *(f"{name}, {kind}" for name in NETWORKS for kind in KINDS[:2])], rows)


def _counted(entry) -> str:
    more, less = (sum(count > 0 for count in entry[key]) for key in ("excitatory", "suppressive"))
    return f"{more} and {less} of {entry['units']}"


def _explained(shapes, layers) -> str:
    rows = []
    for layer in layers:
        for kind in KINDS:
            trained, untrained = (shapes[name][layer][kind] for name in NETWORKS)
            cells = [trained["field"], untrained["field"], trained["pixels"], trained.get("spikes")]
            p = [trained["p_above_untrained"], trained["p_above_pixels"]]
            rows.append([layer, kind, *map(_share, cells), ", ".join("-" if x is None else f"{x:.1g}" for x in p)])
    return _grid(["layer", "field", "trained", "untrained", "in-patch shuffle", "spikes shifted", "p"], rows)


def _mixed(mixing) -> str:
    rows = []
    for block, entry in mixing.items():
        near = [f"{100 * entry[name][axis]['within_1']:.0f} %" for name in NETWORKS for axis in ("height", "width")]
        expected = f"{100 * entry['trained']['height']['within_1_expected']:.0f} %"
        fits = [
            _share(entry[n].get(f"gabors_{k}")) for n, k in (*((n, "field") for n in NETWORKS), ("trained", "pixels"))
        ]
        start = [f"{entry['trained'][axis]['correlation_with_untrained']:.2f}" for axis in ("height", "width")]
        rows.append([block, ", ".join(start), f"{near[0]}, {near[1]}", f"{near[2]}, {near[3]}", expected, *fits])
    header = [
        "block",
        "correlation",
        "near: trained",
        "untrained",
        "if equal",
        "Gabors: trained",
        "untrained",
        "pixels shuffled",
    ]
    return _grid(header, rows)


def _share(cell) -> str:
    if cell is None or cell["explained"] is None:
        return "-"
    return f"{100 * cell['explained']:.0f} % ({100 * cell['oriented']:.0f} %; {cell['median_r2']:.2f})"


def _grid(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (header, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
