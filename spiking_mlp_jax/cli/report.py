"""The command `spiking-mlp report`: an HTML page about a trained network."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from spiking_mlp_jax.cli.options import WHERE, add_command, positive
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.progress import shown_progress


def add_commands(commands) -> None:
    """Adds the parser to the subparsers of `spiking-mlp`."""
    parser = add_command(
        commands,
        "report",
        "write an HTML page about a trained network",
        "Shows the spikes and class scores of example images step by step, accuracy by time step and class, the worst "
        "mistakes, firing rates, receptive fields, operations and energy, learning curves and settings, in one "
        "self-contained file.",
        "spiking-mlp report runs/demo\n  spiking-mlp report fashion_mnist -o fashion_mnist.html\n"
        "  spiking-mlp report runs/imagenet --limit 2000",
        "The page names what it cannot show, e.g. learning curves where there are only weights.",
    )
    parser.add_argument("weights", metavar="WORKDIR_OR_WEIGHTS", help=WHERE)
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="file to write (default: report.html in the workdir or weights folder)"
    )
    parser.add_argument("--dataset", metavar="NAME", help="whose test images to use (default: that of the training)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data (default: the workdir's)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only N test images, evenly spaced (default: all)")
    parser.add_argument("--batch-size", type=positive, default=100, metavar="N", help="images at a time (default: 100)")
    parser.set_defaults(run=_report)


def _report(chosen: argparse.Namespace) -> None:
    from spiking_mlp_jax.models import weights

    # Report a wrong name before the work.
    folder = weights.find(chosen.weights)
    output = Path(chosen.output) if chosen.output else _place(folder, weights.PRETRAINED)
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"{output} cannot be written; name a file in a folder that exists")
    from spiking_mlp_jax.analysis.report.page import make_page, write_report
    from spiking_mlp_jax.analysis.report.run import open_run
    from spiking_mlp_jax.utils.compilation_cache import use_compilation_cache

    use_compilation_cache("auto")
    run = open_run(chosen.weights, chosen.dataset, chosen.data_dir, chosen.limit)
    with shown_progress() as progress:
        page = make_page(run, _command(chosen), chosen.batch_size, progress, lambda line: print(line, file=sys.stderr))
    print(write_report(page, output))


def _place(folder: Path, shipped: Path) -> Path:
    if folder.parent == shipped:
        return Path("report.html")  # in the current folder, not in the package
    return (folder.parent if folder.name == "weights" else folder) / "report.html"


def _command(chosen: argparse.Namespace) -> str:
    words = ["spiking-mlp", "report", chosen.weights]
    for option in ("dataset", "data_dir", "limit"):
        value = getattr(chosen, option)
        words += [] if value is None else ["--" + option.replace("_", "-"), str(value)]
    return shlex.join(words)
