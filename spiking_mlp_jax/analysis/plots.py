"""Figures of a training run.

Each function returns a matplotlib Figure without using matplotlib's global state. `write` saves one as PNG, and
`plot_workdir` draws all of them for a run.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from spiking_mlp_jax.analysis import samples
from spiking_mlp_jax.analysis.activity.stream import SPIKES, in_network_order, spikes_of_first
from spiking_mlp_jax.data.sources import Source, open_source, spaced
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.spiking_mlp import mean_logits
from spiking_mlp_jax.train.evaluate import evaluate_source, silent_and_saturated
from spiking_mlp_jax.train.logging import read_metrics
from spiking_mlp_jax.utils.files import read_json, write_whole
from spiking_mlp_jax.utils.paths import user_path
from spiking_mlp_jax.utils.settings import usual_settings

# Okabe and Ito's colours, distinguishable for colour-blind readers and in greyscale.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
COLOURS = (BLUE, RED, GREEN, ORANGE, "#CC79A7", "#56B4E9")  # of lines; the last two are their purple and sky blue
AGAIN = "give the workdir of a training run"
RASTER_NEURONS = 40
RASTER_LAYERS = 24


def write(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes a figure as PNG at 150 dpi and returns its path.

    Raises:
        InputError: the file cannot be written.
    """
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    write_whole(path, stream.getvalue())
    return Path(path)


@usual_settings()
def plot_workdir(workdir: str | os.PathLike[str]) -> list[Path]:
    """Draws all figures of a training run into its folder `plots`.

    The curves come from metrics.jsonl; the others show the best weights so far on the run's test split.
    evaluation.json is used if it belongs to these weights; otherwise they are evaluated again.

    Args:
        workdir: of a run that has been evaluated at least once.

    Returns:
        the files: learning_curves.png, confusion_matrix.png, firing_rates.png, spikes.png, predictions.png.

    Raises:
        InputError: a file of the run is missing or damaged, or its data set cannot be opened.
    """
    workdir = user_path(workdir)
    model, meta = weights.load(workdir / "weights")
    if "data" not in meta:
        raise InputError(f'{workdir / "weights"} has no "data" in its config.json: train again')
    data = meta["data"]
    settings = read_json(workdir / "config.json", AGAIN)
    if settings is None:
        raise InputError(f"there is no {workdir / 'config.json'}: {AGAIN}")
    source = open_source(data["dataset"], "test", settings.get("data_dir"))
    evaluation = _evaluation(workdir, model, meta, source, settings)
    figures = {
        "learning_curves": learning_curves(read_metrics(workdir)),
        "confusion_matrix": confusion_matrix(np.array(evaluation["confusion"]), data["class_names"]),
        "firing_rates": firing_rates(in_network_order(evaluation["firing_rates"], model.config)),
    }

    # Evenly spaced over the test images: neither the best nor the worst.
    images = samples.decoded(source, spaced(len(source), 8), model.config, data)
    logits, spikes = spikes_of_first(model, jnp.asarray(images.normalised))
    scores = np.asarray(jax.nn.softmax(mean_logits(jnp.asarray(logits))))
    names = data["class_names"]
    best = int(scores[0].argmax())
    title = f"true: {_short(names[images.labels[0]])}\npredicted: {_short(names[best])} ({100 * scores[0, best]:.0f} %)"
    figures["spikes"] = spike_raster(images.raw[0], spikes, title)
    figures["predictions"] = predictions(images.decoded, images.labels.tolist(), scores, names)
    return [write(figure, workdir / "plots" / f"{name}.png") for name, figure in figures.items()]


def learning_curves(records: Iterable[Mapping[str, Any]]) -> Figure:
    """Loss and accuracy over the training steps.

    Args:
        records: entries of metrics.jsonl: {"step", "split": "train" | "eval", "loss", "accuracy"}. Training
            values are drawn faintly, with their running mean. If a step has several entries, as in a resumed run,
            the last one counts.

    Raises:
        InputError: there are no such entries.
    """
    records = list(records)
    if not any(record.get("split") in ("train", "eval") and "step" in record for record in records):
        raise InputError("there are no metrics to draw learning curves from: train first")
    figure = _figure(9.6, 3.8)
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        curve(axes, records, key)
    return figure


