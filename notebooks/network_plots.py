"""Figures of how a network computes: from pixels to scores, and folding a norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure

from spiking_mlp_jax.analysis.plots import BLUE, COLOURS, GREY, RED, plain
from spiking_mlp_jax.deploy.fold import fold
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP

CLASSES = 4


def pixels_to_scores(
    image: UInt8[np.ndarray, "H W C"],
    spikes: Mapping[str, Bool[np.ndarray, "T h w c"]],
    logits: Float[np.ndarray, "T K"],
    class_names: Sequence[str],
) -> Figure:
    """One image through the network: where each stage fires at each time step, and the scores after it.

    Each stage shows the spikes of its encoding and of its last block.

    Args:
        image: the network's input.
        spikes: of each layer, from `stream.spikes_of_first`.
        logits: of this image at each time step.
        class_names: one per class.

    Raises:
        InputError: `spikes` has no encoding.
    """
    stages = sorted({name.partition(".")[0] for name in spikes if name.endswith(".encode.spikes")})
    if not stages:
        raise InputError("there is no encoding among the layers: use the spikes of stream.spikes_of_first")
    rows = []
    for stage in stages:
        blocks = [name for name in spikes if name.startswith(f"{stage}.block") and name.endswith(".channel.spikes")]
        rows += [f"{stage}.encode.spikes", *blocks[-1:]]
    steps = len(logits)
    figure = Figure(figsize=(2.2 + 1.45 * steps, 1.25 * len(rows) + 1.7), layout="constrained")
    grid = figure.add_gridspec(len(rows) + 1, steps + 1, height_ratios=[1.0] * len(rows) + [1.15])
    picture = figure.add_subplot(grid[: min(2, len(rows)), 0])
    picture.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
    picture.set(xticks=[], yticks=[])
    picture.set_title("pixels", fontsize=9)
    for row, name in enumerate(rows):
        share = 100 * spikes[name].mean(-1)
        shown = None
        for t in range(steps):
            axes = figure.add_subplot(grid[row, t + 1])
            shown = axes.imshow(share[t], cmap="inferno", vmin=0, vmax=max(float(share.max()), 1))
            axes.set(xticks=[], yticks=[])
            if not row:
                axes.set_title(f"step {t + 1}", fontsize=9)
            if not t:
                side, channels = spikes[name].shape[1], spikes[name].shape[-1]
                label = name.removesuffix(".spikes").removesuffix(".channel").replace(".", "\n")
                axes.set_ylabel(f"{label}\n{side} x {side} x {channels}", fontsize=8)
        assert shown is not None
        bar = figure.colorbar(shown, ax=figure.axes[-steps:], shrink=0.85, aspect=12)
        bar.ax.tick_params(labelsize=7)
        if not row:
            bar.set_label("% of channels\nthat fire", fontsize=7)
    scores = _running_scores(logits)
    best = np.argsort(-scores[-1], kind="stable")[:CLASSES]
    for t in range(steps):
        axes = figure.add_subplot(grid[len(rows), t + 1])
        axes.barh(range(len(best)), 100 * scores[t, best], color=[BLUE, *[GREY] * (len(best) - 1)], height=0.7)
        axes.set_xlim(0, 100)
        axes.set_ylim(len(best) - 0.4, -0.6)
        axes.set_xticks([0, 50, 100])
        axes.tick_params(labelsize=7)
        axes.set_yticks(range(len(best)), [plain(str(class_names[c]), 12) for c in best] if not t else [""] * len(best))
        axes.set_xlabel(f"score after {t + 1} (%)", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


@dataclasses.dataclass(frozen=True)
class Folding:
    """A row mixing before and after folding its norm.

    Attributes:
        kernel: trained weights, [out, in].
        factor: of the norm, per output [out].
        offset: of the norm, including the bias of the mixing [out].
        folded: weights of the folded network, [out, in].
        before: potentials in the trained network, [N].
        after: potentials with the folded weights and biases, [N].
    """

    kernel: Float[np.ndarray, "out in"]
    factor: Float[np.ndarray, "out"]
    offset: Float[np.ndarray, "out"]
    folded: Float[np.ndarray, "out in"]
    before: Float[np.ndarray, "N"]
    after: Float[np.ndarray, "N"]


def row_folding(model: SpikingMLP, images: Float[np.ndarray, "B H W C"], stage: int = 0) -> Folding:
    """Folds the row mixing of a stage's first block and computes its potentials before and after.

    Args:
        model: a trained network, run in evaluation mode and not changed.
        images: normalised pixels.
        stage: its index.

    Raises:
        InputError: there is no such stage, the network cannot be folded, or it has weights of each step (TEBN).
    """
    c = model.config
    if not 0 <= stage < c.stages:
        raise InputError(f"stage must be between 0 and {c.stages - 1}, got {stage}")
    name = f"stage{stage}.block0.height"
    entries = {key: np.asarray(x) for key, x in fold(model).arrays[name].items()}
    if len(entries["kernel"]) > 1:
        raise InputError('a network with norm="tebn" has weights of each time step and cannot be drawn')
    reads, potential = f"stage{stage}.encode.spikes", f"stage{stage}.block0.token.height.potential"
    graphdef, variables = nnx.split(model)

    @jax.jit
    def run(variables, images):
        model = nnx.merge(graphdef, variables, copy=True)
        model.eval()
        # The blocks are scanned: their index is known only after the scan.
        wanted = (reads, potential.replace("block0", "block*"))
        seen = model(images, observe=lambda name, x: x if name in wanted else None)[1]
        return seen[reads], seen[potential]

    spikes, before = (np.asarray(x) for x in run(variables, jnp.asarray(images)))
    folded, bias = entries["kernel"][0], entries["bias"][0]
    after = np.moveaxis(np.moveaxis(spikes, 2, -1) @ folded + bias, -1, 2)
    kernel = np.asarray(model.stages[stage].blocks.token.height.kernel[...][0])
    factor = np.array([new @ old / (old @ old) for new, old in zip(folded.T, kernel, strict=True)])
    return Folding(kernel, factor, bias, folded.T, before.ravel(), after.ravel())


def folding_figure(found: Folding, v_threshold: float = 1.0) -> Figure:
    """The norm, the weights before and after folding, and the potentials of both.

    Args:
        found: from `row_folding`.
        v_threshold: of the neurons.
    """
    figure = Figure(figsize=(11.0, 3.3), layout="constrained")
    lines, before, after, same = figure.subplots(1, 4, width_ratios=[1.25, 1, 1, 1.2])
    z = np.array([-1.0, 1.0]) * np.abs(found.kernel).sum(1).max() / 2
    for i, (a, b) in enumerate(zip(found.factor, found.offset, strict=True)):
        lines.plot(z, a * z + b, color=COLOURS[i % len(COLOURS)], linewidth=1.1)
    lines.axhline(v_threshold, color="black", linestyle="--", linewidth=1)
    lines.annotate("threshold", (z[0], v_threshold), xytext=(2, 3), textcoords="offset points", fontsize=8)
    lines.set(xlabel="W x (before the norm)", ylabel="potential", xlim=tuple(z))
    lines.set_title("the norm of each output row", fontsize=10)
    lines.grid(alpha=0.3)
    for axes, kernel, title in ((before, found.kernel, "trained W"), (after, found.folded, "folded: a W")):
        # Symmetric around zero; separate scales, because the norm changes them.
        most = float(np.abs(kernel).max())
        shown = axes.imshow(kernel, cmap="RdBu_r", vmin=-most, vmax=most)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="from row", ylabel="to row")
        figure.colorbar(shown, ax=axes, shrink=0.75).ax.tick_params(labelsize=7)
    shown = np.random.default_rng(0).permutation(len(found.before))[:2000]
    same.plot(found.before[shown], found.after[shown], ".", color=BLUE, markersize=2)
    limits = float(found.before[shown].min()), float(found.before[shown].max())
    same.plot(limits, limits, color=RED, linewidth=0.8)
    same.set(xlabel="potential, trained", ylabel="potential, folded")
    largest = float(np.abs(found.before - found.after).max())
    same.set_title(f"largest difference {largest:.1e}", fontsize=10)
    same.grid(alpha=0.3)
    return figure


def _running_scores(logits):
    """Softmax of the logits averaged over the steps so far, [T, K]."""
    mean = np.cumsum(np.asarray(logits, np.float64), 0) / np.arange(1, len(logits) + 1)[:, None]
    e = np.exp(mean - mean.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)
