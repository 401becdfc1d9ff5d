"""The head of a report, and at its end how the network was trained and with what."""

from __future__ import annotations

import dataclasses
import shlex

import jax
import numpy as np
from flax import nnx

from spiking_mlp_jax import __version__
from spiking_mlp_jax.analysis.report import figures
from spiking_mlp_jax.analysis.report.markup import missing, number, percent, scrolling, table, text
from spiking_mlp_jax.analysis.report.measure import Measured
from spiking_mlp_jax.analysis.report.run import Run
from spiking_mlp_jax.analysis.report.vector import drawn
from spiking_mlp_jax.deploy.cost import Cost
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.synapses import neurons
from spiking_mlp_jax.train.versions import versions


def head(run: Run, measured: Measured | None, cost: Cost | None, command: str) -> str:
    """Title, what the network is in a sentence, and its main figures.

    Args:
        run: what the page is about.
        measured: over the test images, or None.
        cost: of some test images, or None.
        command: that made the page.
    """
    c, data = run.config, run.data
    colour = "grey" if c.in_channels == 1 else "colour"
    origin = "an image folder" if data["dataset"] == "folder" else data["dataset"]
    parameters = parameter_count(run)
    tiles = []
    stored = run.evaluation
    if measured is not None:
        of = f"of {measured.images:,} test images"
        tiles.append((number(measured.accuracy, percent(measured.accuracy, 2), "accuracy"), f"right {of}"))
    elif "accuracy" in stored:
        accuracy = float(stored["accuracy"])
        tiles.append((number(accuracy, percent(accuracy, 2), "accuracy"), "test accuracy, from evaluation.json"))
    tiles.append((number(parameters, _short(parameters), "parameters"), "parameters"))
    tiles.append((number(c.time_steps, str(c.time_steps), "time_steps"), f"time step{'s' * (c.time_steps > 1)}"))
    if measured is not None:
        rate = mean_rate(run, measured)
        tiles.append((number(rate, percent(rate), "rate"), "of the neurons spike in a step"))
    if cost is not None:
        effective, energy = cost.total.effective, next(iter(cost.energy().values()))
        tiles.append((number(effective, _short(effective)), "synaptic operations an image"))
        tiles.append((number(energy.with_memory, f"{energy.with_memory / 1e6:.3g} µJ"), "an image, 45 nm, estimated"))
    words = " ".join(f'<span class="word">{text(word)}</span>' for word in command.split(" "))
    shown = "".join(f"<div><dt>{what}</dt><dd>{value}</dd></div>" for value, what in tiles)
    stages = ", ".join(
        f"{c.stage_side(i)} by {c.stage_side(i)} tokens of {c.stage_dim(i)} channels ({depth} block{'s' * (depth > 1)})"
        for i, depth in enumerate(c.depths)
    )
    encoding = "spiking patch encoding" if c.encoding == "spe" else "strided convolutions"
    between = f", with {encoding} between them" if c.stages > 1 else ""
    return (
        f"<h1>{text(run.name)}</h1>"
        f'<p class="lead">A spiking MLP that sorts {colour} images of {c.image_size} by {c.image_size} pixels '
        f"({text(origin)}) into {c.num_classes} classes. Its layers exchange spikes, 0 or 1, over "
        f"{c.time_steps} time step{'s' * (c.time_steps > 1)}. Stages: {text(stages)}{between}.</p>"
        f'<dl class="tiles">{shown}</dl>'
        f'<p class="quiet">Made by <code>{words}</code>, spiking-mlp-jax {text(__version__)}.</p>'
    )


def parameter_count(run: Run) -> int:
    """Numbers that were learned."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(run.model, nnx.Param)))


def mean_rate(run: Run, measured: Measured) -> float:
    """Spikes per neuron and step, over all neurons of the network."""
    counts, rates = neurons(run.config), measured.rates.layer
    return float(np.average(list(rates.values()), weights=[counts[name] for name in rates]))


def curves(run: Run) -> str:
    """Loss and accuracy over the training steps."""
    if not any(record.get("split") in ("train", "eval") and "step" in record for record in run.metrics):
        return missing(
            f"No metrics.jsonl of a training run lies beside the weights of {run.where}: there are no learning curves."
        )
    drawings = []
    for key in ("loss", "accuracy"):
        best = [r[key] for r in run.metrics if r.get("split") == "eval" and r.get(key) is not None]
        ends = ""
        if best:
            of = f"{min(best):.4f}" if key == "loss" else percent(max(best), 2)
            ends = f" On the test images the best of {len(best)} evaluations is {of}."
        svg = drawn(
            lambda key=key: figures.learning_curve(run.metrics, key), f"curve-{key}", f"{key} over the training steps"
        )
        drawings.append(f'<figure class="plot">{svg}<figcaption>{key.capitalize()}.{ends}</figcaption></figure>')
    return f'<div class="plots">{"".join(drawings)}</div>'


def configuration(run: Run, command: str) -> str:
    """Every setting, the versions, and the command."""
    model = dataclasses.asdict(run.config)
    parts = [f"<div><h3>Network</h3>{_settings(model, 'fields of ModelConfig')}</div>"]
    lacks = f"of a training run lies beside the weights of {run.where}."
    if run.settings:
        rest = {name: value for name, value in run.settings.items() if name not in model}
        told = _settings(rest, "config.json, without the fields of the network")
    else:
        told = missing(f"No config.json {lacks}")
    parts.append(f"<div><h3>Training</h3>{told}</div>")
    if run.versions:
        told = _settings(run.versions, "versions.json: what it was trained with")
    else:
        told = missing(f"No versions.json {lacks}") + _settings(versions(), "what this page was made with")
    parts.append(f"<div><h3>Versions</h3>{told}</div>")
    where = shlex.quote(run.where)
    tensors = weights.tensors_file(run.folder)
    commands = "\n".join((command, f"spiking-mlp evaluate {where}", f"spiking-mlp cost {where}"))
    return (
        f'<div class="columns">{"".join(parts)}</div>'
        f"<h3>Commands</h3>{scrolling(f'<pre>{text(commands)}</pre>', 'commands')}"
        f'<p class="quiet">{tensors.name} has {tensors.stat().st_size:,} bytes.</p>'
    )


def _settings(values, caption) -> str:
    rows = [(f"<code>{text(name)}</code>", text(_value(value))) for name, value in values.items()]
    return table(("name", "value"), rows, text(caption), kind="settings", tall=len(rows) > 14)


def _value(value):
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else value


def _short(count: float) -> str:
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.4g}"
