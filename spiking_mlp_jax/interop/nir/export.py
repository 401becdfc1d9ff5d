"""A folded network as a graph of the Neuromorphic Intermediate Representation (NIR).

Nodes of a folded network's layers, in the form "rows" (`forms.RowsForm`):

    stem, downsampling, fusing, channel mixing   Conv2d
    mixing along a row                           Affine, batched over channels and rows
    mixing along a column                        Conv2d whose channels are channels and rows, a dense matrix
    sums                                         several edges into one node
    neurons                                      LIF or IF, with arrays of the neurons' full shape
    norm per token before neurons                their r and v_leak
    norm per token before a sum                  a batched Affine with diagonal weights
    head                                         Flatten and Affine

The input is the image at every step; the logits are the mean output over the steps. Potentials start at
v_reset. NIR has continuous time: a step is dt seconds, tau is tau * dt seconds, and forward Euler with that dt gives
the network's equations.

Reference: Pedersen et al., "Neuromorphic intermediate representation: a unified instruction set for interoperable
brain-inspired computing", Nature Communications 15, 2024.
"""

from __future__ import annotations

import io
import math
import numbers
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop.nir.forms import FORMS
from spiking_mlp_jax.interop.nir.graph import DT, MAX_MEGABYTES, Form, Neurons, PerToken, Size, require_nir
from spiking_mlp_jax.models.topology import Layer, Walk
from spiking_mlp_jax.utils.files import write_whole

if TYPE_CHECKING:
    from spiking_mlp_jax.deploy.fold import FoldedNet

# Below it or above its reciprocal, float32 loses digits of tau * dt or of an IF neuron's 1 / dt.
MIN_DT = 1e-30


def to_nir(net: FoldedNet, *, form: str = "rows", dt: float = DT, max_dense: float = MAX_MEGABYTES) -> Any:
    """The graph of a folded network.

    Args:
        net: of LIF, PLIF or IF neurons with a hard reset, and weights that are the same at every step.
        form: "rows" or "dense", see `forms`.
        dt: seconds of a time step.
        max_dense: limit of the graph's parameters in megabytes.

    Returns:
        a `nir.NIRGraph`, checked by `nir`. Its input is the normalized image [C, H, W] reshaped, its output the
        logits of a step; a layer of neurons has the folded network's name with underscores ("stage0_block0_token").
        Its metadata has dt, time_steps, the form, mean and std.

    Raises:
        InputError: the nir package is missing, NIR cannot express the network, the graph would exceed `max_dense`, or
            dt is not a positive number.

    Examples:
        >>> from spiking_mlp_jax import SpikingMLP
        >>> from spiking_mlp_jax.deploy.fold import fold
        >>> graph = to_nir(fold(SpikingMLP.from_pretrained("fashion_mnist")))
        >>> graph.nodes["stage0_block0_token"].v_threshold.shape
        (384, 1, 8)
    """
    from spiking_mlp_jax.deploy.fold import FoldedNet

    require_nir()
    if form not in FORMS:
        raise InputError(f'form must be {" or ".join(FORMS)}, got "{form}"')
    if not isinstance(net, FoldedNet):
        raise InputError(f"expected a FoldedNet, as `fold` returns it, got {type(net).__name__}")
    if not (isinstance(dt, numbers.Real) and math.isfinite(dt) and dt > 0):
        raise InputError(f"dt must be a positive number of seconds, got {dt!r}")
    if not MIN_DT <= dt <= 1 / MIN_DT:
        raise InputError(f"dt must be from {MIN_DT:g} to {1 / MIN_DT:g} seconds, got {dt!r}")
    if not (isinstance(max_dense, int | float) and max_dense > 0):
        raise InputError(f"the limit must be a positive number of megabytes, got {max_dense!r}")
    _check(net)
    c = net.config
    made = FORMS[form](float(dt), np.dtype(net.arrays["head"]["kernel"].dtype))
    _Export(net, made).network()
    metadata = {
        "dt": float(dt),
        "time_steps": c.time_steps,
        "form": form,
        "image": np.array([c.in_channels, c.image_size, c.image_size]),
        "mean": np.array(net.mean, np.float64),
        "std": np.array(net.std, np.float64),
    }
    return made.graph(max_dense, metadata)


def write_nir(graph: Any, path: str | os.PathLike[str]) -> int:
    """Write a graph atomically as an HDF5 file for `nir.read`; returns its size in bytes.

    Raises:
        InputError: the nir package is missing, or the file cannot be written.
    """
    nir = require_nir()
    file = io.BytesIO()
    nir.write(file, graph)
    written = file.getvalue()
    write_whole(path, [written])
    return len(written)


def _check(net: FoldedNet) -> None:
    if net.config.v_reset is None:
        raise InputError("NIR has no soft reset (v_reset=None), only one to v_reset: train with a hard reset")
    for name, entries in net.arrays.items():
        steps = [x.shape[0] for key, x in entries.items() if key in ("kernel", "low")]
        if steps and steps[0] > 1:
            raise InputError(
                f"NIR's weights are the same at every step, but those of {name} differ between the {steps[0]} steps "
                '(norm="tebn"): train with norm="batch" or "tdbn"'
            )


