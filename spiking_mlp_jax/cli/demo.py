"""The command `demo`: a tour with the network and images in the package."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from spiking_mlp_jax.cli.options import add_command, add_output, add_value
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.paths import user_path

IMAGES = 4
SHOWN = 6
NETWORK = "fashion_mnist"


def add_commands(commands, run: Callable[[Sequence[str]], int]) -> None:
    """Add the parser to the subparsers of `spiking-mlp`; `run` runs a command line."""
    parser = add_command(
        commands,
        "demo",
        "take a tour: classify, compile, audit, report (1 to 2 minutes)",
        "Classifies test images with a network, both from the package, measures accuracy, compiles the network to "
        "integers, audits it for multiplications, and writes an HTML report. Each command is printed before it runs. "
        "Nothing is downloaded.",
        "spiking-mlp demo\n  spiking-mlp demo -o /tmp/tour",
    )
    add_output(parser, "output folder (default: spiking_mlp_demo)", "FOLDER", default="spiking_mlp_demo")
    add_value(parser, "--limit", 500, "number of test images")
    parser.set_defaults(run=lambda chosen: _demo(chosen, run))


def _demo(chosen: argparse.Namespace, run: Callable[[Sequence[str]], int]) -> int:
    folder = user_path(chosen.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be created ({error}): name another folder with -o") from error
    images = write_images(folder)
    compiled, limit = str(folder / "fashion.smlp"), ["--limit", str(chosen.limit)]
    for words in (
        ["predict", NETWORK, *map(str, images), "--top", "2"],
        ["evaluate", NETWORK, *limit],
        ["compile", NETWORK, "-o", compiled],
        ["evaluate", compiled, *limit],
        ["audit", compiled],
        ["export-c", compiled],
        ["report", NETWORK, "-o", str(folder / "report.html"), *limit],
    ):
        print(f"\n$ spiking-mlp {shlex.join(words)}", flush=True)
        # The audit prints a line for each operation.
        if status := _shortened(run, words) if words[0] == "audit" else run(words):
            return status
    print(f"\nOpen {folder / 'report.html'} in a browser; the images above are in {folder}.")
    return 0


def _shortened(run, words) -> int:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        status = run(words)
    lines = text.getvalue().splitlines()
    print("\n".join([*lines[:SHOWN], f"... {len(lines) - 2 * SHOWN} more lines", *lines[-SHOWN:]]))
    return status


def write_images(folder: Path) -> list[Path]:
    """Write one Fashion-MNIST test image of each of four classes as PNG files named after the classes."""
    from PIL import Image

    from spiking_mlp_jax.data.sources import open_source
    from spiking_mlp_jax.utils.files import write_whole

    source = open_source("fashion_mnist", "test", None)
    chosen: dict[int, dict] = {}
    for i in range(len(source)):
        record = source[i]
        chosen.setdefault(int(record["label"]), record)
        if len(chosen) == IMAGES:
            break
    paths = []
    for label, record in chosen.items():
        path = folder / (source.class_names[label].lower().replace(" ", "_").replace("/", "_") + ".png")
        file = io.BytesIO()
        Image.fromarray(record["image"].squeeze()).save(file, "PNG")
        write_whole(path, [file.getvalue()])
        paths.append(path)
    return paths
