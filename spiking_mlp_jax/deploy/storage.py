"""What each layer of a network stores, in each of its forms: weights, and bytes of everything."""

from __future__ import annotations

import re

import numpy as np
from flax import nnx

from spiking_mlp_jax.deploy.fold import FoldedNet
from spiking_mlp_jax.deploy.network import IntegerNet
from spiking_mlp_jax.deploy.reads import Network, maps
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP


def kernels(net: Network) -> dict[str, np.ndarray]:
    """Weights [S, fan_in, out] of each layer."""
    if isinstance(net, FoldedNet):
        return {name: np.asarray(x["kernel"]) for name, x in net.arrays.items() if "kernel" in x}
    if isinstance(net, IntegerNet):
        return {name.removesuffix(".kernel"): x for name, x in net.arrays.items() if name.endswith(".kernel")}
    found: dict[str, np.ndarray] = {}
    for name, path, x in _variables(net):
        if not path.endswith(".kernel"):
            continue
        # Mixing multiplies from the left: its kernel is [out, fan_in].
        matrix = x.T if name.endswith((".height", ".width")) else x.reshape(-1, x.shape[-1])
        # The three nodes read the same input.
        found[name] = np.concatenate([found[name], matrix[None]], -1) if name in found else matrix[None]
    return found


def footprints(net: Network) -> dict[str, int]:
    """Bytes of each layer's arrays."""
    found: dict[str, int] = {}

    def add(name, x):
        found[name] = found.get(name, 0) + x.nbytes

    if isinstance(net, SpikingMLP):
        for name, _, x in _variables(net):
            add(name, x)
    elif isinstance(net, IntegerNet):
        for name, x in net.arrays.items():
            add(name.rsplit(".", 1)[0], x)
    else:
        # A layer of neurons is named shorter here than among the spikes.
        layers = {
            re.sub(r"\.(token|channel)\.", ".", m.spikes.removesuffix(".spikes")) + ".neurons": m.name
            for m in maps(net.config)
            if m.spikes
        }
        for name, entries in net.arrays.items():
            for x in entries.values():
                add(layers.get(name, name), np.asarray(x))
    return found


# Where a trained network keeps what belongs to a layer, its norm and its neurons; "*" is a stage's encoding or block.
_PARTS = (
    (r"encode\.(conv|norm)\..*", ""),
    (r"encode\.(cells|cell_norms)\..*", ".cells"),
    (r"encode\.neurons\.0\..*", ".cells"),
    (r"encode\.neurons\.1\..*", ".edge1"),
    (r"encode\.(edges|edge_norms)\.0\..*", ".edge1"),
    (r"encode\.(edges|edge_norms)\.1\..*", ".edge2"),
    (r"blocks\.token\.identity_.*", ".identity"),
    (r"blocks\.token\.height\..*", ".height"),
    (r"blocks\.token\.width\..*", ".width"),
    (r"blocks\.(token\.(fuse|norm)|token_neuron)\..*", ".fuse"),
    (r"blocks\.channel\.(expand|hidden_norm|neuron)\..*", ".expand"),
    (r"blocks\.(channel\.(project|norm)|channel_neuron)\..*", ".project"),
)


def _variables(model: SpikingMLP):
    """(layer, dotted path, array) of every parameter and running statistic; those of blocks one by one."""
    spe = model.config.encoding == "spe"
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))):
        full, x = ".".join(map(str, path)), np.asarray(variable[...])
        if not full.startswith("stages."):
            yield "head", full, x
            continue
        _, i, rest = full.split(".", 2)
        if rest.startswith("neuron."):
            yield f"stage{i}.encode" + ".edge2" * (spe and i != "0"), full, x
            continue
        part = next(name for pattern, name in _PARTS if re.fullmatch(pattern, rest))
        if rest.startswith("encode."):
            yield f"stage{i}.encode{part}", full, x
        else:
            for j, each in enumerate(x):
                yield f"stage{i}.block{j}{part}", full, each