class _Export(Walk):
    """Adds a network to a form. Spikes are the name of a node, potentials the names of the nodes that are summed."""

    def __init__(self, net: FoldedNet, form: Form):
        super().__init__(net.config)
        self.arrays, self.form = net.arrays, form

    def network(self):
        """Add all nodes, from input to output."""
        c = self.c
        self.form.output(self.run(self.form.input(Size(c.in_channels, c.image_size))), c.num_classes)

    def linear(self, layer, spikes):
        kernel, bias = self.weights(layer)
        size = _input_size(layer)
        if layer.window is not None:
            k, stride, padding = layer.window
            kernel = kernel.reshape(k, k, size.channels, -1)
            return [self.form.conv(_node(f"{layer.name}_map"), spikes, kernel, bias, size, stride, padding)]
        if layer.kind in ("height", "width"):
            return [self.form.along(_node(f"{layer.name}_map"), spikes, kernel, bias, size, layer.kind)]
        norm = self.per_token(layer)
        if self.in_neurons and "threshold" in self.arrays[layer.name]:
            norm = None
        return [self.form.conv(_node(layer.name), spikes, kernel[None, None], bias, size, per_token=norm)]

    def patch_encoding(self, i, x):
        name = f"stage{i}.encode"
        cells, *edges = (self.layers[f"{name}.{part}"] for part in ("cells", "edge1", "edge2"))
        size, half = _input_size(cells), _input_size(edges[0])
        third = half.channels
        kernel, bias = self.weights(cells)
        kernel = kernel.reshape(3, 3, size.channels, -1)
        # The third node's potential contains the first node's.
        whole, whole_bias = kernel.copy(), bias.copy()
        whole[..., 2 * third :] += kernel[..., :third]
        whole_bias[2 * third :] += bias[:third]
        h = [self.form.conv(_node(cells.name), x, whole, whole_bias, size, 2, 1)]
        potentials = []
        for k, layer in enumerate(edges):
            part = slice(k * third, (k + 1) * third)
            cell = self.form.conv(_node(f"{name}.cell{k + 1}"), x, kernel[..., part], bias[part], size, 2, 1)
            node = self.fire(self.neurons[f"{name}.node{k + 1}"], [cell, *potentials])
            edge, edge_bias = self.weights(layer)
            edge = edge.reshape(3, 3, third, third)
            if k == 0:
                potentials = [self.form.conv(_node(f"{layer.name}_node"), node, edge, edge_bias, half, 1, 1)]
            pad = (k + 1) * third, (1 - k) * third
            wide = np.pad(edge, ((0, 0), (0, 0), (0, 0), pad))
            h.append(self.form.conv(_node(layer.name), node, wide, np.pad(edge_bias, pad), half, 1, 1))
        return h

    def identity(self, layer, spikes):
        low, high = (np.asarray(self.arrays[layer.name][key][0], np.float64) for key in ("low", "high"))
        kernel = np.diag(high - low)[None, None]
        return [self.form.conv(_node(f"{layer.name}_map"), spikes, kernel, low, _input_size(layer))]

    def fuse(self, layer, parts):
        kernel, bias = self.weights(layer)
        size = Size(layer.out, math.isqrt(layer.positions))
        # The bias is added once, with the first part.
        return [
            self.form.conv(_node(f"{layer.name}_{part}"), source, matrix[None, None], b, size)
            for part, source, matrix, b in zip(
                ("identity", "height", "width"), parts, np.split(kernel, 3), (bias, 0 * bias, 0 * bias), strict=True
            )
        ]

    def head(self, layer, spikes):
        c = self.c
        size = Size(layer.fan_in, c.stage_side(c.stages - 1))
        kernel, bias = self.weights(layer)
        return self.form.head("head", spikes, kernel, bias, size)

    def fire(self, neurons, potential):
        c = self.c
        tau = np.asarray(self.arrays[f"{neurons.short}.neurons"]["tau"], np.float64) if c.neuron == "plif" else c.tau
        constants = Neurons(c.neuron != "if", tau, c.v_threshold, c.v_reset or 0.0, c.decay_input)
        norm = self.per_token(self.layers[neurons.layer]) if neurons.per_token and self.in_neurons else None
        size = Size(neurons.shape[2], neurons.shape[0])
        return self.form.neurons(_node(neurons.short), potential, size, constants, norm)

    def add(self, a, b, place):
        return a + b

    @property
    def in_neurons(self) -> bool:
        """Whether a norm per token goes into the neurons' constants."""
        return self.form.per_neuron and self.c.neuron != "if"

    def per_token(self, layer) -> PerToken | None:
        """The norm per token after a layer's weights, a z + c."""
        entries = {key: np.asarray(x, np.float64) for key, x in self.arrays[layer.name].items()}
        if "threshold" in entries:
            c, constant, offset = self.c, entries["constant"] > 0, entries["offset"][0]
            scale = (c.v_threshold - (c.v_reset or 0.0)) / (entries["threshold"] - entries["reset"])
            return PerToken(np.where(constant, 0.0, scale), np.where(constant, offset, scale * offset))
        return PerToken(entries["scale"], entries["offset"][0]) if "scale" in entries else None

    def weights(self, layer):
        """Kernel [fan_in, out] and bias [out]."""
        entries = self.arrays[layer.name]
        return np.asarray(entries["kernel"][0], np.float64), np.asarray(entries["bias"][0], np.float64)


def _input_size(layer: Layer) -> Size:
    """The input grid of a layer with neurons."""
    assert layer.neurons is not None
    side, _, channels = layer.neurons.shape
    if layer.window is None:
        return Size(layer.fan_in if layer.kind == "dense" else channels, side)
    size, stride, _ = layer.window
    return Size(layer.fan_in // size**2, side * stride)


def _node(name: str) -> str:
    return name.replace(".", "_")
