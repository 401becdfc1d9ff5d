"""The figures of a study of receptive fields as one JSON document."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

from spiking_mlp_jax.analysis.fields.effective import field_size
from spiking_mlp_jax.analysis.fields.gabor import SMALLEST, Gabor
from spiking_mlp_jax.analysis.fields.mixing_profiles import convolution_share, energy_within, mean_profile
from spiking_mlp_jax.analysis.fields.study import CONTROLS, FIT_COLUMNS, KINDS, NETWORKS, Arrays, Settings
from spiking_mlp_jax.models.config import ModelConfig

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


def higher(fits: np.ndarray, others: np.ndarray) -> float | None:
    """Probability that R^2 is so much higher in one set of fits than in the other by chance (Mann-Whitney, one-sided).

    Args:
        fits: [units, FIT_COLUMNS].
        others: likewise, of any number of units.

    Returns:
        p; None where either has fewer than 2 fits.
    """
    one, two = (table[np.isfinite(table[:, -1]), -1] for table in (fits, others))
    if min(len(one), len(two)) < 2:
        return None
    return float(mannwhitneyu(one, two, alternative="greater").pvalue)


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
    """Which of a layer's covariances rest on at least as many spikes as the window has pixels.

    Fewer leave directions in which no spike ever was.
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
