"""The commands `compile`, `audit`, `cost`, `export-c` and `pixels`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

import numpy as np

from spiking_mlp_jax.cli.options import (
    NETWORK,
    WHERE,
    add_command,
    add_data,
    add_json,
    add_output,
    add_value,
    check_export,
    is_compiled,
    use_jax_cache,
)
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.paths import output_file, user_path


def add_commands(commands) -> None:
    """Add the parsers to the subparsers of `spiking-mlp`."""
    parser = add_command(
        commands,
        "compile",
        "make an integer network without multiplications",
        "Folds the norms of a trained network into weights and thresholds, rounds them to integers, proves that no sum "
        "can overflow, and writes one file that runs without JAX, from pixels to class scores.",
        "spiking-mlp compile fashion_mnist -o fashion.smlp\n  spiking-mlp compile runs/demo -o demo.smlp --bits 4",
        "Rounding is calibrated on some training images: which inputs of a layer spike together decides how its "
        "weights are rounded.",
        run=_compile,
    )
    parser.add_argument("weights", metavar="WORKDIR_OR_WEIGHTS", help=WHERE)
    add_output(parser, "file to write, e.g. net.smlp", required=True)
    add_value(parser, "--bits", 8, "bits per weight, 2 to 8", int)
    add_value(parser, "--images", 512, "training images to calibrate on")
    add_data(parser, images="calibration images")

    parser = add_command(
        commands,
        "audit",
        "list every operation of a network and whether it multiplies",
        "Reads the program of a network, operation by operation, and reports whether each one only accumulates (one "
        "operand is a spike), shifts, adds or compares, or multiplies. The exit status is 0 if nothing multiplies, "
        "else 1.",
        "spiking-mlp audit fashion.smlp\n  spiking-mlp audit fashion_mnist\n  spiking-mlp audit fashion_mnist --folded",
        run=_audit,
    )
    parser.add_argument("network", metavar="NETWORK", help=f"{NETWORK}; or {WHERE}, as evaluated in floating point")
    parser.add_argument("--folded", action="store_true", help="trained networks: fold the norms first")
    parser.add_argument(
        "--compiled", action="store_true", help="compiled networks: also audit the engine's machine code"
    )

    parser = add_command(
        commands,
        "cost",
        "count a network's operations and estimate its energy",
        "Counts, layer by layer, the operations that test images cause: NeuroBench's Footprint, ConnectionSparsity, "
        "ActivationSparsity and SynapticOperations. Estimates the energy per image in a 45 nm process, with and "
        "without memory, next to the same network dense and next to one without spikes.",
        "spiking-mlp cost fashion_mnist --limit 1000\n  spiking-mlp cost fashion.smlp --json\n"
        "  spiking-mlp cost runs/demo --folded --plot cost.png",
        "Trained networks are counted and priced in float32, compiled ones in integers.",
        run=_cost,
    )
    parser.add_argument("network", metavar="NETWORK", help=f"{WHERE}; or {NETWORK}")
    parser.add_argument("--folded", action="store_true", help="trained networks: fold the norms first")
    add_data(parser, batch_size=100, limit="use only N test images, evenly spaced")
    add_json(parser)
    parser.add_argument("--plot", metavar="FILE", help="also draw operations and energy into a PNG file")

    parser = add_command(
        commands,
        "export-c",
        "write a compiled network as one C99 file",
        "Writes one C file that contains the weights, allocates nothing, uses no floating point and multiplies "
        "nothing, for a microcontroller or high-level synthesis.",
        "spiking-mlp export-c fashion.smlp -o fashion.c",
        run=_export_c,
    )
    parser.add_argument("network", metavar="NETWORK", help=NETWORK)
    add_output(parser, "file to write (default: NETWORK with the ending .c)")

    parser = add_command(
        commands,
        "pixels",
        "write images as the raw bytes that a compiled network takes",
        "Resizes images as the network's test images were, and writes their bytes (row, column, channel), image after "
        "image: the standard input of the program that export-c writes.",
        "spiking-mlp pixels fashion.smlp shoe.png shirt.png -o images.bin && ./fashion < images.bin",
        run=_pixels,
    )
    parser.add_argument("network", metavar="NETWORK", help=f"{NETWORK}; or {WHERE}")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file, e.g. JPEG or PNG")
    add_output(parser, "file to write, e.g. images.bin", required=True)


def _compile(chosen: argparse.Namespace) -> None:
    output = output_file(chosen.output)
    if output.suffix != ".smlp":
        raise InputError(f"-o must name a file that ends in .smlp, got {output}")
    from spiking_mlp_jax.deploy import artifact
    from spiking_mlp_jax.deploy.compile import compile
    from spiking_mlp_jax.models import weights

    use_jax_cache()
    folder = weights.find(chosen.weights)
    net = compile(folder, chosen.bits, images=chosen.images, dataset=chosen.dataset, data_dir=chosen.data_dir)
    artifact.save(net, output)
    print(f"{output}: {net}")
    before = weights.tensors_file(folder).stat().st_size
    print(f"{output.stat().st_size:,} bytes; the trained weights are {before:,}")
    print("no sum can overflow for any image; `spiking-mlp audit` lists every operation")


def _audit(chosen: argparse.Namespace) -> int:
    if chosen.compiled and not is_compiled(chosen.network):
        raise InputError(f"--compiled needs {NETWORK}, got {chosen.network}")
    from spiking_mlp_jax.deploy.audit import audit

    network, config = _open(chosen)
    kind = np.uint8 if is_compiled(chosen.network) else np.float32
    image = np.zeros((1, config.image_size, config.image_size, config.in_channels), kind)
    reports: list[Any] = [audit(network if is_compiled(chosen.network) else lambda x: network(x), image)]
    print(reports[0])
    if chosen.compiled:
        from spiking_mlp_jax.deploy.engine import Engine
        from spiking_mlp_jax.deploy.engine.machine_code import check

        reports.append(check(Engine(network)))
        print(reports[1])
    return 0 if all(report.ok for report in reports) else 1


def _open(chosen: argparse.Namespace) -> tuple[Any, Any]:
    """A network, folded if --folded says so, and its configuration."""
    if is_compiled(chosen.network):
        if chosen.folded:
            raise InputError(f"--folded needs a trained network, got {chosen.network}, whose norms are folded already")
        from spiking_mlp_jax.deploy import artifact

        net = artifact.load(user_path(chosen.network))
        return net, net.description
    from spiking_mlp_jax.deploy.fold import fold
    from spiking_mlp_jax.models import weights

    model, _ = weights.load(weights.find(chosen.network))
    return fold(model) if chosen.folded else model, model.config


def _cost(chosen: argparse.Namespace) -> None:
    plot = output_file(chosen.plot) if chosen.plot else None
    from spiking_mlp_jax.data.sources import spread
    from spiking_mlp_jax.data.trained import open_trained
    from spiking_mlp_jax.data.transforms import fitted
    from spiking_mlp_jax.deploy.cost import cost
    from spiking_mlp_jax.deploy.fold import fold
    from spiking_mlp_jax.deploy.predict import pixels_of, test_images

    use_jax_cache()
    net: Any
    if is_compiled(chosen.network):
        net, config = _open(chosen)
        where, pixels, source = chosen.network, pixels_of(net), test_images(net, chosen.dataset, chosen.data_dir)
    else:
        trained = open_trained(chosen.network)
        where, pixels, config = trained.folder, trained.pixels, trained.model.config
        net = fold(trained.model) if chosen.folded else trained.model
        source = trained.source("test", chosen.dataset, chosen.data_dir)
    source = spread(source, chosen.limit)
    batches = (
        fitted((source[i]["image"] for i in range(at, min(at + chosen.batch_size, len(source)))), config, pixels)
        for at in range(0, len(source), chosen.batch_size)
    )
    found = cost(net, batches)
    if plot is not None:
        from spiking_mlp_jax.analysis.cost_plot import cost_figure
        from spiking_mlp_jax.analysis.plots import write

        write(cost_figure(found), plot)
    if chosen.json:
        print(json.dumps({"weights": str(where), **found.to_dict()}, indent=1))
        return
    print(found)
    if plot is not None:
        print(f"\n{plot}")


def _export_c(chosen: argparse.Namespace) -> None:
    if not is_compiled(chosen.network):
        raise InputError(f"export-c needs {NETWORK}, got {chosen.network}: run spiking-mlp compile first")
    from spiking_mlp_jax.deploy import artifact
    from spiking_mlp_jax.deploy.c import export_c

    path = user_path(chosen.network)
    output = check_export(chosen.output or path.with_suffix(".c"), path)
    memory = export_c(artifact.load(path), output)
    print(f"{output}: {memory.constants:,} bytes of constants, {memory.ram:,} bytes of RAM")
    sys.stdout.flush()
    print(f"try it: cc -std=c99 -O2 -DSMLP_MAIN {output} -o {output.stem}", file=sys.stderr)


def _pixels(chosen: argparse.Namespace) -> None:
    for name in chosen.images:
        if not os.path.exists(user_path(name)):
            raise InputError(f"there is no image {name}: give the path of an image file")
    output = check_export(chosen.output, chosen.network)
    for name in chosen.images:
        if output.exists() and output.samefile(user_path(name)):
            raise InputError(f"{output} is one of the images and would be overwritten: name another file with -o")
    from spiking_mlp_jax.data.image import read_image
    from spiking_mlp_jax.data.transforms import fitted
    from spiking_mlp_jax.deploy.predict import config_of, open_network, pixels_of
    from spiking_mlp_jax.utils.files import write_together

    network = open_network(chosen.network)
    inputs = fitted((read_image(user_path(name)) for name in chosen.images), config_of(network), pixels_of(network))
    write_together({output: [inputs.tobytes()]})
    sizes = " x ".join(map(str, inputs.shape))
    print(f"{output}: {inputs.nbytes:,} bytes, {sizes} (image, row, column, channel)")
