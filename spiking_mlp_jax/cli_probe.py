"""The command `spiking-mlp probe`: looks into a network. `receptive-fields` is here, `activity` has its own file."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spiking_mlp_jax import cli_probe_activity
from spiking_mlp_jax.cli_deploy import WHERE
from spiking_mlp_jax.errors import InputError


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
    from spiking_mlp_jax import weights
    from spiking_mlp_jax.data.sources import open_source
    from spiking_mlp_jax.probe.field_plots import figures
    from spiking_mlp_jax.probe.field_study import Settings, study
    from spiking_mlp_jax.probe.field_summary import summarize
    from spiking_mlp_jax.probe.field_tables import table
    from spiking_mlp_jax.probe.plots import write
    from spiking_mlp_jax.probe.units import default_layers
    from spiking_mlp_jax.train.compilation_cache import use_compilation_cache
    from spiking_mlp_jax.train.metrics import to_json

    use_compilation_cache("auto")
    folder = weights.find(chosen.weights)
    model, meta = weights.load(folder)
    if "data" not in meta:
        raise InputError(f'{folder / weights.CONFIG} has no "data", which says how images become inputs: save it again')
    data, data_dir = meta["data"], chosen.data_dir
    if chosen.dataset is None and data_dir is None:
        data_dir = weights.data_dir(folder)
    source = open_source(chosen.dataset or data["dataset"], "test", data_dir)
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
    write_text(out / "receptive_fields.json", to_json(document, indent=1) + "\n")
    written = [
        write(figure, out / f"{name}.png") for name, figure in figures(parts, model.config, list(layers)).items()
    ]
    print(table(document))
    print(f"\n{out / 'receptive_fields.json'} has all figures; drawn: {', '.join(path.name for path in written)}")


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name that is then renamed; its folder is made when missing.

    Raises:
        InputError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): give another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def shown_progress(report_seconds: float = 30.0) -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows how far things are: bars with rate and time left, or lines now and then without a terminal.

    Args:
        report_seconds: between lines where there is no terminal.

    Yields:
        function of what is going on, how much of it is done, and of how much.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    tasks, started = {}, {}
    last = time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:

        def show(what: str, done: int, of: int) -> None:
            nonlocal last
            now = time.monotonic()
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of, rate="")
                started[what] = now, done
            start, before = started[what]
            rate = (done - before) / (now - start) if now > start else 0.0
            text = f"{rate:,.1f}/s" if rate else ""
            bars.update(tasks[what], completed=done, rate=text)
            if not console.is_terminal and now - last >= report_seconds:
                last = now
                left = f", {(of - done) / rate:,.0f} s left" if rate else ""
                console.print(f"{what}: {done:,} of {of:,} {text}{left}".rstrip())

        yield show
