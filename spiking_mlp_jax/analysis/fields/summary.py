"""Results of a receptive-field study as JSON and as tables."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

from spiking_mlp_jax.analysis.fields.effective import field_size
from spiking_mlp_jax.analysis.fields.gabor import SMALLEST, Gabor
from spiking_mlp_jax.analysis.fields.mixing import convolution_share, energy_within, mean_profile
from spiking_mlp_jax.analysis.fields.study import CONTROLS, FIT_COLUMNS, KINDS, NETWORKS, Arrays, Settings
from spiking_mlp_jax.models.config import ModelConfig

LIMIT = 0.5  # R^2 from which a Gabor explains a field
NAMES = {
    "noise": "spike-triggered average, white noise",
    "images": "linear field, natural images",
    "gradient": "mean gradient, natural images",
}


def gabors(fits: np.ndarray) -> list[Gabor | None]:
    """Rows of FIT_COLUMNS as Gabor functions; None for rows without a fit."""
    return [None if np.isnan(row).any() else Gabor(**dict(zip(FIT_COLUMNS, row.tolist(), strict=True))) for row in fits]


def fit_summary(fits: np.ndarray, limit: float = LIMIT) -> dict[str, Any]:
    """Statistics of a set of fits.

    Args:
        fits: [units, FIT_COLUMNS].
        limit: R^2 from which a Gabor explains a field.

    Returns:
        units, fitted: numbers; median_r2 of the fitted ones; explained: share of these at or above the limit; oriented:
        share of these that are also band-pass, i.e. no blobs; medians over the oriented ones.
    """
    found = [gabor for gabor in gabors(fits) if gabor is not None]
    good = [gabor for gabor in found if gabor.explained >= limit]
    bars = [gabor for gabor in good if gabor.band_pass]

    def median(values):
        values = list(values)
        return float(np.median(values)) if values else None

    finite = [g.bandwidth for g in bars if math.isfinite(g.bandwidth)]
    return {
        "units": len(fits),
        "fitted": len(found),
        "median_r2": median(g.explained for g in found),
        "explained": len(good) / len(found) if found else None,
        "oriented": len(bars) / len(found) if found else None,
        "frequency": median(g.frequency for g in bars),
        "bandwidth": median(finite),
        "nx": median(g.nx for g in bars),
        "ny": median(g.ny for g in bars),
        "aspect": median(g.aspect for g in bars),
    }


def higher(fits: np.ndarray, others: np.ndarray) -> float | None:
    """One-sided Mann-Whitney test that R^2 is higher in one set of fits than in the other.

    Args:
        fits: [units, FIT_COLUMNS].
        others: likewise, of any number of units.

    Returns:
        p; None if either has fewer than 2 fits.
    """
    one, two = (table[np.isfinite(table[:, -1]), -1] for table in (fits, others))
    if min(len(one), len(two)) < 2:
        return None
    return float(mannwhitneyu(one, two, alternative="greater").pvalue)


def summarize(parts: dict[str, Arrays], config: ModelConfig, settings: Settings, layers: list[str]) -> dict[str, Any]:
    """The results of a study as JSON values.

    Args:
        parts: from `study`.
        config: of the network.
        settings: of the study.
        layers: the measured layers.

    Returns:
        settings; mixing, of each block; effective_fields, spikes, covariance and gabors by network and layer; stem.
    """
    fields, spikes, changed, shapes = ({name: {} for name in NETWORKS} for _ in range(4))
    for name in NETWORKS:
        for layer in layers:
            seen = parts[f"{name}/gradient"][f"map {layer}"]
            fields[name][layer] = dataclasses.asdict(field_size(seen)) if seen.any() else None  # no pixel moves it
            spikes[name][layer], changed[name][layer], shapes[name][layer] = {}, {}, {}
            for kind in KINDS:
                part, fits = parts[f"{name}/{kind}"], parts[f"{name}/{kind}/gabors"]
                if kind != "gradient":
                    spikes[name][layer][kind] = _spikes(part, layer, settings)
                    changed[name][layer][kind] = _changes(part, layer)
                tables = {c: fits[f"{c} {layer}"] for c in CONTROLS if f"{c} {layer}" in fits}
                entry: dict[str, Any] = {control: fit_summary(table) for control, table in tables.items()}
                entry["colour"] = _median(fits[f"colour {layer}"])
                entry["fits"] = {
                    control: [None if g is None else _describe(g, config) for g in gabors(table)]
                    for control, table in tables.items()
                }
                if name == "trained":
                    other = parts[f"untrained/{kind}/gabors"][f"field {layer}"]
                    entry["p_above_untrained"] = higher(tables["field"], other)
                    entry["p_above_pixels"] = higher(tables["field"], tables["pixels"])
                shapes[name][layer][kind] = entry
    size = config.image_size
    uniform = dataclasses.asdict(field_size(np.ones((size, size))))
    return {
        "settings": {**dataclasses.asdict(settings), "layers": layers, "limit": LIMIT},
        "mixing": _mixing(parts["mixing"]),
        "effective_fields": {**fields, "uniform": uniform},
        "spikes": spikes,
        "covariance": changed,
        "gabors": shapes,
        "stem": _stem(parts["mixing"], config),
    }


def _describe(gabor: Gabor, config: ModelConfig) -> dict[str, Any]:
    bandwidth = gabor.bandwidth if math.isfinite(gabor.bandwidth) else None
    return {
        **dataclasses.asdict(gabor),
        "orientation_degrees": math.degrees(gabor.orientation),
        "frequency_per_patch": gabor.frequency * config.patch_size,
        "bandwidth": bandwidth,
        "nx": gabor.nx,
        "ny": gabor.ny,
        "aspect": gabor.aspect,
        "band_pass": gabor.band_pass,
    }


def _spikes(part, layer, settings) -> dict[str, Any]:
    p = part[f"p {layer}"]
    tested = np.isfinite(p)
    return {
        "median_spikes": _median(part[f"spikes {layer}"]),
        "units": len(p),
        "tested": int(tested.sum()),
        "significant": int(np.sum(p[tested] <= 1 / (settings.shifts + 1) + 1e-9)),
        "signal": _median(part[f"signal {layer}"]),
        "by_unit": {"spikes": part[f"spikes {layer}"].tolist(), "signal": part[f"signal {layer}"].tolist()},
    }


def covariance_rows(part: Arrays, layer: str) -> np.ndarray:
    """Indices of a layer's covariances with at least as many spikes as the window has pixels.

    With fewer, some directions have no spike at all.
    """
    if f"channel {layer}" not in part:
        return np.zeros(0, int)
    pixels = part[f"axes {layer}"].shape[-1] ** 2
    return np.flatnonzero(part[f"spikes {layer}"][part[f"channel {layer}"]] >= pixels)


def _changes(part, layer) -> dict[str, Any] | None:
    rows = covariance_rows(part, layer)
    if not len(rows):
        return None
    return {
        "units": len(rows),
        "excitatory": part[f"excitatory {layer}"][rows].tolist(),
        "suppressive": part[f"suppressive {layer}"][rows].tolist(),
        "largest": part[f"eigenvalues {layer}"][rows, 0].tolist(),
        "smallest": np.nanmin(part[f"eigenvalues {layer}"][rows], axis=1).tolist(),
        "null_high": part[f"high {layer}"][rows].tolist(),
        "null_low": part[f"low {layer}"][rows].tolist(),
    }


def _mixing(part) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in NETWORKS:
        for key in part:
            if not key.startswith(f"{name} height "):
                continue
            block = key.removeprefix(f"{name} height ")
            entry = found.setdefault(block, {})[name] = {}
            for axis in ("height", "width"):
                weights = part[f"{name} {axis} {block}"]
                near, expected = energy_within(weights, 1)
                entry[axis] = {
                    "weights": weights.tolist(),
                    "mean_profile": mean_profile(weights).tolist(),
                    "convolution_share": convolution_share(weights),
                    "within_1": near,
                    "within_1_expected": expected,
                    "correlation_with_untrained": float(
                        np.corrcoef(weights.ravel(), part[f"untrained {axis} {block}"].ravel())[0, 1]
                    ),
                }
            for kind in ("field", "pixels"):
                if f"{name} gabors {kind} {block}" in part:
                    entry[f"gabors_{kind}"] = fit_summary(part[f"{name} gabors {kind} {block}"])
    return found


def _stem(part, config: ModelConfig) -> dict[str, Any]:
    side = config.patch_size
    if side < SMALLEST:
        return {
            "kernel": side,
            "why_not": f"{side} x {side} pixels, but a fit needs {SMALLEST} x {SMALLEST}",
        }
    fits = {
        f"{name}_{kind}": fit_summary(part[f"{name} gabors {kind} stem"]) for name in NETWORKS for kind in CONTROLS[:2]
    }
    return {"kernel": side, **fits}


def _median(values) -> float | None:
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def table(document: dict[str, Any]) -> str:
    """The tables that `spiking-mlp probe receptive-fields` prints, as Markdown."""
    layers = document["settings"]["layers"]
    texts = [
        "Effective receptive fields: radius in pixels that holds 50 % and 90 % of the mean squared gradient.",
        _sizes(document["effective_fields"], layers),
        "Units whose spike-triggered average (white noise) or linear field (images) is above all controls, of those "
        "with enough spikes; in brackets the median share of its energy above chance, or of the held-out spike "
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
