"""The command `spiking-mlp export-nir`."""

from __future__ import annotations

import argparse
from pathlib import Path

from spiking_mlp_jax.cli.deploy import WHERE, check_export, refuse_compiled
from spiking_mlp_jax.interop.nir.graph import DT, MAX_MEGABYTES


def add_commands(commands, command, positive) -> None:
    """Adds the commands' parsers; the arguments are those of `cli_deploy.add_commands`."""
    parser = command(
        commands,
        "export-nir",
        "write a network as a NIR graph, for simulators and neuromorphic hardware",
        "Folds the norms of a trained network away and writes the rest as a graph of the Neuromorphic Intermediate "
        "Representation: Conv2d and Affine maps between LIF neurons, in one HDF5 file that `nir.read` reads.",
        "spiking-mlp export-nir fashion_mnist -o fashion.nir\n"
        "  spiking-mlp export-nir fashion_mnist -o fashion.nir --dense",
        "A time step of the network stands for DT seconds, and a tau of 2 steps for 2 DT: simulate with the same DT. "
        "The graph takes the image, normalised, at every step; the logits are the mean of what it puts out. Needs the "
        "nir package: pip install 'spiking-mlp-jax[export]'.",
    )
    parser.add_argument("network", metavar="NETWORK", help=WHERE)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write, such as net.nir")
    parser.add_argument(
        "--dense",
        action="store_true",
        help="vectors and Affine maps alone, which snnTorch and SpikingJelly read (default: Conv2d over stacked rows)",
    )
    parser.add_argument("--dt", type=float, default=DT, metavar="SECONDS", help=f"of a time step (default: {DT:g})")
    parser.add_argument(
        "--max-dense",
        type=float,
        default=MAX_MEGABYTES,
        metavar="MB",
        help=f"refuse a graph whose parameters take more megabytes (default: {MAX_MEGABYTES:g})",
    )
    parser.set_defaults(run=_export)


def _export(chosen: argparse.Namespace) -> None:
    output = Path(chosen.output)
    check_export(output)
    refuse_compiled(chosen.network, "whose neurons are integers: export the weights it was made of")
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
    print(f"input {shape}: the normalised image [{c.in_channels}, {c.image_size}, {c.image_size}], reshaped")
    print(f"simulate {c.time_steps} steps of {chosen.dt:g} s; the logits are the mean of the output")
