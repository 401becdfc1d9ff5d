"""Agreement of the spikes of two forms of a network: trained, folded, integer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, UInt8
from matplotlib.figure import Figure

from spiking_mlp_jax.analysis.activity.stream import SPIKES
from spiking_mlp_jax.analysis.plots import BLUE, GREY, beside, name_rows
from spiking_mlp_jax.deploy.network import IntegerNet
from spiking_mlp_jax.deploy.reads import Network
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.pixels import Pixels, normalize
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.models.topology import Geometry, neuron_counts


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of a layer's spikes in two networks.

    Attributes:
        equal: share of neurons, steps and images where both fire or both are silent.
        chance: the same for independent spikes at their rates p and q: p q + (1 - p) (1 - q).
    """

    equal: float
    chance: float


def layer_spikes(net: Network, images: UInt8[np.ndarray, "B H W C"]) -> dict[str, Bool[np.ndarray, "B T N"]]:
    """The spikes of a network's layers, by the names of the trained network.

    Args:
        net: a trained network, run in evaluation mode and not changed; from `fold`; or from `quantize`.
        images: raw pixels.

    Returns:
        by layer in the network's order, whether each of its N neurons fires. Without the nodes of spiking patch
        encoding and the output of a stage, which deployed networks only show as windows or sums.

    Raises:
        InputError: images of another shape or type.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise InputError(f"images must be raw pixels of dtype uint8, but they are {images.dtype}")
    if isinstance(net, SpikingMLP):
        c, found = net.config, _of_model(net, images)
    else:
        c: Any = net.description if isinstance(net, IntegerNet) else net.config
        inputs = images if isinstance(net, IntegerNet) else normalize(images, net.mean, net.std)
        found = jax.jit(lambda x: _of_reads(net, c, x))(jnp.asarray(inputs))
    # jit sorts by name.
    order = [name for name in neuron_counts(c) if name in found]
    return {name: np.asarray(found[name]).reshape(len(images), c.time_steps, -1) for name in order}


def agreement(
    a: Mapping[str, Bool[np.ndarray, "B T N"]], b: Mapping[str, Bool[np.ndarray, "B T N"]]
) -> dict[str, Agreement]:
    """Compares the spikes of two networks, layer by layer.

    Args:
        a: from `layer_spikes`.
        b: likewise, of the same images.

    Raises:
        InputError: the networks have different layers, or the images differ in number.
    """
    if {name: x.shape for name, x in a.items()} != {name: x.shape for name, x in b.items()}:
        raise InputError("the spikes are not of the same layers and images: compare two forms of one network")
    found = {}
    for name in a:
        p, q = a[name].mean(), b[name].mean()
        found[name] = Agreement(float(np.mean(a[name] == b[name])), float(p * q + (1 - p) * (1 - q)))
    return found


def agreement_figure(layers: Mapping[str, Agreement]) -> Figure:
    """Share of equal spikes of each layer, next to that of chance.

    Args:
        layers: from `agreement`.

    Raises:
        InputError: there are no layers.
    """
    if not layers:
        raise InputError("there are no layers to draw: compare networks that have some")
    figure = Figure(figsize=(7.2, 1.3 + 0.26 * len(layers)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(layers))
    equal = 100 * np.array([x.equal for x in layers.values()])
    chance = 100 * np.array([x.chance for x in layers.values()])
    axes.barh(rows, equal, height=0.7, color=BLUE, label="equal")
    axes.barh(rows, chance, height=0.34, color="#cccccc", label="expected for independent spikes")
    for row, value in enumerate(equal):
        beside(axes, f"{value:.2f}", value, row, 8)
    name_rows(axes, list(layers), 8)
    axes.set_xlim(50, 106)
    axes.set_xticks(range(50, 101, 10))
    axes.set(xlabel="neurons, steps and images with the same spike or silence (%)")
    axes.axvline(100, color=GREY, linewidth=0.8)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure


def _of_model(model: SpikingMLP, images: np.ndarray) -> dict[str, Any]:
    graphdef, variables = nnx.split(model)
    c = model.config
    pixels = model.pixels or Pixels((0.0,) * c.in_channels, (1.0,) * c.in_channels)
    last = {f"stage{i}.block{depth - 1}.channel{SPIKES}" for i, depth in enumerate(c.depths)}

    @jax.jit
    def run(variables, images):
        model = nnx.merge(graphdef, variables, copy=True)
        model.eval()
        return model(images, observe=lambda name, x: x.astype(bool) if name.endswith(SPIKES) else None)[1]

    found = run(variables, normalize(images, pixels.mean, pixels.std))
    return {name: x for name, x in found.items() if name not in last and ".encode.node" not in name}


def _of_reads(net: Any, c: Geometry, images) -> dict[str, Any]:
    """Spikes [B, T, H, W, C], or with the tokens in one axis, from the inputs of the linear layers."""
    found: dict[str, Any] = {}

    def observe(name, x):
        layer, _, part = name.rpartition(".")
        if part == "height":
            # Its input has the axis that it mixes last.
            stage, _, block = layer.partition(".block")
            before = f"{stage}.block{int(block) - 1}.channel" if int(block) else f"{stage}.encode"
            found[f"{before}{SPIKES}"] = jnp.moveaxis(x, -1, 2) != 0
        elif part == "fuse":
            parts = zip(("identity", "height", "width"), jnp.split(x, 3, -1), strict=True)
            own = {f"{layer}.token.{which}{SPIKES}": y != 0 for which, y in parts}
            if c.encoding == "spe":
                # Its identity is the block's input.
                del own[f"{layer}.token.identity{SPIKES}"]
            found.update(own)
        elif part == "expand":
            found[f"{layer}.token{SPIKES}"] = x != 0
        elif part == "project":
            found[f"{layer}.channel.hidden{SPIKES}"] = x != 0

    net(images, observe)
    return found
