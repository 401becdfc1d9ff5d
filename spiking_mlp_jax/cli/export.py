"""The commands `export-stablehlo`, `export-onnx` and `export-nir`."""

from __future__ import annotations

import argparse

from spiking_mlp_jax.cli.options import (
    NETWORK,
    WHERE,
    add_command,
    add_output,
    add_value,
    check_export,
    is_compiled,
    refuse_compiled,
)
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop.nir.graph import DT, MAX_MEGABYTES
from spiking_mlp_jax.utils.paths import user_path


def add_commands(commands) -> None:
    """Add the parsers to the subparsers of `spiking-mlp`."""
    parser = add_command(
        commands,
        "export-stablehlo",
        "write a trained network as a StableHLO file, which runs with JAX alone",
        "Writes a network with its weights as StableHLO in a zip file, for any batch size. JAX alone runs it, on every "
        "platform it was exported for; README.txt in the file shows how. It maps images to logits averaged over the "
        "time steps.",
        "spiking-mlp export-stablehlo fashion_mnist -o fashion.stablehlo.zip\n"
        "  spiking-mlp export-stablehlo runs/demo -o demo.stablehlo.zip --folded --pixels --platforms cpu,cuda",
        run=_export_stablehlo,
    )
    parser.add_argument("weights", metavar="WORKDIR_OR_WEIGHTS", help=WHERE)
    add_output(parser, "file to write, e.g. net.stablehlo.zip", required=True)
    parser.add_argument("--folded", action="store_true", help="export the network with its norms folded away")
    parser.add_argument(
        "--pixels", action="store_true", help="take uint8 pixels and normalize them (default: normalized float32)"
    )
    add_value(parser, "--platforms", "cpu,cuda,tpu", "platforms to run on", str, "NAMES")

    parser = add_command(
        commands,
        "export-onnx",
        "write a network as an ONNX file",
        "Writes a network for other runtimes, for any batch size. Trained weights become a floating-point model "
        "without norms, a compiled network a model of integer operators that gives the engine's integers.",
        "spiking-mlp export-onnx fashion_mnist -o fashion.onnx --pixels\n"
        "  spiking-mlp export-onnx fashion.smlp -o fashion_int8.onnx",
        "Preprocessing and class names are stored in the file as JSON.",
        run=_export_onnx,
    )
    parser.add_argument("network", metavar="NETWORK", help=f"{WHERE}; or {NETWORK}")
    add_output(parser, "file to write (default: NETWORK with the ending .onnx)")
    parser.add_argument(
        "--pixels",
        action="store_true",
        help="with weights: take uint8 pixels and normalize them (compiled networks always do)",
    )

    parser = add_command(
        commands,
        "export-nir",
        "write a network as a NIR graph, for simulators and neuromorphic hardware",
        "Folds the norms of a trained network away and writes the rest as a graph of the Neuromorphic Intermediate "
        "Representation: Conv2d and Affine maps between LIF neurons, in one HDF5 file that `nir.read` reads.",
        "spiking-mlp export-nir fashion_mnist -o fashion.nir\n"
        "  spiking-mlp export-nir fashion_mnist -o fashion.nir --dense",
        "A time step of the network is DT seconds in the graph, and a tau of 2 steps is 2 DT: simulate with the same "
        "DT. The graph's input is the normalized image, at every step; the logits are the mean of its output. Needs "
        "the nir package: pip install 'spiking-mlp-jax[export]'.",
        run=_export_nir,
    )
    parser.add_argument("network", metavar="NETWORK", help=WHERE)
    add_output(parser, "file to write, e.g. net.nir", required=True)
    parser.add_argument(
        "--dense",
        action="store_true",
        help="vectors and Affine maps only, which snnTorch and SpikingJelly read (default: Conv2d over stacked rows)",
    )
    add_value(parser, "--dt", DT, "of a time step", float, "SECONDS")
    add_value(parser, "--max-dense", MAX_MEGABYTES, "refuse a graph whose parameters take more megabytes", float, "MB")


def _export_stablehlo(chosen: argparse.Namespace) -> None:
    output = check_export(chosen.output)
    refuse_compiled(
        chosen.weights, "but StableHLO needs trained weights; use export-onnx or export-c for compiled networks"
    )
    from spiking_mlp_jax.interop.stablehlo import check_platforms, export_stablehlo
    from spiking_mlp_jax.models import weights

    platforms = check_platforms([name.strip() for name in chosen.platforms.split(",")])
    model, meta = weights.load(weights.find(chosen.weights))
    document = export_stablehlo(
        model, output, data=meta.get("data"), folded=chosen.folded, pixels=chosen.pixels, platforms=platforms
    )
    takes, gives = document["input"], document["output"]
    print(f"{output}: {output.stat().st_size:,} bytes, for {', '.join(platforms)}")
    print(f"images {takes['dtype']} {_shape(takes)}, {takes['meaning']}")
    print(f"logits {gives['dtype']} {_shape(gives)}, averaged over {model.config.time_steps} time steps")


def _shape(described) -> str:
    return f"[{', '.join(map(str, described['shape']))}]"


def _export_onnx(chosen: argparse.Namespace) -> None:
    where = user_path(chosen.network)
    output = user_path(chosen.output) if chosen.output else where.parent / f"{where.name.removesuffix('.smlp')}.onnx"
    check_export(output, where)
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
                f"--pixels needs the mean and std of the training images, which {chosen.network} lacks: drop it and "
                "normalize images as in training"
            )
        c, kind = trained.config, "uint8 pixels" if chosen.pixels else "normalized float32 pixels"
        model = float_model(fold(trained), pixels=chosen.pixels, data=meta.get("data"))
    size = onnx_graph.save(model, output)
    opset = f"opset {onnx_graph.OPSET}, IR version {onnx_graph.IR_VERSION}"
    print(f"{output}: {size:,} bytes, {len(model.graph.node):,} nodes, {opset}")
    print(f"images: {kind} [batch, {c.image_size}, {c.image_size}, {c.in_channels}]; logits: [batch, {c.num_classes}]")


def _export_nir(chosen: argparse.Namespace) -> None:
    output = check_export(chosen.output)
    refuse_compiled(chosen.network, "whose integer neurons NIR lacks: export the weights it was compiled from")
    from spiking_mlp_jax.deploy.fold import fold
    from spiking_mlp_jax.interop.nir.export import to_nir, write_nir
    from spiking_mlp_jax.interop.nir.graph import require_nir
    from spiking_mlp_jax.models import weights

    require_nir()
    model, _ = weights.load(weights.find(chosen.network))
    form = "dense" if chosen.dense else "rows"
    graph = to_nir(fold(model), form=form, dt=chosen.dt, max_dense=chosen.max_dense)
    size = write_nir(graph, output)
    kinds = [type(node).__name__ for node in graph.nodes.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    shape = " x ".join(str(int(n)) for n in next(iter(graph.inputs.values())).input_type["input"])
    c = model.config
    print(f"{output}: {counts} nodes, {len(graph.edges)} edges, {size:,} bytes")
    print(f"input {shape}: the normalized image [{c.in_channels}, {c.image_size}, {c.image_size}], reshaped")
    print(f"simulate {c.time_steps} steps of {chosen.dt:g} s; the logits are the mean of the output")
