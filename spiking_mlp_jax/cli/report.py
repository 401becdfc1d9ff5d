"""The command `report`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from spiking_mlp_jax.cli.options import WHERE, add_command, add_data, add_output, use_jax_cache
from spiking_mlp_jax.utils.paths import output_file
from spiking_mlp_jax.utils.progress import shown_progress


def add_commands(commands) -> None:
    """Add the parser to the subparsers of `spiking-mlp`."""
    parser = add_command(
        commands,
        "report",
        "write an HTML page about a trained network",
        "Shows the spikes and class scores of example images step by step, accuracy by time step and class, the worst "
        "mistakes, firing rates, receptive fields, operations and energy, learning curves and settings, in one "
        "self-contained file.",
        "spiking-mlp report runs/demo\n  spiking-mlp report fashion_mnist -o fashion_mnist.html\n"
        "  spiking-mlp report runs/imagenet --limit 2000",
        "Sections without data say so, e.g. learning curves where there are only weights.",
        run=_report,
    )
    parser.add_argument("weights", metavar="WORKDIR_OR_WEIGHTS", help=WHERE)
    add_output(parser, "file to write (default: report.html in the workdir or weights folder)")
    add_data(parser, batch_size=100, limit="use only N test images, evenly spaced (default: all)")


def _report(chosen: argparse.Namespace) -> None:
    from spiking_mlp_jax.models import weights

    # Report a wrong name before the work.
    folder = weights.find(chosen.weights)
    output = output_file(chosen.output or _place(folder, weights.PRETRAINED))
    from spiking_mlp_jax.analysis.report.page import make_page, write_report
    from spiking_mlp_jax.analysis.report.run import open_run

    use_jax_cache()
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
