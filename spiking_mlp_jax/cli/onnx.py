"""The command `spiking-mlp export-onnx`."""

from __future__ import annotations

import argparse
from pathlib import Path

from spiking_mlp_jax.cli.deploy import NETWORK, WHERE, check_export, is_compiled
from spiking_mlp_jax.errors import InputError


def add_commands(commands, command, positive) -> None:
    """Adds the commands' parsers; the arguments are those of `cli_deploy.add_commands`."""
    parser = command(
        commands,
        "export-onnx",
        "write a network as an ONNX file",
        "Writes a network for other runtimes, for any number of images. Trained weights become a floating-point model "
        "without norms, a compiled network one of integer operators with the integers that the engine computes.",
        "spiking-mlp export-onnx fashion_mnist -o fashion.onnx --pixels\n"
        "  spiking-mlp export-onnx fashion.smlp -o fashion_int8.onnx",
        "How pictures become inputs and the names of the classes are stored in the file as JSON.",
    )
    parser.add_argument("network", metavar="NETWORK", help=f"{WHERE}; or {NETWORK}")
    parser.add_argument("-o", "--output", metavar="FILE", help="file to write (default: NETWORK with the ending .onnx)")
    parser.add_argument(
        "--pixels",
        action="store_true",
        help="with weights: take raw pixels, uint8, and normalise them inside (compiled networks always take these)",
    )
    parser.set_defaults(run=_export)


def _export(chosen: argparse.Namespace) -> None:
    where = Path(chosen.network)
    output = Path(chosen.output) if chosen.output else where.parent / f"{where.name.removesuffix('.smlp')}.onnx"
    check_export(output)
    if output.exists() and where.exists() and output.samefile(where):
        raise InputError(f"{output} is the network itself, which the ONNX file would replace: give another -o")
    from spiking_mlp_jax.interop.onnx import graph as onnx_graph

    onnx_graph.package()
    if is_compiled(chosen.network):
        from spiking_mlp_jax.deploy import artifact
        from spiking_mlp_jax.interop.onnx.integer import integer_model

        net = artifact.load(chosen.network)
        c, model, kind = net.description, integer_model(net), "uint8 pixels"
    else:
        from spiking_mlp_jax.deploy.fold import fold
        from spiking_mlp_jax.interop.onnx.floating import float_model
        from spiking_mlp_jax.models import weights

        trained, meta = weights.load(weights.find(chosen.network))
        if chosen.pixels and "data" not in meta:
            raise InputError(
                f"{chosen.network} does not say how pixels are normalised: leave --pixels out, and normalise them as "
                "in training"
            )
        c, kind = trained.config, "uint8 pixels" if chosen.pixels else "normalised float32 pixels"
        model = float_model(fold(trained), pixels=chosen.pixels, data=meta.get("data"))
    size = onnx_graph.save(model, output)
    print(
        f"{output}: {size:,} bytes, {len(model.graph.node):,} nodes, opset {onnx_graph.OPSET}, IR version "
        f"{onnx_graph.IR_VERSION}"
    )
    print(f"images: {kind} [batch, {c.image_size}, {c.image_size}, {c.in_channels}]; logits: [batch, {c.num_classes}]")
