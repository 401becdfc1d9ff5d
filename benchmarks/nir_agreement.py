"""Spikes and classes of an exported NIR graph, here and in other simulators, against the folded network's.

    python -m benchmarks.nir_agreement fashion_mnist
    python -m benchmarks.nir_agreement cifar10 --data-dir FOLDER              # an image folder with a split "test"
    python -m benchmarks.nir_agreement fashion_mnist --tool snntorch --tool spikingjelly

Without --tool: this package's reader, with >= and with NIR's strict >. Other tools get the dense form and need PyTorch,
nirtorch and the tool itself. "other" counts neurons and steps whose spike differs from the folded network's, "of
spikes" relates them to the folded network's spikes; the next column counts differences from the first row.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import fail, head, line, make_parser
from spiking_mlp_jax.cli.options import WHERE, add_data_dir, positive
from spiking_mlp_jax.data.sources import open_source, spread
from spiking_mlp_jax.data.transforms import fitted
from spiking_mlp_jax.deploy.fold import FoldedNet, fold
from spiking_mlp_jax.deploy.forward import Folded
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop.nir.export import to_nir
from spiking_mlp_jax.interop.nir.network import from_nir
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.pixels import Pixels, normalize

TOOLS = ("snntorch", "spikingjelly")
# Mean logits [B, K] and each layer's spikes [B, T, ...] of inputs [B, *shape].
Simulator = Callable[[np.ndarray], tuple[np.ndarray, dict[str, np.ndarray]]]


class _Recorder(Folded):
    """Record every layer's spikes [B, T, C * tokens] under its node's name."""

    def __init__(self, net: FoldedNet):
        super().__init__(net.arrays, net.config)
        self.seen: dict[str, Any] = {}

    def fire(self, neurons, potential):
        spikes = super().fire(neurons, potential)
        first = jnp.moveaxis(spikes, -1, 2)
        self.seen[neurons.short.replace(".", "_")] = first.reshape(*first.shape[:2], -1)
        return spikes


def folded_spikes(net: FoldedNet, images) -> dict[str, Any]:
    """Each layer's spikes [B, T, neurons] of normalized images [B, H, W, C], in the order of the graph's arrays."""
    run = _Recorder(net)
    run.logits(images)
    return run.seen


def channels_first(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Images [B, H, W, C] as inputs of a graph, [B, *shape]."""
    return np.array(np.moveaxis(np.asarray(images), 3, 1), order="C").reshape(-1, *shape)


def ours(graph, strict: bool) -> Simulator:
    """This package's reader."""
    net = from_nir(graph, strict=strict)

    def simulate(x):
        logits, spikes = net.run(x)
        return np.asarray(logits).mean(0), {name: np.asarray(values) for name, values in spikes.items()}

    return simulate


def in_torch(graph, tool: str, time_steps: int, dt: float) -> Simulator:
    """snnTorch or SpikingJelly, which build PyTorch modules with nirtorch; hooks read the spikes."""
    import torch  # pyright: ignore[reportMissingImports]

    with contextlib.redirect_stdout(io.StringIO()):
        if tool == "snntorch":
            from snntorch.import_nir import import_from_nir  # pyright: ignore[reportMissingImports]

            module = import_from_nir(graph)
        else:
            from spikingjelly.activation_based.nir_exchange.from_nir import import_from_nir  # pyright: ignore[reportMissingImports]

            module = import_from_nir(graph, dt=dt)
    seen: dict[str, list[np.ndarray]] = {}
    kinds = {name: type(node).__name__ for name, node in graph.nodes.items()}
    for name in [name for name, kind in kinds.items() if kind in ("LIF", "IF")]:

        def keep(module, args, output, name=name):
            spikes = output[0] if isinstance(output, tuple) else output
            seen.setdefault(name, []).append(spikes.numpy() > 0)

        module.get_submodule(name).register_forward_hook(keep)

    def simulate(x):
        seen.clear()
        for one in module.modules():
            if hasattr(one, "reset_mem"):
                one.reset_mem()
        state, outputs = None, []
        with torch.no_grad():
            for _ in range(time_steps):
                output, state = module(torch.from_numpy(x), state)
                outputs.append(output.numpy())
        return np.mean(outputs, 0), {name: np.stack(values, 1) for name, values in seen.items()}

    return simulate


