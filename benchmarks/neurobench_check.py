"""Operations counted by `deploy.cost` against the `neurobench` package, on the same network in PyTorch.

    python -m benchmarks.neurobench_check [--weights fashion_mnist] [--images 100] [--json FILE]

The peer is the SpikingJelly twin in float64, with the same weights and images. NeuroBench hooks the inputs of torch's
Linear and Conv2d, which all layers of the twin are. Counts agree except where `EXPECTED` says so; any other difference
ends with status 1.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from neurobench.metrics.static import ConnectionSparsity, Footprint
from neurobench.metrics.utils.layers import single_layer_MACs
from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
from neurobench.models import TorchModel
from spikingjelly.activation_based import neuron

from benchmarks.spikingjelly_twin import Twin
from spiking_mlp_jax.deploy.cost import Cost, cost
from spiking_mlp_jax.interop import official
from spiking_mlp_jax.models.pixels import Pixels, normalize
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP

EXPECTED = {
    "stage0.encode": "the twin repeats the image and convolves it at each of T steps; here the stem runs once",
    "Footprint": "torch counts batches in 8 bytes for each norm, here it is 4; both sides are in float64",
}


def layer_names(config) -> list[str]:
    """This package's name for each Linear and Conv2d of the twin, in module order."""
    names = []
    for i in range(config.stages):
        name = f"stage{i}.encode"
        spe = i > 0 and config.encoding == "spe"
        names += [f"{name}.cells"] * 3 + [f"{name}.edge1", f"{name}.edge2"] if spe else [name]
    blocks = [f"stage{i}.block{j}" for i in range(config.stages) for j in range(config.depths[i])]
    names += [f"{block}.{part}" for block in blocks for part in ("height", "width", "fuse")]
    names += [f"{block}.{part}" for block in blocks for part in ("expand", "project")]
    return [*names, "head"]


def neurobench_counts(model: SpikingMLP, images: np.ndarray, batch: int = 10) -> dict[str, Any]:
    """NeuroBench's metrics of the twin.

    Args:
        model: the network.
        images: normalized, floating [N, H, W, C].
        batch: images at a time; NeuroBench decides between MACs and ACs for each batch.

    Returns:
        its metrics by name, and "layers": {"Effective_MACs", "Effective_ACs", "Dense"} by this package's names.
    """
    twin = Twin(model.config).double().eval()
    twin.load_official(official.state_dict(model))
    wrapped = TorchModel(twin)
    # NeuroBench knows snnTorch's neurons, ReLU and Sigmoid; SpikingJelly's are registered.
    wrapped.add_activation_module(neuron.LIFNode)
    wrapped.register_hooks()
    names = layer_names(model.config)
    if len(wrapped.connection_hooks) != len(names):
        raise AssertionError(f"NeuroBench found {len(wrapped.connection_hooks)} layers, not {len(names)}")
    operations = SynapticOperations()
    layers = {name: dict.fromkeys(("Effective_MACs", "Effective_ACs", "Dense"), 0.0) for name in names}
    sparsity, found = [], {}
    with torch.no_grad():
        for start in range(0, len(images), batch):
            pixels = torch.from_numpy(images[start : start + batch].astype(np.float64)).permute(0, 3, 1, 2)
            wrapped.reset_hooks()
            logits = wrapped(pixels)
            data = (pixels, torch.zeros(len(pixels)))
            found = operations(wrapped, logits, data)
            sparsity.append(ActivationSparsity()(wrapped, logits, data) * len(pixels))
            for name, hook in zip(names, wrapped.connection_hooks, strict=True):
                hook.hook.remove()
                for (read,) in hook.inputs:
                    done, spiking = single_layer_MACs(read, hook.layer)
                    layers[name]["Effective_ACs" if spiking else "Effective_MACs"] += done / len(images)
                    layers[name]["Dense"] += single_layer_MACs(read, hook.layer, total=True)[0] / len(images)
                hook.register_hook()
    static = {"Footprint": Footprint()(wrapped), "ConnectionSparsity": ConnectionSparsity()(wrapped)}
    found = {"SynapticOperations": found, "ActivationSparsity": sum(sparsity) / len(images), **static}
    parameters = sum(p.numel() for p in twin.parameters()) + sum(
        b.numel() for b in twin.buffers() if b.is_floating_point()
    )
    counters = sum(not b.is_floating_point() for b in twin.buffers())
    wrapped.cleanup_hooks()
    return {**found, "layers": layers, "floats": parameters, "counters": counters}


