"""Options and checks shared by commands. Nothing large is imported, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.paths import output_file, user_path

WHERE = "a workdir, a weights folder, a shipped network's name, or OWNER/NAME on the Hugging Face Hub"
NETWORK = "a compiled network (.smlp)"


def add_command(commands, name: str, summary: str, description: str, examples: str, note: str = "", run=None):
    """Add a command and return its parser.

    Args:
        commands: the subparsers to add it to.
        name: what the user types.
        summary: one line for the list of commands.
        description: what the command does, for its own --help.
        examples: command lines, separated by newlines and two spaces.
        note: a paragraph that follows them.
        run: function of the parsed arguments; its value is the exit status, None means 0.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 79),
        epilog=f"examples:\n  {examples}" + (f"\n\n{textwrap.fill(note, 79)}" if note else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run or (lambda chosen: parser.print_help()))
    return parser


def whole(least: int) -> Callable[[str], int]:
    """An argument type: whole numbers of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f'must be a whole number of at least {least}, got "{text}"')
        return value

    return parse


positive = whole(1)


def path_type(text: str) -> Path:
    """An argument type: paths."""
    try:
        return user_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """An argument type: numbers from `least` to `most`, both included."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            bounds = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f'must be a number {bounds}, got "{text}"')
        return value

    return parse


def add_value(
    parser, name: str, default, help: str, type: Callable[[str], Any] = positive, metavar: str = "N", shown: str = ""
) -> None:
    """Add an option that takes a value; its help ends with the default, or with what that stands for."""
    shown = shown or (default if isinstance(default, str) else f"{default:g}")
    parser.add_argument(name, type=type, default=default, metavar=metavar, help=f"{help} (default: {shown})")


def add_output(parser, help: str, metavar: str = "FILE", **options) -> None:
    """Add -o/--output; `options` are those of `add_argument`."""
    parser.add_argument("-o", "--output", metavar=metavar, help=help, **options)


def add_dataset(parser, help: str):
    """Add --dataset and return it."""
    return parser.add_argument("--dataset", metavar="NAME", help=help)


def add_data_dir(parser, default: str = "that of the training run"):
    """Add --data-dir and return it; `default` is for the help."""
    return parser.add_argument("--data-dir", metavar="DIR", help=f"folder of the dataset (default: {default})")


def add_data(parser, batch_size: int | None = None, limit: str = "", images: str = "test images") -> None:
    """Add --dataset and --data-dir; optionally --batch-size and --limit.

    Args:
        parser: of a command that reads images.
        batch_size: the default, 0 if it follows from the image size; None adds no such option.
        limit: help text of --limit; "" adds no such option.
        images: what is read, for the help.
    """
    add_dataset(
        parser,
        f'where {images} come from: "fashion_mnist", "idx", "folder", "npz:FILE" or "tfds:NAME" (default: the '
        "dataset the network was trained on)",
    )
    add_data_dir(parser)
    if batch_size is not None:
        shown = "" if batch_size else "256, fewer above 32 px"
        add_value(parser, "--batch-size", batch_size, "images per batch", shown=shown)
    if limit:
        parser.add_argument("--limit", type=positive, metavar="N", help=limit)


def add_json(parser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def is_compiled(where: str) -> bool:
    """Whether a path is a compiled network, by its name or its first bytes."""
    from spiking_mlp_jax.deploy import artifact

    return artifact.is_compiled(where)


def refuse_compiled(where: str, why: str) -> None:
    """Refuse a compiled network where trained weights are needed; `why` ends the message.

    Raises:
        InputError: it is a compiled network, or is named like one and does not exist.
    """
    if is_compiled(where):
        if not os.path.isfile(user_path(where)):
            raise InputError(f"there is no file {where}: name an existing network")
        raise InputError(f"{where} is a compiled network, {why}")


def check_export(output: str | os.PathLike[str], source: str | os.PathLike[str] | None = None) -> Path:
    """The path of a file that a network is exported to.

    Raises:
        InputError: it cannot be written there, or would overwrite `source` or a file of a weights folder.
    """
    output = output_file(output)
    if source is not None and output.exists() and os.path.exists(source) and output.samefile(source):
        raise InputError(f"{output} is the network itself and would be overwritten: name another file with -o")
    if (output.parent / "config.json").is_file():
        from spiking_mlp_jax.models.weights import FILES

        if output.name in FILES:
            raise InputError(f"{output} is part of a weights folder and would be overwritten: name another file")
    return output


def drop_output() -> None:
    """Empty stdout's buffer; if that fails, drop it, because Python flushes stdout once more at exit."""
    stream: TextIO | None = sys.stdout  # None where it is closed
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def use_jax_cache() -> None:
    """Cache compiled JAX programs in the user's cache folder."""
    from spiking_mlp_jax.utils.compilation_cache import use_compilation_cache

    use_compilation_cache("auto")
