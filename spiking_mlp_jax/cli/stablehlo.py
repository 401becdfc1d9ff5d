"""The command `spiking-mlp export-stablehlo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from spiking_mlp_jax.cli.deploy import WHERE, check_export, refuse_compiled


def add_commands(commands, command, positive) -> None:
    """Adds the commands' parsers; the arguments are those of `cli_deploy.add_commands`."""
    parser = command(
        commands,
        "export-stablehlo",
        "write a trained network as one file that JAX alone can run",
        "Writes a network with its weights as StableHLO in a zip file, for any number of images. It runs with JAX and "
        "without this package, on every platform that it was exported for; README.txt in the file says how. It takes "
        "images and gives logits averaged over the time steps.",
        "spiking-mlp export-stablehlo fashion_mnist -o fashion.stablehlo.zip\n"
        "  spiking-mlp export-stablehlo runs/demo -o demo.stablehlo.zip --folded --pixels --platforms cpu,cuda",
    )
    parser.add_argument("weights", metavar="WORKDIR_OR_WEIGHTS", help=WHERE)
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="file to write, such as net.stablehlo.zip"
    )
    parser.add_argument("--folded", action="store_true", help="the network whose norms are folded away")
    parser.add_argument(
        "--pixels", action="store_true", help="take uint8 pixels and normalise them (default: normalised float32)"
    )
    parser.add_argument(
        "--platforms", default="cpu,cuda,tpu", metavar="NAMES", help="where it can run (default: cpu,cuda,tpu)"
    )
    parser.set_defaults(run=_export)


def _export(chosen: argparse.Namespace) -> None:
    output = Path(chosen.output)
    check_export(output)
    refuse_compiled(
        chosen.weights,
        "and StableHLO is made of trained weights: give those, or take export-onnx or export-c, which take compiled "
        "networks",
    )
    from spiking_mlp_jax.interop.stablehlo import check_platforms, export_stablehlo
    from spiking_mlp_jax.models import weights

    platforms = check_platforms([name.strip() for name in chosen.platforms.split(",")])
    folder = weights.find(chosen.weights)
    model, meta = weights.load(folder)
    document = export_stablehlo(
        model, output, data=meta.get("data"), folded=chosen.folded, pixels=chosen.pixels, platforms=platforms
    )
    takes, gives = document["input"], document["output"]
    print(f"{output}: {output.stat().st_size:,} bytes, for {', '.join(platforms)}")
    print(f"images {takes['dtype']} [{_shape(takes)}], {takes['meaning']}")
    print(f"logits {gives['dtype']} [{_shape(gives)}], averaged over {model.config.time_steps} time steps")


def _shape(described) -> str:
    return ", ".join(map(str, described["shape"]))
