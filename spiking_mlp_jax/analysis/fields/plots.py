"""Figures of a receptive-field study (`study.study`)."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator

from spiking_mlp_jax.analysis.fields.controls import main_colour
from spiking_mlp_jax.analysis.fields.effective import field_size
from spiking_mlp_jax.analysis.fields.gabor import render
from spiking_mlp_jax.analysis.fields.mixing import mean_profile, profiles, separable_fields
from spiking_mlp_jax.analysis.fields.study import KINDS, NETWORKS, Arrays
from spiking_mlp_jax.analysis.fields.summary import LIMIT, NAMES, covariance_rows, gabors
from spiking_mlp_jax.analysis.plots import BLUE, GREEN, GREY, ORANGE, RED
from spiking_mlp_jax.models.config import ModelConfig

MAP = "RdBu_r"  # distinguishable for colour-blind readers; white is zero
SHOWN = 8  # fields of a layer in a figure


def figures(parts: dict[str, Arrays], config: ModelConfig, layers: list[str]) -> dict[str, Figure]:
    """All figures of a study by file name.

    Args:
        parts: from `study`.
        config: of the network.
        layers: the measured layers.
    """
    found = {"mixing_profiles": mixing_figure(parts["mixing"]), "separable_fields": separable_figure(parts["mixing"])}
    found["effective_fields"] = effective_figure(parts, layers)
    for kind in KINDS:
        found[f"fields_{kind}"] = fields_figure(parts, kind, layers)
    found["gabor_quality"] = quality_figure(parts, layers)
    found["gabor_shapes"] = shapes_figure(parts, config, layers)
    found["covariance"] = covariance_figure(parts, layers)
    return found


def mixing_figure(part: Arrays) -> Figure:
    """Row and column mixing weights of each block against the distance between tokens, and the matrices."""
    blocks = _blocks(part)
    figure = Figure(figsize=(12, 0.6 + 2.5 * len(blocks)), layout="constrained")
    axes = figure.subplots(len(blocks), 4, squeeze=False, width_ratios=[1, 2, 1, 2])
    for row, block in zip(axes, blocks, strict=True):
        for (matrix, curve), axis in zip((row[:2], row[2:]), ("height", "width"), strict=True):
            weights, fresh = (part[f"{name} {axis} {block}"] for name in NETWORKS)
            side = len(weights)
            _field(matrix, weights)
            matrix.set_title(f"{block}, {axis}", fontsize=9)
            matrix.set(xlabel="token in", ylabel="token out")
            offsets = np.arange(1 - side, side)
            for profile in profiles(weights):
                curve.plot(offsets, profile, color=GREY, alpha=0.35, linewidth=0.8)
            curve.plot(offsets, mean_profile(weights), color=BLUE, linewidth=1.8, label="trained, mean of the rows")
            curve.plot(offsets, mean_profile(fresh), color=ORANGE, linewidth=1.2, label="untrained, mean")
            curve.axhline(0, color="black", linewidth=0.5)
            curve.set(xlabel="offset j - i (tokens)", ylabel="weight")
            curve.grid(alpha=0.3)
            for scale in (curve.xaxis, matrix.xaxis, matrix.yaxis):
                scale.set_major_locator(MaxNLocator(5, integer=True))
    axes[0, 1].legend(frameon=False, fontsize=7)
    return figure


def separable_figure(part: Arrays) -> Figure:
    """Outer products of height and width profiles of 4 x 4 tokens of each block, trained above, untrained below."""
    blocks = _blocks(part)
    figure = Figure(figsize=(2.7 * len(blocks) + 0.6, 6.0), layout="constrained")
    axes = figure.subplots(2, len(blocks), squeeze=False)
    for row, name in zip(axes, NETWORKS, strict=True):
        for axis, block in zip(row, blocks, strict=True):
            products = separable_fields(part[f"{name} height {block}"], part[f"{name} width {block}"])
            side = len(products)
            places = np.linspace(0, side - 1, 4).round().astype(int)
            tiles = [[_unit(products[i, j]) for j in places] for i in places]
            _field(axis, _mosaic(tiles))
            axis.set_title(f"{name}, {block}", fontsize=9)
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(f"{side} x {side} tokens each", fontsize=8)
    figure.suptitle("outer products of row and column mixing weights, of 4 x 4 tokens of the grid", fontsize=10)
    return figure


def effective_figure(parts: dict[str, Arrays], layers: list[str]) -> Figure:
    """Mean squared gradient of the middle token's units, with circles that contain 50 and 90 % of it."""
    figure = Figure(figsize=(3.2 * len(layers) + 0.4, 6.2), layout="constrained")
    axes = figure.subplots(2, len(layers), squeeze=False)
    for row, name in zip(axes, NETWORKS, strict=True):
        for axis, layer in zip(row, layers, strict=True):
            field = parts[f"{name}/gradient"][f"map {layer}"]
            # The square root shows weak surrounds.
            axis.imshow(np.sqrt(field), cmap="magma", vmin=0)
            told = "no pixel moves it"
            if field.any():
                size = field_size(field)
                told = f"radius {size.half:.1f}, {size.ninety:.1f} px"
                for radius, style in ((size.half, "-"), (size.ninety, "--")):
                    centre = size.centre[1], size.centre[0]
                    axis.add_patch(Circle(centre, radius, fill=False, color="white", linestyle=style))
            axis.set_xlim(-0.5, field.shape[1] - 0.5)
            axis.set_ylim(field.shape[0] - 0.5, -0.5)
            axis.set_title(f"{name}, {_short(layer)}\n{told}", fontsize=9)
            axis.set(xlabel="x (pixels)", ylabel="y (pixels)")
    figure.suptitle("root mean squared input gradient; circles contain 50 % (line) and 90 % (dashes)", fontsize=10)
    return figure


