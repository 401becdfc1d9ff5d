"""The folded network in floating point as an ONNX model: the equations of `deploy.forward.Folded`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop.onnx.graph import Graph, described
from spiking_mlp_jax.interop.onnx.network import FLOAT, Network, along

if TYPE_CHECKING:
    from onnx import ModelProto

    from spiking_mlp_jax.deploy.fold import FoldedNet
    from spiking_mlp_jax.models.topology import Neurons


def float_model(folded: FoldedNet, *, pixels: bool = False, data: dict[str, Any] | None = None) -> ModelProto:
    """A folded network as an ONNX model for any number of images.

    Args:
        folded: from `fold`.
        pixels: take uint8 pixels and normalize them with `folded.mean` and `folded.std`: those given to `fold`, else of
            the weights, else 0 and 1.
        data: "data" of the weights, to store with the model: preprocessing and class names.

    Returns:
        a model with the input "images" [batch, H, W, C], normalized float32 or, with `pixels`, uint8, and the output
        "logits", float32 [batch, K], averaged over the time steps; computed in float32.

    Raises:
        InputError: onnx is not installed, or weights are not finite or too large for one file.
    """
    from spiking_mlp_jax.deploy.fold import FoldedNet

    if not isinstance(folded, FoldedNet):
        raise InputError(f"expected a FoldedNet, as `fold` returns it, got {type(folded).__name__}")
    c = folded.config
    net = _FloatNetwork(Graph(), folded)
    graph, images = net.graph, "images"
    if pixels:
        with graph.scope("normalize"):
            images = graph.op("Div", graph.op("Cast", images, to=FLOAT), np.float32(255))
            images = graph.op("Sub", images, np.asarray(folded.mean, np.float32))
            images = graph.op("Div", images, np.asarray(folded.std, np.float32))
    mean = graph.op("ReduceMean", net.logits(images).name, axes=[0], keepdims=0)
    graph.rename(mean, "logits")
    known = {"mean": folded.mean, "std": folded.std, **(data or {})}
    return graph.finish(
        {"images": (np.uint8 if pixels else np.float32, ("batch", c.image_size, c.image_size, c.in_channels))},
        {"logits": (np.float32, ("batch", c.num_classes))},
        {"network": "folded, float32", "config": dataclasses.asdict(c), **described(known)},
    )


class _FloatNetwork(Network):
    product = "MatMul"

    def __init__(self, graph: Graph, folded: FoldedNet):
        super().__init__(graph, folded.config)
        self.arrays = folded.arrays

    def entry(self, layer, key):
        values = np.asarray(self.arrays[layer][key])
        if values.dtype == bool:
            return values
        values = values.astype(np.float32)
        if not np.all(np.isfinite(values)):
            raise InputError(f"{layer} has a {key} with NaN or inf: retrain the network")
        return values

    def scaled(self, layer, sums, axis):
        bias = along(self.entry(layer.name, "bias"), len(sums.tail), axis)
        steps = max(sums.steps, len(self.arrays[layer.name]["bias"]))
        named = self.graph.constant(bias, f"{layer.name}.bias")
        return sums._replace(name=self.graph.op("Add", sums.name, named), steps=steps)

    def per_token(self, layer, z):
        op, entries = self.graph.op, self.arrays[layer.name]
        if "scale" in entries:
            name = op("Mul", z.name, self.entry(layer.name, "scale")[:, None])
        else:
            constant = self.entry(layer.name, "constant")[:, None]
            name = op("Where", constant, np.float32(0), z.name) if constant.any() else z.name
        return z._replace(name=op("Add", name, along(self.entry(layer.name, "offset"), 2, -2)))

    def head(self, layer, spikes):
        counts = self.graph.op("ReduceSum", spikes.name, np.array([2]), keepdims=0)
        return self.map(layer, spikes._replace(name=counts, tail=spikes.tail[1:]))

    def fire(self, neurons, potential):
        c, op = self.c, self.graph.op
        level, rest, below = np.float32(c.v_threshold), np.float32(c.v_reset or 0.0), np.zeros((), bool)
        if neurons.per_token:
            level, rest, below = (self.entry(neurons.layer, key)[:, None] for key in ("threshold", "reset", "below"))
        with self.graph.scope("neuron"):
            v: str | np.ndarray = np.asarray(rest)
            fired = []
            for t, now in enumerate(self.per_step(potential)):
                h = self.charged(neurons, v, now, np.asarray(rest))
                fired.append(self.fired(h, np.asarray(level), below))
                if t + 1 < c.time_steps:
                    after = op("Sub", h, np.asarray(level)) if c.v_reset is None else np.asarray(rest)
                    v = op("Where", fired[-1], after, h)
            return self.spikes(potential, fired, FLOAT)

    def charged(self, neurons: Neurons, v: str | np.ndarray, x: str, reset: np.ndarray) -> str:
        """The charged potential; v is an array at the first step."""
        c, op = self.c, self.graph.op
        if c.neuron == "if":
            return self.sum(v, x)
        tau = self.entry(f"{neurons.short}.neurons", "tau") if c.neuron == "plif" else np.float32(c.tau)
        if c.decay_input:
            drive = x if isinstance(v, np.ndarray) else op("Sub", x, op("Sub", v, reset) if reset.any() else v)
            return self.sum(v, op("Div", drive, np.asarray(tau)))
        if isinstance(v, np.ndarray):
            return self.sum(v, x)
        return op("Add", op("Sub", v, op("Div", op("Sub", v, reset) if reset.any() else v, np.asarray(tau))), x)

    def sum(self, v: str | np.ndarray, x: str) -> str:
        """v + x, or x alone if v is an array of zeros."""
        return x if isinstance(v, np.ndarray) and not v.any() else self.graph.op("Add", v, x)
