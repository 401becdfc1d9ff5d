"""Tables of a study of receptive fields: the JSON document and the lines that the command prints."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from spiking_mlp_jax.config import ModelConfig
from spiking_mlp_jax.probe.effective_field import field_size
from spiking_mlp_jax.probe.field_study import CONTROLS, FIT_COLUMNS, KINDS, NETWORKS, Arrays, Settings
from spiking_mlp_jax.probe.gabor import SMALLEST, Gabor
from spiking_mlp_jax.probe.mixing_profiles import convolution_share, energy_within, mean_profile

LIMIT = 0.5  # R^2 from which a Gabor is said to explain a field
NAMES = {
    "noise": "spike-triggered average, white noise",
    "images": "linear field, natural images",
    "gradient": "mean gradient, natural images",
}


def gabors(fits: np.ndarray) -> list[Gabor | None]:
    """Rows of FIT_COLUMNS as Gabor functions; None where no fit was made."""
    return [None if np.isnan(row).any() else Gabor(**dict(zip(FIT_COLUMNS, row.tolist(), strict=True))) for row in fits]


def fit_summary(fits: np.ndarray, limit: float = LIMIT) -> dict[str, Any]:
    """What a set of fits says.

    Args:
        fits: [units, FIT_COLUMNS].
        limit: R^2 from which a Gabor explains a field.

    Returns:
        units, fitted: how many; median_r2 of those fitted; explained: share of those fitted at or above the limit;
        oriented: share of those fitted that are also band-pass, and so no blobs; and medians over the explained ones.
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


def summarize(parts: dict[str, Arrays], config: ModelConfig, settings: Settings, layers: list[str]) -> dict[str, Any]:
    """The figures of a study as JSON values.

    Args:
        parts: from `study`.
        config: of the network.
        settings: of the study.
        layers: that were measured.

    Returns:
        settings; mixing, of each block; effective_fields, spikes, covariance and gabors by network and layer; stem.
    """
    fields, spikes, changed, shapes = ({name: {} for name in NETWORKS} for _ in range(4))
    for name in NETWORKS:
        for layer in layers:
            fields[name][layer] = dataclasses.asdict(field_size(parts[f"{name}/gradient"][f"map {layer}"]))
            spikes[name][layer], changed[name][layer], shapes[name][layer] = {}, {}, {}
            for kind in KINDS:
                part, fits = parts[f"{name}/{kind}"], parts[f"{name}/{kind}/gabors"]
                if kind != "gradient":
                    spikes[name][layer][kind] = _spikes(part, layer, settings)
                    changed[name][layer][kind] = _changes(part, layer)
                tables = {c: fits[f"{c} {layer}"] for c in CONTROLS if f"{c} {layer}" in fits}
                entry = {control: fit_summary(table) for control, table in tables.items()}
                entry["colour"] = _median(fits[f"colour {layer}"])
                entry["fits"] = {
                    control: [None if g is None else _describe(g, config) for g in gabors(table)]
                    for control, table in tables.items()
                }
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


def _changes(part, layer) -> dict[str, Any] | None:
    if f"channel {layer}" not in part:
        return None
    return {
        "units": len(part[f"channel {layer}"]),
        "excitatory": part[f"excitatory {layer}"].tolist(),
        "suppressive": part[f"suppressive {layer}"].tolist(),
        "largest": part[f"eigenvalues {layer}"][:, 0].tolist(),
        "smallest": part[f"eigenvalues {layer}"][:, -1].tolist(),
        "null_high": part[f"high {layer}"].tolist(),
        "null_low": part[f"low {layer}"].tolist(),
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
            "why_not": f"{side} x {side} pixels are fewer than the {SMALLEST} x {SMALLEST} of a fit",
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
    """The short tables that the command prints, in plain text."""
    layers = document["settings"]["layers"]
    uniform = document["effective_fields"]["uniform"]
    lines = ["effective receptive fields: radius in pixels that holds 50 % and 90 % of the mean squared gradient"]
    width = max(map(len, layers))
    for layer in layers:
        sizes = [document["effective_fields"][name][layer] for name in NETWORKS]
        text = "; ".join(f"{n} {s['half']:5.1f} {s['ninety']:5.1f}" for n, s in zip(NETWORKS, sizes, strict=True))
        lines.append(f"  {layer:{width}}  {text}; if uniform {uniform['half']:5.1f} {uniform['ninety']:5.1f}")
    lines += ["", "spike-triggered: units above all controls, of those with enough spikes"]
    for layer in layers:
        shares = []
        for name in NETWORKS:
            for kind in ("noise", "images"):
                entry = document["spikes"][name][layer][kind]
                shares.append(f"{name}, {kind} {entry['significant']}/{entry['tested']}")
        lines.append(f"  {layer:{width}}  {'; '.join(shares)}")
    lines += [
        "",
        f"share of fields that a Gabor explains (R^2 >= {document['settings']['limit']}; in brackets: no blobs)",
    ]
    lines.append(
        f"  {'':{width}}  {'field':9} {'trained':>13} {'untrained':>13} {'pixels shuffled':>16} {'spikes shifted':>15}"
    )
    for layer in layers:
        for kind in KINDS:
            trained, untrained = (document["gabors"][name][layer][kind] for name in NETWORKS)
            cells = [trained["field"], untrained["field"], trained["pixels"], trained.get("spikes")]
            texts = [_share(cell) for cell in cells]
            lines.append(f"  {layer:{width}}  {kind:9} {texts[0]:>13} {texts[1]:>13} {texts[2]:>16} {texts[3]:>15}")
    if "why_not" in document["stem"]:
        lines += ["", f"no Gabors fitted to the stem's kernels: {document['stem']['why_not']}"]
    return "\n".join(lines)


def _share(cell) -> str:
    if cell is None or cell["explained"] is None:
        return "-"
    return f"{100 * cell['explained']:.0f} % ({100 * cell['oriented']:.0f} %)"
