"""The report: one HTML page that holds everything it shows and fetches nothing.

Python computes plain data, the templates print it. Autoescape is on: class names, paths and settings stay text.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from spiking_mlp_jax.analysis.activity.rates import Rates, dead_and_saturated
from spiking_mlp_jax.analysis.activity.stream import SPIKES
from spiking_mlp_jax.analysis.fields.effective import EffectiveField, field_size
from spiking_mlp_jax.analysis.fields.mixing import Mixing, convolution_share, mixing_weights, separable_fields
from spiking_mlp_jax.analysis.report import figures, measure, viewer
from spiking_mlp_jax.analysis.report.figures import data_uri, percent, signed_map
from spiking_mlp_jax.analysis.report.run import Run
from spiking_mlp_jax.data.sources import spaced
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.topology import neuron_counts
from spiking_mlp_jax.train.runtime import versions
from spiking_mlp_jax.utils import __version__
from spiking_mlp_jax.utils.files import write_whole
from spiking_mlp_jax.utils.settings import usual_settings

MISTAKES = 12
EXAMPLES = 8
BLOCKS = 8  # whose mixing weights are shown
MAPS = 24  # of firing rates by token
CELLS = 20  # classes up to which the confusion matrix is a table
PAIRS = 8  # most frequent confusions
NAMED = 40  # classes up to which all are listed

# Each is a template. The second group needs the test images.
SECTIONS = {
    "steps": "Step by step",
    "time": "Time steps",
    "classes": "Classes",
    "mistakes": "Mistakes",
    "activity": "Activity",
    "fields": "Receptive fields",
    "cost": "Cost",
    "curves": "Training",
    "settings": "Settings",
}
NEED_IMAGES = {"steps", "time", "mistakes", "activity", "cost"}


def write_report(page: str, path: str | os.PathLike[str]) -> Path:
    """Writes a page from `make_page` atomically and returns its path.

    Raises:
        InputError: it cannot be written.
    """
    write_whole(path, page)
    return Path(path)


@usual_settings()
def make_page(run: Run, command: str, batch_size: int, progress: measure.Progress, say: Callable[[str], None]) -> str:
    """Measures a network and describes it in one page.

    Args:
        run: what the page is about; the page says what is missing.
        command: that makes this page.
        batch_size: images at a time.
        progress: called with what is done, how much of it and of how much.
        say: called with a line for each image that cannot be decoded.

    Returns:
        HTML, the same for the same input.

    Raises:
        InputError: too many corrupt images, or NaN or inf logits.
    """
    trained, config = run.trained, run.trained.model.config
    names, mixing = trained.data["class_names"], mixing_weights(trained.model)
    confusion, effective = run.evaluation.get("confusion"), []
    images: dict[str, Any] = {"measured": None, "viewer_data": None}
    if run.source is not None:
        measured = measure.measure(run, batch_size, MISTAKES, progress, say)
        examples = viewer.examples(run, measured.mistakes, EXAMPLES, progress)
        effective = measure.effective_fields(run, progress)
        cost = measure.operations(run, batch_size, progress)
        confusion = measured.information.confusion[-1]
        counts, rates = neuron_counts(config), measured.rates.layer
        images = {
            "measured": measured,
            "examples": examples,
            "viewer_data": viewer.viewer_data(run, examples),
            "activity": _activity(measured.rates),
            "layer_count": len(rates),
            "mean_rate": float(np.average(list(rates.values()), weights=[counts[name] for name in rates])),
            "cost": cost,
            "cost_layers": {name: layer for name, layer in cost.layers.items() if layer.Dense},
            "step_curve": figures.svg(
                lambda: figures.accuracy_by_step(measured.information.accuracy.tolist()),
                "by-step",
                "test accuracy over the number of steps counted",
            ),
        }
    network = dataclasses.asdict(config)
    script = source("viewer.js")
    # The template puts a line break before and after the script.
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode("ascii")
    allowed = f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    return render(
        "page.html",
        **images,
        run=run,
        config=config,
        command=command,
        where=shlex.quote(run.where),
        version=__version__,
        versions=versions(),
        sections=SECTIONS,
        without_images=(NEED_IMAGES if run.source is None else set()) | ({"classes"} if confusion is None else set()),
        unreadable=f"This needs the test images, which cannot be read: {run.without}",
        parameters=sum(leaf.size for leaf in jax.tree.leaves(nnx.state(trained.model, nnx.Param))),
        classes=None if confusion is None else classes(confusion, names),
        blocks=len(mixing),
        mixing=[_block(mixing[i]) for i in spaced(len(mixing), BLOCKS)],
        effective=[_effective(field) for field in effective],
        field_images=effective[0].images if effective else 0,
        field_channels=len(effective[0].units.channels) if effective else 0,
        curves=_curves(run),
        network=network,
        training={name: value for name, value in run.settings.items() if name not in network},
        tensors=weights.tensors_file(run.folder),
        policy=f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'",
        style=source("page.css"),
        script=script,
    )


def render(template: str, **values: Any) -> str:
    """A template of this package with values; characters that HTML does not allow become question marks."""
    text = environment().get_template(template).render(values)
    # Lone surrogates come from file names.
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "?")


def source(name: str) -> Markup:
    """A file beside the templates, as it is."""
    loader = environment().loader
    assert loader is not None
    return Markup(loader.get_source(environment(), name)[0])


@functools.cache
def environment() -> Environment:
    """Jinja with autoescape, which reports undefined names, and the filters of the templates."""
    made = Environment(
        loader=PackageLoader("spiking_mlp_jax.analysis.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    made.filters |= {
        "count": lambda count, word: f"{count:,} {word}{'s' * (count != 1)}",
        "data_uri": data_uri,
        # Lines may break after a dot of a layer's name.
        "dotted": lambda name: Markup("{}").format(name).replace(".", Markup(".<wbr>")),
        "percent": percent,
        "short": _short,
        "signed_map": signed_map,
    }
    return made


def classes(confusion: Sequence[Sequence[float]] | Int[np.ndarray, "K K"], names: Sequence[str]) -> dict[str, Any]:
    """Accuracy of each class, or of the worst of many; the confusion matrix; the most frequent confusions.

    Args:
        confusion: images by true class (row) and predicted class (column).
        names: of the classes.
    """
    confusion = np.asarray(confusion, np.int64)
    totals = confusion.sum(1)
    share = confusion / np.maximum(totals, 1)[:, None]
    own = np.diagonal(share)
    chosen, caption = np.arange(len(names)), "Accuracy of each class"
    if len(names) > NAMED:
        known = np.flatnonzero(totals)
        chosen = known[np.argsort(own[known], kind="stable")][: NAMED // 2]
        caption = f"Accuracy of the {len(chosen)} worst of {len(names)} classes"
    wrong = confusion * (1 - np.eye(len(names), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs = [divmod(int(i), len(names)) for i in order if wrong.flat[i]]
    few = len(names) <= CELLS
    return {
        "names": names,
        "caption": caption,
        "by_class": [(k, names[k], float(own[k]), int(totals[k])) for k in chosen.tolist()],
        "cells": [list(zip(*row, strict=True)) for row in zip(share.tolist(), confusion.tolist(), strict=True) if few],
        "map": signed_map(np.sqrt(share), 1.0),
        "pairs": [(names[a], names[b], float(share[a, b]), int(wrong[a, b])) for a, b in pairs],
    }


def _activity(rates: Rates) -> dict[str, Any]:
    """Firing rates by layer, time step and token; units that never or always fire."""
    found = dead_and_saturated(rates)
    marks = dict.fromkeys(found.silent_layers, "silent") | dict.fromkeys(found.saturated_layers, "saturated")
    steps = len(next(iter(rates.step.values())))
    layers = []
    for name, rate in rates.layer.items():
        shares = found.units[name].shares()
        layers.append(
            {
                "name": name.removesuffix(SPIKES),
                "rate": rate,
                "mark": marks.get(name, ""),
                "steps": rates.step[name].tolist() if steps > 1 else [],
                "dead": shares["dead_neurons"],
                "saturated": shares["saturated_neurons"],
            }
        )
    names = [name for name in rates.token if name.endswith((".encode.spikes", ".token.spikes", ".channel.spikes"))]
    maps = {names[i].removesuffix(SPIKES): rates.token[names[i]] for i in spaced(len(names), MAPS)}
    return {
        "silent": len(found.silent_layers),
        "saturated": len(found.saturated_layers),
        "layers": layers,
        "most": max([float(values.max()) for values in rates.step.values()] + [1e-9]),
        "steps": [f"step {t + 1}" for t in range(steps)] if steps > 1 else [],
        "maps": maps,
        "mappable": len(names),
        "brightest": max([float(values.max()) for values in maps.values()] + [1e-9]),
    }


def _block(mixing: Mixing):
    """Maps of a block's mixing weights: values, name, and the caption after the name."""
    side = len(mixing.height)
    middle, random = side // 2, percent((2 * side - 1) / side**2, 0)
    for what, matrix in {"height": mixing.height, "width": mixing.width}.items():
        share = percent(convolution_share(matrix), 0)
        yield matrix, mixing.block, f", along the {what}: {share} convolution (random: {random})"
    yield separable_fields(mixing.height, mixing.width)[middle, middle], mixing.block, ", product"


def _effective(field: EffectiveField):
    """A map of an effective field: values, name, and the caption, "" where no pixel has an effect."""
    values, name = field.map(), field.units.layer.removesuffix(SPIKES)
    try:
        size = field_size(values)
    except InputError:
        return values, name, ""
    told = f": half of it within {size.half:.1f} pixels of its centre, 90\u00a0% within {size.ninety:.1f}"
    return np.sqrt(values), name, told


def _curves(run: Run) -> list[tuple[str, Markup, list[float]]]:
    """Loss and accuracy over the training steps, with their values on the test images; [] where nothing is logged."""
    if not any(record.get("split") in ("train", "eval") and "step" in record for record in run.metrics):
        return []
    found = []
    for key in ("loss", "accuracy"):
        drawing = figures.svg(
            lambda key=key: figures.learning_curve(run.metrics, key), f"curve-{key}", f"{key} over the training steps"
        )
        values = [r[key] for r in run.metrics if r.get("split") == "eval" and r.get(key) is not None]
        found.append((key, drawing, values))
    return found


def _short(count: float) -> str:
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.4g}"