def curve(axes: Axes, records: Iterable[Mapping[str, Any]], key: str) -> None:
    """Draws one learning curve.

    Args:
        axes: to draw into.
        records: as for `learning_curves`.
        key: "loss" or "accuracy", in per cent.
    """
    splits: dict[str, dict[int, Mapping[str, Any]]] = {"train": {}, "eval": {}}
    for record in records:
        if record.get("split") in splits and "step" in record:
            splits[record["split"]][int(record["step"])] = record
    scale = 100 if key == "accuracy" else 1
    steps, values = _series(splits["train"], key, scale)
    if len(steps):
        axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(steps, running_mean(values), color=BLUE, linewidth=1.8, label="training, running mean")
    steps, values = _series(splits["eval"], key, scale)
    if len(steps):
        best = values.min() if key == "loss" else values.max()
        label = f"test, best {best:.4g}" + (" %" if scale == 100 else "")
        axes.plot(steps, values, "o-", color=RED, markersize=5, linewidth=1.2, label=label)
    axes.set(xlabel="training step", ylabel="loss" if scale == 1 else "accuracy (%)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(y=0.12)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)


def confusion_matrix(confusion: Int[np.ndarray, "K K"], class_names: Sequence[str]) -> Figure:
    """Confusion matrix, in per cent of each true class.

    Args:
        confusion: number of images by true class (row) and predicted class (column).
        class_names: one per class. Above 20 classes the cells have no numbers; above 40 not every class is labelled.
    """
    confusion = np.asarray(confusion)
    classes = len(class_names)
    totals = confusion.sum(1, keepdims=True)
    percent = 100 * confusion / np.maximum(totals, 1)
    side = float(np.clip(2.4 + 0.5 * classes, 5, 11))
    figure = _figure(side + 0.9, side)
    axes = figure.subplots()
    # The square root keeps errors of a few per cent visible next to the diagonal.
    image = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100))
    ticks = range(0, classes, -(-classes // 40))
    labels = [_short(str(class_names[i])) for i in ticks]
    size = 10 if classes <= 20 else 8
    slant: dict[str, Any] = (
        dict(rotation=45, ha="right", rotation_mode="anchor") if classes <= 20 else dict(rotation=90)
    )
    axes.set_xticks(ticks, labels, fontsize=size, **slant)
    axes.set_yticks(ticks, labels, fontsize=size)
    axes.set(xlabel="predicted class", ylabel="true class")
    correct, total = np.trace(confusion), confusion.sum()
    axes.set_title(f"{100 * correct / max(total, 1):.2f} % of {total:,} images correct", fontsize=10)
    if classes <= 20:
        for row, column in zip(*np.nonzero(confusion), strict=True):
            value = percent[row, column]
            text = "<1" if value < 0.95 else f"{value:.0f}"
            colour = "white" if value > 35 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("share of the true class (%)")
    return figure


def firing_rates(rates: Mapping[str, float]) -> Figure:
    """Mean firing rate of each layer; silent (< 0.1 %) and saturated (> 95 %) layers are marked.

    Args:
        rates: spikes per neuron and time step, 0 to 1, by layer from input to output.
    """
    names, values = list(rates), 100 * np.array(list(rates.values()))
    # Narrower bars, so that even 150 layers fit on a page.
    many = len(names) > 50
    figure = _figure(7.2, 1.3 + (0.11 if many else 0.21) * len(names))
    axes = figure.subplots()
    silent, saturated = silent_and_saturated(rates)
    colours = dict.fromkeys(names, BLUE) | dict.fromkeys(silent, RED) | dict.fromkeys(saturated, ORANGE)
    axes.barh(range(len(names)), values, color=list(colours.values()), height=0.72)
    marks = dict.fromkeys(silent, " silent") | dict.fromkeys(saturated, " saturated")
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        text = (f"{value:.1f}" if value >= 0.1 else f"{value:.2g}") + marks.get(name, "")
        beside(axes, text, value, row, 5 if many else 7.5, "bold" if name in marks else "normal")
    name_rows(axes, names, 5 if many else 8)
    axes.set_xlim(0, max(float(values.max(initial=0)) * (1.25 if saturated else 1.1), 1))
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 100])
    axes.set_xlabel("mean firing rate (% of neurons that spike in a time step)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def spike_raster(
    image: UInt8[np.ndarray, "H W C"], spikes: Mapping[str, Bool[np.ndarray, "T h w c"]], title: str = ""
) -> Figure:
    """The spikes of one image, layer by layer.

    At most 24 layers are shown, evenly spaced, with 40 neurons each, chosen with a fixed seed. The bars count all
    neurons of a layer.

    Args:
        image: the network's input.
        spikes: by layer, whether each neuron fires at each step.
        title: above the image, e.g. the true and the predicted class.
    """
    names = [list(spikes)[i] for i in spaced(len(spikes), RASTER_LAYERS)]
    steps = next(iter(spikes.values())).shape[0]
    figure = _figure(9.6, 1.5 + 0.36 * len(names))
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.1, 2.2, 1.0])
    _show(left, image)
    left.set_title(title, fontsize=10)
    left.set(xlabel="x (pixels)", ylabel="y (pixels)")
    left.set_anchor("N")

    band = RASTER_NEURONS + 6
    for row, name in enumerate(names):
        flat = spikes[name].reshape(steps, -1)
        chosen = np.random.default_rng(0).permutation(flat.shape[1])[:RASTER_NEURONS]
        # A layer with fewer neurons fills the band, too.
        height = RASTER_NEURONS / len(chosen)
        time, neuron = np.nonzero(flat[:, chosen])
        top = row * band
        middle.axhspan(top - 3, top + RASTER_NEURONS + 3, color="#f2f2f2" if row % 2 else "white", linewidth=0)
        y = top + (neuron + 0.5) * height
        middle.hlines(y, time + 0.56, time + 1.44, color="black", linewidth=0.6, snap=False)
    centres = np.arange(len(names)) * band + RASTER_NEURONS / 2
    middle.set_yticks(centres, [label(name) for name in names], fontsize=8)
    middle.set_ylim(len(names) * band - 3, -3)
    middle.set_xlim(0.5, steps + 0.5)
    middle.set_xticks(range(1, steps + 1, -(-steps // 10)))
    middle.set(xlabel="time step", ylabel="layer, input to output")
    of_layers = "each layer" if len(names) == len(spikes) else f"{len(names)} of {len(spikes)} layers"
    middle.set_title(f"{RASTER_NEURONS} neurons of {of_layers}; a dash is a spike", fontsize=9)

    rates = np.array([100 * spikes[name].mean() for name in names])
    right.barh(centres, rates, color=BLUE, height=0.5 * band)
    for centre, rate in zip(centres, rates, strict=True):
        beside(right, f"{rate:.1f}", rate, centre, 8)
    right.set_ylim(middle.get_ylim())
    right.set_yticks([])
    right.set_xlim(0, max(float(rates.max()) * 1.3, 1))
    right.set_xlabel("firing rate (% of all\nneurons and steps)")
    right.grid(axis="x", alpha=0.3)
    right.set_axisbelow(True)
    return figure


def predictions(
    images: Sequence[UInt8[np.ndarray, "H W C"]],
    labels: Sequence[int],
    scores: Float[np.ndarray, "N K"],
    class_names: Sequence[str],
) -> Figure:
    """Images with their most probable classes.

    Args:
        images: of any sizes.
        labels: true classes.
        scores: of each image and class, summing to 1.
        class_names: one per class.
    """
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    top = min(4, len(class_names))
    figure = _figure(max(2.7 * columns, 6.5), 3.2 * rows)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[2.2, 1] * rows)
    for i, (image, label, score) in enumerate(zip(images, labels, np.asarray(scores), strict=True)):
        picture = figure.add_subplot(grid[2 * (i // columns), i % columns])
        bars = figure.add_subplot(grid[2 * (i // columns) + 1, i % columns])
        _show(picture, image)
        picture.set(xticks=[], yticks=[])
        best = np.argsort(-score, kind="stable")[:top]
        correct = best[0] == label
        verdict = "correct" if correct else f"wrong, true: {_short(class_names[label])}"
        picture.set_title(f"{_short(class_names[best[0]])}\n({verdict})", color="black" if correct else RED, fontsize=9)
        bars.barh(range(top), 100 * score[best], color=[GREEN if c == label else GREY for c in best], height=0.75)
        bars.set_yticks(range(top), [_short(str(class_names[c])) for c in best.tolist()], fontsize=8)
        bars.set_xlim(0, 100)
        bars.set_ylim(top - 0.5, -0.5)
        bars.tick_params(axis="x", labelsize=7)
        bars.set_xticks([0, 50, 100])
        bars.set_xlabel("score (%)", fontsize=8)
        bars.spines[["top", "right"]].set_visible(False)
    figure.suptitle("predicted class and softmax scores of the time-mean logits; green: the true class", fontsize=10)
    return figure


def _evaluation(workdir: Path, model, meta, source: Source, settings) -> dict[str, Any]:
    stored = read_json(workdir / "evaluation.json", AGAIN) or {}
    # Written at every evaluation; the weights only at the best one.
    step = (meta.get("result") or {}).get("step")
    if step is not None and stored.get("step") == step:
        return stored
    size, bad = settings.get("eval_batch_size", 256), settings.get("max_bad_images", 0.0)
    return evaluate_source(model, source, meta["data"], batch_size=size, max_bad_images=bad).to_dict()


def _figure(width, height):
    return Figure(figsize=(width, height), layout="constrained")


def _series(records, key, scale):
    # A diverged run logs null, which cannot be drawn.
    found = [(step, record.get(key)) for step, record in sorted(records.items())]
    points = [(step, scale * value) for step, value in found if value is not None and np.isfinite(value)]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps), np.array(values)


def running_mean(values):
    """Mean over the points at most a thirtieth of all away, so that the first and last are means over half as many."""
    half = max(1, len(values) // 30)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)


def _show(axes: Axes, image):
    if image.shape[-1] == 1:
        axes.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255)
    else:
        axes.imshow(image)


def label(layer: str) -> str:
    """A layer's name without ".spikes"."""
    return layer.removesuffix(SPIKES)


def name_rows(axes: Axes, names: Sequence[str], size: float) -> None:
    """Names the rows of a figure with one for each layer, from the top."""
    axes.set_yticks(range(len(names)), [label(name) for name in names], fontsize=size)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_ylabel("layer, input to output")


def beside(axes: Axes, text: str, x: float, y: float, size: float, weight: str = "normal") -> None:
    """Writes a text at the right of a bar's end."""
    axes.annotate(
        text, (x, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=size, fontweight=weight
    )


def plain(text: str, length: int | None = None) -> str:
    """A text of the user as a matplotlib label: on one line, at most `length` characters, "$" not as math."""
    text = " ".join(text.split())
    text = text if length is None or len(text) <= length else text[: length - 1] + "…"
    return text.replace("$", r"\$")


def _short(name):
    return plain(str(name), 16)
