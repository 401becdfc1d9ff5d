"""The command `spiking-mlp probe activity`: firing rates, dead units, spike trains, potentials, steps."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from spiking_mlp_jax.cli.deploy import WHERE
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.progress import shown_progress

if TYPE_CHECKING:
    from spiking_mlp_jax.analysis.activity.measure import Activity


def add(commands) -> None:
    """Adds the command's parser.

    Args:
        commands: the subparsers of `spiking-mlp probe`.
    """
    description = (
        "Runs the network on test images drawn at random and measures each layer: firing rate by time step, channel "
        "and token, units that never or always fire, spike counts and inter-spike intervals, membrane potentials "
        "against the threshold, similarity between time steps; and the accuracy after each step. Writes figures and "
        "activity.json, and prints a table."
    )
    parser = commands.add_parser(
        "activity",
        help="firing rates, dead units, spike trains, potentials, what each step buys",
        description=textwrap.fill(description, 79),
        epilog="examples:\n  spiking-mlp probe activity fashion_mnist\n"
        "  spiking-mlp probe activity runs/demo -o activity --images 10000\n"
        "  spiking-mlp probe activity runs/cifar10 --data-dir DIR",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", metavar="NETWORK", help=WHERE)
    parser.add_argument("-o", "--output", metavar="FOLDER", help="where to write (default: activity/NETWORK)")
    parser.add_argument(
        "--images", type=_whole(1), default=1000, metavar="N", help="how many test images (default: 1000)"
    )
    parser.add_argument("--seed", type=_whole(0), default=0, metavar="S", help="of the draw (default: 0)")
    parser.add_argument("--dataset", metavar="NAME", help="data to take them from (default: what it was trained on)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data (default: the workdir's)")
    parser.add_argument("--batch-size", type=_whole(1), default=64, metavar="N", help="images at a time (default: 64)")
    parser.add_argument(
        "--similarity-images",
        type=_whole(0),
        default=256,
        metavar="N",
        help="how many of the images time steps are compared over; 0: none (default: 256)",
    )
    parser.add_argument(
        "--features",
        choices=("channel", "neuron"),
        default="channel",
        help="what represents an image there: each channel's rate, or each neuron's (default: channel)",
    )
    parser.add_argument(
        "--dead", type=_rate, default=0.0, metavar="R", help="rate up to which a unit is dead (default: 0)"
    )
    parser.add_argument(
        "--saturated", type=_rate, default=1.0, metavar="R", help="rate from which it is saturated (default: 1)"
    )
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> None:
    """Runs the command."""
    # Answered before minutes have gone by.
    if chosen.dead >= chosen.saturated:
        raise InputError(f"--dead {chosen.dead:g} must be below --saturated {chosen.saturated:g}")
    from spiking_mlp_jax.analysis.activity import plots
    from spiking_mlp_jax.analysis.activity.measure import measure
    from spiking_mlp_jax.analysis.samples import drawn, labelled_batches, open_test_images
    from spiking_mlp_jax.data.damaged import Damaged
    from spiking_mlp_jax.models import weights
    from spiking_mlp_jax.utils.compilation_cache import use_compilation_cache

    use_compilation_cache("auto")
    folder, model, data, whole = open_test_images(chosen.weights, chosen.dataset, chosen.data_dir)
    dataset = chosen.dataset or data["dataset"]
    if len(whole.class_names) != model.config.num_classes:
        raise InputError(
            f"the network in {folder} knows {model.config.num_classes} classes, but {dataset} has "
            f"{len(whole.class_names)}: name its own data with --dataset and --data-dir"
        )
    output = Path(chosen.output or Path("activity") / Path(os.path.abspath(chosen.weights)).name)
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is not a folder: give another with -o")

    source = drawn(whole, chosen.images, chosen.seed)
    damaged = Damaged(source, weights.max_bad_images(folder), lambda text: print(text, file=sys.stderr))
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
    document = {"network": str(chosen.weights), "dataset": dataset, "seed": chosen.seed, "features": chosen.features}
    paths = plots.save(output, figures, {**document, **found.to_dict()})
    for line in table(found):
        print(line)
    print()
    for path in paths:
        print(path)


def table(found: Activity) -> list[str]:
    """The lines that the command prints: each layer's rate, dead and saturated neurons; accuracy after each step."""
    from spiking_mlp_jax.analysis.activity.plots import label

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
        lines += ["", f"note: {wrong:,} spikes differ from the potentials computed again, by rounding"]
    return lines


def _whole(least: int):
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f'"{text}" is not a whole number of at least {least}')
        return value

    return parse


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'"{text}" is not a rate from 0 to 1')
    return value
