"""The commands `probe activity` and `probe receptive-fields`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spiking_mlp_jax.cli.options import (
    WHERE,
    add_command,
    add_data,
    add_output,
    add_value,
    number,
    use_jax_cache,
    whole,
)
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.paths import output_folder, real_name
from spiking_mlp_jax.utils.progress import shown_progress, time_left

if TYPE_CHECKING:
    from spiking_mlp_jax.analysis.activity.measure import Activity


def add_commands(commands) -> None:
    """Add the parsers to the subparsers of `spiking-mlp`."""
    parser = add_command(
        commands,
        "probe",
        "look into a network",
        "Measures what the neurons of a network do, and writes figures and a JSON file.",
        "spiking-mlp probe receptive-fields fashion_mnist -o fields\n"
        "  spiking-mlp probe activity fashion_mnist -o activity",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT")
    _add_receptive_fields(kinds)
    _add_activity(kinds)


def _add_receptive_fields(kinds) -> None:
    parser = add_command(
        kinds,
        "receptive-fields",
        "what makes units fire: receptive fields",
        "Mixing profiles, effective receptive fields by input gradients, spike-triggered averages and covariances "
        "under white noise and natural images, and Gabor fits to all of them; next to an untrained network, shuffled "
        "pixels and shifted spikes. After an interruption, the same command continues.",
        "spiking-mlp probe receptive-fields fashion_mnist -o fields\n"
        "  spiking-mlp probe receptive-fields runs/cifar10_small -o fields --images 10000 --noise 40000\n"
        "  spiking-mlp probe receptive-fields fashion_mnist -o fields --layer stage0.encode.spikes",
        "The time grows with the noise images and with units and layers, for each of which twelve Gabors are fitted. "
        "docs/receptive_fields.md describes the measurements and the results.",
        run=_receptive_fields,
    )
    parser.add_argument("network", metavar="NETWORK", help=WHERE)
    add_output(parser, "output folder (default: fields/NETWORK)", "FOLDER")
    add_value(parser, "--images", 2000, "natural images")
    add_value(parser, "--noise", 0, "noise images", shown="ten times --images")
    add_value(parser, "--gradients", 64, "images whose gradients are averaged")
    add_value(parser, "--units", 24, "channels of each layer")
    add_value(parser, "--covariances", 4, "of these, how many get covariances")
    add_value(parser, "--least", 100, "minimum spikes of a unit")
    parser.add_argument(
        "--layer",
        action="append",
        metavar="NAME",
        help="a layer that spikes; may be repeated (default: the output of each stage)",
    )
    add_value(parser, "--contrast", 1.0, "standard deviation of the noise relative to the images'", float, "S")
    parser.add_argument("--binary", action="store_true", help="binary instead of Gaussian noise")
    add_value(parser, "--seed", 0, "random seed", int, "S")
    add_data(parser, batch_size=0)


def _receptive_fields(chosen: argparse.Namespace) -> None:
    if not 0 <= chosen.seed < 2**31:
        raise InputError(f"--seed must be at least 0 and below 2**31, got {chosen.seed}")
    if not 0 < chosen.contrast < 1e6:
        raise InputError(f"--contrast must be a positive number, got {chosen.contrast}")
    out = output_folder(chosen.output or Path("fields") / real_name(chosen.network))
    from spiking_mlp_jax.analysis.fields.plots import figures
    from spiking_mlp_jax.analysis.fields.responses import default_layers
    from spiking_mlp_jax.analysis.fields.study import Settings, study
    from spiking_mlp_jax.analysis.fields.summary import summarize, table
    from spiking_mlp_jax.analysis.plots import write
    from spiking_mlp_jax.data.trained import open_trained
    from spiking_mlp_jax.train.logging import to_json
    from spiking_mlp_jax.utils.files import write_whole

    use_jax_cache()
    trained = open_trained(chosen.network)
    model, source = trained.model, trained.source("test", chosen.dataset, chosen.data_dir)
    layers = tuple(chosen.layer or default_layers(model.config))
    settings = Settings(
        layers=layers,
        channels=chosen.units,
        noise=chosen.noise,
        images=chosen.images,
        gradients=chosen.gradients,
        covariances=chosen.covariances,
        least=chosen.least,
        contrast=chosen.contrast,
        kind="binary" if chosen.binary else "gaussian",
        seed=chosen.seed,
        batch_size=chosen.batch_size,
    ).of(model.config)

    def announce(seconds):
        print(f"estimated: {time_left(seconds, 1, 2)}; rerun the same command to resume", file=sys.stderr, flush=True)

    with shown_progress() as progress:
        parts = study(model, trained.data, source, settings, out / "parts", progress, announce)
    document = {"network": str(chosen.network), **summarize(parts, model.config, settings, list(layers))}
    write_whole(out / "receptive_fields.json", [(to_json(document, indent=1) + "\n").encode()])
    written = [
        write(figure, out / f"{name}.png") for name, figure in figures(parts, model.config, list(layers)).items()
    ]
    print(table(document))
    print(f"\n{out / 'receptive_fields.json'} has all numbers; figures: {', '.join(path.name for path in written)}")


def _add_activity(kinds) -> None:
    parser = add_command(
        kinds,
        "activity",
        "firing rates, dead units, spike trains, potentials, accuracy per time step",
        "Runs the network on test images drawn at random and measures each layer: firing rate by time step, channel "
        "and token, units that never or always fire, spike counts and inter-spike intervals, membrane potentials "
        "against the threshold, similarity between time steps; and the accuracy after each step. Writes figures and "
        "activity.json, and prints a table.",
        "spiking-mlp probe activity fashion_mnist\n"
        "  spiking-mlp probe activity runs/demo -o activity --images 10000\n"
        "  spiking-mlp probe activity runs/cifar10 --data-dir DIR",
        run=_activity,
    )
    parser.add_argument("network", metavar="NETWORK", help=WHERE)
    add_output(parser, "output folder (default: activity/NETWORK)", "FOLDER")
    add_value(parser, "--images", 1000, "test images")
    add_value(parser, "--seed", 0, "seed of the draw", whole(0), "S")
    add_data(parser, batch_size=64)
    add_value(parser, "--similarity-images", 256, "images over which time steps are compared; 0: none", whole(0))
    parser.add_argument(
        "--features",
        choices=("channel", "neuron"),
        default="channel",
        help="what represents an image there: each channel's rate or each neuron's (default: channel)",
    )
    add_value(parser, "--dead", 0.0, "rate up to which a unit is dead", number(0, 1), "R")
    add_value(parser, "--saturated", 1.0, "rate from which it is saturated", number(0, 1), "R")


def _activity(chosen: argparse.Namespace) -> None:
    if chosen.dead >= chosen.saturated:
        raise InputError(f"--dead {chosen.dead:g} must be below --saturated {chosen.saturated:g}")
    output = output_folder(chosen.output or Path("activity") / real_name(chosen.network))
    from spiking_mlp_jax.analysis.activity import plots
    from spiking_mlp_jax.analysis.activity.measure import measure
    from spiking_mlp_jax.analysis.samples import drawn, labelled_batches
    from spiking_mlp_jax.data.damaged import Damaged
    from spiking_mlp_jax.data.trained import open_trained

    use_jax_cache()
    trained = open_trained(chosen.network)
    model, data = trained.model, trained.data
    source = drawn(trained.source("test", chosen.dataset, chosen.data_dir), chosen.images, chosen.seed)
    damaged = Damaged(source, trained.max_bad_images, lambda text: print(text, file=sys.stderr))
    with shown_progress() as progress:
        found = measure(
            model,
            labelled_batches(source, model.config, data, chosen.batch_size, damaged),
            dead=chosen.dead,
            saturated=chosen.saturated,
            similarity_images=chosen.similarity_images,
            features=chosen.features,
            seed=chosen.seed,
            batch_size=chosen.batch_size,
            progress=lambda done: progress("test images", done, len(source)),
        )
    figures = plots.figures(found)
    figures["raster"] = plots.raster(model, source, data, data["class_names"])
    document = {"network": chosen.network, "dataset": chosen.dataset or data["dataset"], "seed": chosen.seed}
    document |= {"features": chosen.features, **found.to_dict()}
    paths = plots.save(output, figures, document)
    for line in table(found):
        print(line)
    print()
    for path in paths:
        print(path)


def table(found: Activity) -> list[str]:
    """Lines of text: rate, dead and saturated neurons of each layer; accuracy after each time step."""
    from spiking_mlp_jax.analysis.plots import label

    rates, units = found.rates, found.units
    width = max(len(label(name)) for name in rates.layer)
    lines = [
        f"{rates.images:,} images; dead: rate <= {100 * units.dead:g} %, "
        f"saturated: rate >= {100 * units.saturated:g} %",
        f"{'layer':{width}}     rate  dead neurons  saturated  dead channels",
    ]
    marks = dict.fromkeys(units.silent_layers, "  silent") | dict.fromkeys(units.saturated_layers, "  saturated")
    for name, rate in rates.layer.items():
        share, dead = units.units[name].shares(), units.units[name].dead_channels
        lines.append(
            f"{label(name):{width}}  {100 * rate:5.2f} %       {100 * share['dead_neurons']:5.1f} %    "
            f"{100 * share['saturated_neurons']:5.1f} %  {dead.sum():5} of {len(dead)}{marks.get(name, '')}"
        )
    if found.information is not None:
        about = found.information
        lines += ["", "steps  accuracy  (± s.e.)  this step alone  as at the end    loss"]
        for step, accuracy in enumerate(about.accuracy):
            lines.append(
                f"{step + 1:5}  {100 * accuracy:6.2f} %  ({100 * about.errors[step]:4.2f})   "
                f"       {100 * about.alone[step]:6.2f} %       {100 * about.agreement[step]:6.2f} %  "
                f"{about.loss[step]:.4f}"
            )
    wrong = sum(found.membrane.mismatches.values())
    if wrong:
        lines += ["", f"note: {wrong:,} spikes differ from the recomputed potentials, by rounding"]
    return lines
