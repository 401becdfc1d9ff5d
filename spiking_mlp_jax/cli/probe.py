"""The command `spiking-mlp probe`: looks into a network. `receptive-fields` is here, `activity` has its own file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from spiking_mlp_jax.cli import probe_activity as cli_probe_activity
from spiking_mlp_jax.cli.deploy import WHERE
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.progress import shown_progress


def add_commands(commands, command, positive) -> None:
    """Adds the command's parsers.

    Args:
        commands: of argparse.
        command: function that makes one with a summary, a description, examples and a note.
        positive: type of whole numbers from 1 on.
    """
    parser = command(
        commands,
        "probe",
        "look into a network",
        "Measures what the neurons of a network do, and ends in figures and a JSON file.",
        "spiking-mlp probe receptive-fields fashion_mnist -o fields\n"
        "  spiking-mlp probe activity fashion_mnist -o activity",
    )
    parser.set_defaults(run=lambda chosen: parser.print_help())
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT")
    _add_receptive_fields(kinds, command, positive)
    cli_probe_activity.add(kinds)


def _add_receptive_fields(kinds, command, positive) -> None:
    fields = command(
        kinds,
        "receptive-fields",
        "what in an image makes units fire",
        "Mixing profiles, effective receptive fields by input gradients, spike-triggered averages and covariances "
        "under white noise and natural images, and Gabor fits to all of them; beside an untrained network, shuffled "
        "pixels and shifted spikes. Interrupted, it goes on with the same command.",
        "spiking-mlp probe receptive-fields fashion_mnist -o fields\n"
        "  spiking-mlp probe receptive-fields runs/cifar10_small -o fields --images 10000 --noise 40000\n"
        "  spiking-mlp probe receptive-fields fashion_mnist -o fields --layer stage0.encode.spikes",
        "Gabor fits take most of the time: about a third of a second each, twelve for every unit of a layer. "
        "docs/receptive_fields.md says what is measured, how, and what came out.",
    )
    fields.add_argument("weights", metavar="NETWORK", help=WHERE)
    fields.add_argument("-o", "--output", metavar="FOLDER", help="for figures and JSON (default: fields/NETWORK)")
    fields.add_argument("--images", type=positive, default=2000, metavar="N", help="natural images (default: 2000)")
    fields.add_argument("--noise", type=positive, default=20_000, metavar="N", help="noise images (default: 20000)")
    fields.add_argument(
        "--gradients", type=positive, default=64, metavar="N", help="images whose gradients are averaged (default: 64)"
    )
    fields.add_argument("--units", type=positive, default=24, metavar="N", help="channels of each layer (default: 24)")
    fields.add_argument(
        "--covariances", type=positive, default=4, metavar="N", help="of these, with a covariance (default: 4)"
    )
    fields.add_argument(
        "--least", type=positive, default=100, metavar="N", help="spikes that a unit needs (default: 100)"
    )
    fields.add_argument(
        "--layer",
        action="append",
        metavar="NAME",
        help="a layer of spikes, may be repeated (default: what leaves each stage)",
    )
    fields.add_argument(
        "--contrast",
        type=float,
        default=1.0,
        metavar="S",
        help="standard deviation of the noise, where 1 is that of the images (default: 1)",
    )
    fields.add_argument("--binary", action="store_true", help="binary noise in place of Gaussian noise")
    fields.add_argument("--seed", type=int, default=0, metavar="S", help="of all that is random (default: 0)")
    fields.add_argument("--batch-size", type=positive, default=256, metavar="N", help="images at a time (default: 256)")
    fields.add_argument("--dataset", metavar="NAME", help="data to take images from (default: what it was trained on)")
    fields.add_argument("--data-dir", metavar="DIR", help="folder of the data (default: the workdir's)")
    fields.set_defaults(run=_receptive_fields)


def _receptive_fields(chosen: argparse.Namespace) -> None:
    if not 0 <= chosen.seed < 2**31:
        raise InputError(f"--seed is {chosen.seed}, but it must be at least 0 and below 2**31")
    if not 0 < chosen.contrast < 1e6:
        raise InputError(f"--contrast is {chosen.contrast}, but it must be a positive number")
    out = Path(chosen.output or Path("fields") / Path(os.path.abspath(chosen.weights)).name)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is not a folder: give another with -o")
    from spiking_mlp_jax.analysis.fields.plots import figures
    from spiking_mlp_jax.analysis.fields.responses import default_layers
    from spiking_mlp_jax.analysis.fields.study import Settings, study
    from spiking_mlp_jax.analysis.fields.summary import summarize, table
    from spiking_mlp_jax.analysis.plots import write
    from spiking_mlp_jax.analysis.samples import open_test_images
    from spiking_mlp_jax.train.logging import to_json
    from spiking_mlp_jax.utils.compilation_cache import use_compilation_cache
    from spiking_mlp_jax.utils.files import write_whole

    use_compilation_cache("auto")
    _, model, data, source = open_test_images(chosen.weights, chosen.dataset, chosen.data_dir)
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
    )
    with shown_progress() as progress:
        parts = study(model, data, source, settings, out / "parts", progress)
    document = {"network": str(chosen.weights), **summarize(parts, model.config, settings, list(layers))}
    write_whole(out / "receptive_fields.json", [(to_json(document, indent=1) + "\n").encode()])
    written = [
        write(figure, out / f"{name}.png") for name, figure in figures(parts, model.config, list(layers)).items()
    ]
    print(table(document))
    print(f"\n{out / 'receptive_fields.json'} has all figures; drawn: {', '.join(path.name for path in written)}")