def fields_figure(parts: dict[str, Arrays], kind: str, layers: list[str]) -> Figure:
    """Fields of some units of each layer, their Gabor fits, and the controls."""
    rows = [("trained", "trained", "field"), ("its Gabor", "trained", None), ("untrained", "untrained", "field")]
    if any(f"control {layer}" in parts[f"trained/{kind}"] for layer in layers):
        rows.append(("spikes shifted", "trained", "control"))
    most = max(min(SHOWN, len(parts[f"trained/{kind}"][f"field {layer}"])) for layer in layers)
    figure = Figure(figsize=(max(1.35 * most, 4) + 0.3, len(layers) * (0.5 + 1.28 * len(rows))), layout="constrained")
    for panel, layer in zip(figure.subfigures(len(layers), 1, squeeze=False)[:, 0], layers, strict=True):
        panel.suptitle(f"{NAMES[kind]}: {_short(layer)}, middle token", fontsize=10)
        whole = parts[f"trained/{kind}"][f"field {layer}"]
        axes = panel.subplots(len(rows), min(SHOWN, len(whole)), squeeze=False)
        fits = gabors(parts[f"trained/{kind}/gabors"][f"field {layer}"])
        units = np.linspace(0, len(whole) - 1, min(SHOWN, len(whole))).round().astype(int)
        for line, (label, name, what) in zip(axes, rows, strict=True):
            line[0].set_ylabel(label, fontsize=8)
            for axis in line:
                axis.set(xticks=[], yticks=[])
            for axis, unit in zip(line, units, strict=True):
                if what is None:
                    fit = fits[unit]
                    if fit is None:
                        _nothing(axis)
                        continue
                    _field(axis, render(fit, whole.shape[1:3]))
                    axis.set_title(f"R² {fit.explained:.2f}", fontsize=7, pad=2)
                    continue
                field = parts[f"{name}/{kind}"][f"{what} {layer}"][unit]
                if np.isnan(field).any():
                    _nothing(axis)
                else:
                    _field(axis, main_colour(field)[0])
    return figure


def quality_figure(parts: dict[str, Arrays], layers: list[str]) -> Figure:
    """Share of units at or above each R^2 of a Gabor fit, and of the controls."""
    figure = Figure(figsize=(3.5 * len(KINDS) + 0.5, 2.6 * len(layers) + 0.5), layout="constrained")
    axes = figure.subplots(len(layers), len(KINDS), squeeze=False, sharex=True, sharey=True)
    curves = (
        ("trained", "field", BLUE, "-", "trained"),
        ("untrained", "field", ORANGE, "-", "untrained"),
        ("trained", "pixels", GREY, "--", "trained, pixels shuffled within patches"),
        ("trained", "spikes", GREEN, ":", "trained, spikes shifted"),
    )
    for row, layer in zip(axes, layers, strict=True):
        for axis, kind in zip(row, KINDS, strict=True):
            for name, control, colour, style, label in curves:
                fits = parts[f"{name}/{kind}/gabors"].get(f"{control} {layer}")
                values = [] if fits is None else np.sort(fits[np.isfinite(fits[:, -1]), -1])
                if len(values):
                    shares = 100 * (1 - np.arange(len(values)) / len(values))
                    x, y = np.concatenate([[0], values, values[-1:]]), np.concatenate([[100], shares, [0]])
                    axis.step(x, y, where="pre", color=colour, linestyle=style, label=label, linewidth=1.5)
            axis.axvline(LIMIT, color="black", linewidth=0.6)
            axis.set_title(f"{_short(layer)}: {NAMES[kind]}", fontsize=8)
            axis.grid(alpha=0.3)
            axis.set(xlim=(0, 1), ylim=(0, 103))
        row[0].set_ylabel("units (%) at or above")
    for axis in axes[-1]:
        axis.set_xlabel("R² of the best Gabor")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def shapes_figure(parts: dict[str, Arrays], config: ModelConfig, layers: list[str]) -> Figure:
    """Gabors that explain their fields: n_x and n_y, orientation, spatial frequency, bandwidth."""
    figure = Figure(figsize=(13, 3.3 * len(KINDS)), layout="constrained")
    axes = figure.subplots(len(KINDS), 4, squeeze=False)
    for row, kind in zip(axes, KINDS, strict=True):
        for name, colour, marker in ((NETWORKS[1], ORANGE, "x"), (NETWORKS[0], BLUE, "o")):
            fits = [fit for layer in layers for fit in gabors(parts[f"{name}/{kind}/gabors"][f"field {layer}"])]
            good = [g for g in fits if g is not None and g.explained >= LIMIT]
            label = f"{name} ({len(good)} of {sum(g is not None for g in fits)})"
            row[0].plot(
                [g.nx for g in good], [g.ny for g in good], marker, color=colour, markersize=4, alpha=0.7, label=label
            )
            bars = [g for g in good if g.band_pass]
            values = (
                [math.degrees(g.orientation) for g in bars],
                [g.frequency for g in bars],
                [g.bandwidth for g in bars if math.isfinite(g.bandwidth)],
            )
            bins = np.linspace(0, 180, 13), np.linspace(0, 0.5, 16), np.linspace(0, 5, 16)
            for axis, data, edges in zip(row[1:], values, bins, strict=True):
                axis.hist(np.clip(data, edges[0], edges[-1]), edges, histtype="step", color=colour, linewidth=1.5)
        row[0].set(xlabel="n_x = sigma_x f", ylabel=f"{NAMES[kind]}\n\nn_y = sigma_y f", xlim=(0, 1.5), ylim=(0, 1.5))
        row[0].legend(frameon=False, fontsize=7, loc="upper right")
        row[1].set(xlabel="orientation of the bars (degrees)", ylabel="units", xticks=[0, 45, 90, 135, 180])
        row[2].set(xlabel="spatial frequency (cycles/pixel)", ylabel="units")
        row[2].axvline(1 / config.patch_size, color=GREY, linestyle="--", linewidth=0.8)
        row[3].axvspan(0.8, 3.0, color=GREY, alpha=0.15)
        row[3].set(xlabel="bandwidth (octaves)", ylabel="units")
        for axis in row:
            axis.grid(alpha=0.3)
        for axis in row[1:]:
            axis.set_ylim(0, max(1.5, axis.get_ylim()[1]))
            axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.suptitle(
        f"Gabors with R² of at least {LIMIT}; the right three without blobs; dashes: one cycle per patch of the "
        "stem; grey: macaque V1",
        fontsize=10,
    )
    return figure


