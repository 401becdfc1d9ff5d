"""The command `spiking-mlp`. Commands import large libraries only when they run, so that --help answers at once."""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import NoReturn, TextIO

from spiking_mlp_jax.cli import demo, deploy, export, predict, prepare, probe, report, sweep, train, weights
from spiking_mlp_jax.cli.options import drop_output
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils import __version__
from spiking_mlp_jax.utils.files import system_error
from spiking_mlp_jax.utils.interrupt import prompt_interrupt
from spiking_mlp_jax.utils.progress import REPORT_SECONDS, every

TRAINING_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain", "ml_collections")


WITH_PROGRESS = ("evaluate", "prepare", "probe", "sweep", "report", "demo")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message}; see "{self.prog} --help"\n')


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: the command line without the program's name; None takes the process's.

    Returns:
        The exit status: 0; 1 when `audit` finds multiplications; 2 for bad input, with one line on stderr; 130 after
        Ctrl-C; 141 when the output pipe is closed. Training and sweeps have more.
    """
    # Class and file names can hold what the terminal's encoding cannot.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            with prompt_interrupt():
                return run(arguments)
        finally:
            stream: TextIO | None = sys.stdout  # None where it is closed
            if stream is not None:
                stream.flush()
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        drop_output()
        return 141
    except OSError as error:
        if not error.errno:
            raise
        drop_output()
        refused = system_error(error, "the output")
        print("error:", refused, file=sys.stderr)
        return refused.exit_code
    except ModuleNotFoundError as error:
        # Compiled networks run where only numpy, numba and Pillow are installed.
        if (error.name or "").partition(".")[0] not in TRAINING_PACKAGES:
            raise
        print(f"error: this needs {error.name}, which is not installed: pip install spiking-mlp-jax", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        if arguments is None and not multiprocessing.active_children():
            os._exit(130)  # Python's own way out crashes while JAX computes
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="spiking-mlp",
        description="Trains and uses spiking MLPs: classifies images, measures accuracy, looks inside, compiles them "
        "to integer networks without multiplications.",
        epilog='"spiking-mlp COMMAND --help" explains a command.',
    )
    parser.add_argument("--version", action="version", version=f"spiking-mlp-jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser(
        "train",
        help="train a network",
        description=train.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[train.parser(add_help=False)],
    )
    for module in (predict, deploy, weights, export, prepare, probe, sweep, report):
        module.add_commands(commands)
    demo.add_commands(commands, run)
    return parser


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line without catching errors; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "train":
        return train.main(arguments[1:])
    parser = make_parser()
    chosen, rest = parser.parse_known_args(arguments)
    if hasattr(chosen, "overrides"):
        # Commands that take a configuration leave --config.NAME=VALUE to it.
        chosen.overrides = [x for x in rest if re.match(r"--(no)?config\.", x)]
        rest = [x for x in rest if x not in chosen.overrides]
    for name, value in vars(chosen).items():
        if value == "" or (isinstance(value, list) and "" in value):
            parser.error(f"argument {name}: expected a value, got an empty one")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if chosen.command is None:
        parser.print_help()
        return 0
    if chosen.command in WITH_PROGRESS:
        return chosen.run(chosen) or 0
    started, errors = time.monotonic(), sys.stderr

    def report() -> None:
        print(f"{chosen.command}: running for {time.monotonic() - started:.0f} s", file=errors, flush=True)

    with every(REPORT_SECONDS, report, errors is None or errors.isatty()):
        return chosen.run(chosen) or 0


if __name__ == "__main__":
    sys.exit(main())