def compare(net: FoldedNet, simulators: dict[str, Simulator], batches, shapes) -> dict[str, dict[str, int]]:
    """Counts of each simulator, over batches of normalized images and their labels."""
    reference = jax.jit(lambda x: (folded_spikes(net, x), net(x)))
    counted: tuple[str, ...] = ("neurons", "spikes", "other", "first", "images", "classes", "correct")
    counts: dict[str, dict[str, int]] = {name: dict.fromkeys(counted, 0) for name in simulators}
    for images, labels in batches:
        expected, logits = jax.tree.map(np.asarray, reference(jnp.asarray(images)))
        classes = logits.mean(0).argmax(1)
        first: dict[str, np.ndarray] = {}
        for name, simulate in simulators.items():
            scores, spikes = simulate(channels_first(images, shapes[name]))
            if spikes.keys() != expected.keys():
                raise InputError(f"the layers of neurons of {name} are not those of the folded network")
            found = counts[name]
            for layer, values in expected.items():
                found["neurons"] += values.size
                found["spikes"] += int((values > 0).sum())
                fired = spikes[layer].reshape(values.shape) > 0
                found["other"] += int(((values > 0) != fired).sum())
                found["first"] += int((first.setdefault(layer, fired) != fired).sum())
            found["images"] += len(images)
            found["classes"] += int((scores.argmax(1) != classes).sum())
            found["correct"] += int((scores.argmax(1) == labels).sum())
    return counts


def image_batches(where: str, data_dir: str | None, limit: int, size: int):
    """Batches of normalized test images [B, H, W, C] and labels of the network's dataset."""
    model, meta = weights.load(weights.find(where))
    data = meta["data"]
    source = open_source(data["dataset"], "test", data_dir)
    source = spread(source, limit)
    for start in range(0, len(source), size):
        items = [source[i] for i in range(start, min(start + size, len(source)))]
        images = fitted((x["image"] for x in items), model.config, Pixels.from_data(data))
        yield normalize(images, data["mean"], data["std"]), np.array([x["label"] for x in items])


def main() -> int:
    parser = make_parser(__doc__, "nir_agreement")
    parser.add_argument("network", help=WHERE)
    add_data_dir(parser)
    parser.add_argument("--limit", type=positive, default=1000, metavar="N", help="test images (default: 1000)")
    parser.add_argument("--batch-size", type=positive, default=50, metavar="N")
    parser.add_argument("--tool", action="append", choices=TOOLS, default=[])
    args = parser.parse_args()
    try:
        net = fold(weights.load(weights.find(args.network))[0])
        simulators: dict[str, Simulator] = {}
        if args.tool:
            graph = to_nir(net, form="dense")
            for tool in args.tool:
                simulators[tool] = in_torch(graph, tool, net.config.time_steps, graph.metadata["dt"])
        else:
            graph = to_nir(net)
            simulators = {"here, >=": ours(graph, False), "here, >": ours(graph, True)}
        shape = tuple(int(n) for n in graph.nodes["input"].input_type["input"])
        batches = image_batches(args.network, args.data_dir, args.limit, args.batch_size)
        counts = compare(net, simulators, batches, dict.fromkeys(simulators, shape))
    except InputError as error:
        return fail(error)
    print(head([args.network, "other", "of spikes", "other than the first row", "classes that differ", "accuracy"]))
    for name, n in counts.items():
        cells = [name, f"{n['other']:,} of {n['neurons']:,}", f"{100 * n['other'] / n['spikes']:.4f} %"]
        cells += [f"{n['first']:,}", f"{n['classes']} of {n['images']:,}", f"{100 * n['correct'] / n['images']:.2f} %"]
        print(line(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