def differences(ours: Cost, theirs: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Messages about differences: unexpected, and expected."""
    bad, known = [], []
    steps = ours.time_steps
    for name, layer in ours.layers.items():
        if name not in theirs["layers"]:
            continue
        times = steps if name == "stage0.encode" else 1
        for key, value in theirs["layers"][name].items():
            mine = getattr(layer, key)
            # Both are integers divided by the number of images.
            if not np.isclose(times * mine, value, rtol=1e-9, atol=1e-6):
                bad.append(f"{name} {key}: {mine:,.4f} here, {value:,.4f} by NeuroBench")
            elif times > 1 and value:
                known.append(f"{name} {key}: {mine:,.1f} here, {value:,.1f} by NeuroBench: {EXPECTED[name]}")
    stem = ours.layers["stage0.encode"]
    for key, value in theirs["SynapticOperations"].items():
        mine = getattr(ours.total, key) + (steps - 1) * getattr(stem, key)
        if not np.isclose(mine, value, rtol=1e-9, atol=1e-6):
            bad.append(f"total {key}: {mine:,.4f} here with the stem {steps} times, {value:,.4f} by NeuroBench")
    silent = ours.total.activation_sparsity
    if silent is None or abs(silent - theirs["ActivationSparsity"]) > 1e-12:
        bad.append(f"ActivationSparsity: {silent} here, {theirs['ActivationSparsity']} by NeuroBench")
    # NeuroBench rounds to four digits.
    if abs(ours.total.connection_sparsity - theirs["ConnectionSparsity"]) > 5e-5:
        bad.append(
            f"ConnectionSparsity: {ours.total.connection_sparsity}, {theirs['ConnectionSparsity']} by NeuroBench"
        )
    counters = theirs["counters"]
    footprint = 8 * (theirs["floats"] + counters)
    if theirs["Footprint"] != footprint or ours.total.footprint != footprint - 4 * counters:
        bad.append(f"Footprint: {ours.total.footprint:,} here, {theirs['Footprint']:,} by NeuroBench")
    else:
        known.append(
            f"Footprint: {ours.total.footprint:,} here, {theirs['Footprint']:,} by NeuroBench: {EXPECTED['Footprint']}"
        )
    return bad, known


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="Operations by deploy.cost against NeuroBench.")
    parser.add_argument("--weights", default="fashion_mnist", help="weights folder or shipped network")
    parser.add_argument("--images", type=int, default=100, help="test images (default: 100)")
    parser.add_argument("--json", metavar="FILE", help="also write all counts")
    chosen = parser.parse_args(arguments)

    from spiking_mlp_jax.data.sources import open_source
    from spiking_mlp_jax.data.transforms import fitted
    from spiking_mlp_jax.models import weights

    jax.config.update("jax_enable_x64", True)
    model, meta = weights.load(weights.find(chosen.weights))
    data, c = meta["data"], model.config
    source = open_source(data["dataset"], "test", None)
    raw = fitted((source[i]["image"] for i in range(chosen.images)), c, Pixels.from_data(data))
    pixels = model.pixels or Pixels((0.0,) * c.in_channels, (1.0,) * c.in_channels)
    images = normalize(raw, pixels.mean, pixels.std).astype(np.float64)
    theirs = neurobench_counts(model, images)
    stored = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))))
    ours = cost(model, [images[i : i + 50] for i in range(0, len(images), 50)])
    assert ours.total.footprint == stored
    bad, known = differences(ours, theirs)
    print(f"{'':16}{'here':>16}{'NeuroBench':>16}")
    for key, value in theirs["SynapticOperations"].items():
        print(f"{key:16}{getattr(ours.total, key):16,.2f}{value:16,.2f}")
    print(f"{'silent':16}{ours.total.activation_sparsity:16.6f}{theirs['ActivationSparsity']:16.6f}")
    for message in known:
        print("expected:", message)
    for message in bad:
        print("DIFFERENT:", message)
    if not bad:
        print(f"all else agrees, for each of {len(theirs['layers'])} layers, over {len(images)} images")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps({"here": ours.to_dict(), "neurobench": theirs}, indent=1) + "\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