def covariance_figure(parts: dict[str, Arrays], layers: list[str]) -> Figure:
    """Eigenvalues of spike-triggered covariances with the range of the shifted spikes, and the first and last axes."""
    kinds = KINDS[:2]
    figure = Figure(figsize=(5.6 * len(kinds), 2.4 * len(layers) + 0.6), layout="constrained")
    axes = figure.subplots(len(layers), 3 * len(kinds), squeeze=False, width_ratios=[2.2, 1, 1] * len(kinds))
    for row, layer in zip(axes, layers, strict=True):
        for (curve, *pictures), kind in zip((row[:3], row[3:]), kinds, strict=True):
            part = parts[f"trained/{kind}"]
            curve.set_title(f"{_short(layer)}, {kind}", fontsize=8)
            curve.set(xlabel="eigenvalue number", ylabel="change of variance")
            rows = covariance_rows(part, layer)
            if not len(rows):
                curve.text(0.5, 0.5, "too few spikes", ha="center", transform=curve.transAxes, fontsize=8)
                curve.set(xticks=[], yticks=[])
                for axis in pictures:
                    axis.set_axis_off()
                continue
            values, low, high = (part[f"{name} {layer}"][rows[0]] for name in ("eigenvalues", "low", "high"))
            values = values[np.isfinite(values)]
            curve.axhspan(low, high, color=GREY, alpha=0.25)
            inside = (values >= low) & (values <= high)
            curve.plot(np.flatnonzero(inside), values[inside], ".", color=GREY, markersize=3)
            curve.plot(np.flatnonzero(~inside), values[~inside], "o", color=RED, markersize=3.5)
            for axis, vector, title in zip(pictures, part[f"axes {layer}"][rows[0]], ("first", "last"), strict=True):
                _field(axis, vector)
                axis.set(xticks=[], yticks=[])
                axis.set_title(title, fontsize=8)
            curve.grid(alpha=0.3)
    figure.suptitle(
        "spike-triggered covariance of one unit per layer, without its average; grey: range of the shifted spikes; "
        "images: axes of the first and last eigenvalue",
        fontsize=8,
    )
    return figure


def _blocks(part: Arrays) -> list[str]:
    return [key.removeprefix("trained height ") for key in part if key.startswith("trained height ")]


def _short(layer: str) -> str:
    return layer.removesuffix(".spikes")


def _field(axis: Axes, field: np.ndarray) -> None:
    most = np.nanmax(np.abs(field)) or 1.0
    axis.imshow(field, cmap=MAP, vmin=-most, vmax=most)


def _nothing(axis: Axes) -> None:
    axis.text(0.5, 0.5, "too few\nspikes", ha="center", va="center", transform=axis.transAxes, fontsize=6, color=GREY)


def _unit(field):
    return field / (np.abs(field).max() or 1.0)


def _mosaic(tiles):
    # NaN is drawn as a white line between the tiles.
    padded = [[np.pad(tile, ((0, 1), (0, 1)), constant_values=np.nan) for tile in row] for row in tiles]
    return np.block(padded)[:-1, :-1]
