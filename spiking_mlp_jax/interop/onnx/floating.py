"""The folded network in floating point as an ONNX model: the equations of `deploy/forward.py`, one for one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop.onnx.graph import Graph, described
from spiking_mlp_jax.interop.onnx.network import FLOAT, Network, Signal, along

if TYPE_CHECKING:
    from onnx import ModelProto

    from spiking_mlp_jax.deploy.fold import FoldedNet


def float_model(folded: FoldedNet, *, pixels: bool = False, data: dict[str, Any] | None = None) -> ModelProto:
    """A folded network as an ONNX model for any number of images.

    Args:
        folded: from `fold`.
        pixels: whether the model takes raw pixels and normalises them itself, by `folded.mean` and `folded.std`: those
            that were given to `fold` or came with the weights, else 0 and 1.
        data: "data" of the weights, which is stored with the model: how pictures become pixels, and the classes' names.

    Returns:
        a model with the input "images" [batch, H, W, C], float32 and normalised, or with `pixels` uint8; and the output
        "logits", float32 [batch, K], averaged over the time steps. All arithmetic is in float32.

    Raises:
        InputError: onnx is not installed, weights are not finite, or too large for one file.
    """
    from spiking_mlp_jax.deploy.fold import FoldedNet

    if not isinstance(folded, FoldedNet):
        raise InputError(f"a folded network is exported, not a {type(folded).__name__}: give what `fold` makes of one")
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
            raise InputError(f"{layer} of the network has a {key} that is no number: train it again")
        return values

    def stem(self, patches):
        return self.map("stage0.encode", patches)

    def scaled(self, layer, sums, axis):
        bias = along(self.entry(layer, "bias"), len(sums.tail), axis)
        steps = max(sums.steps, len(self.arrays[layer]["bias"]))
        named = self.graph.constant(bias, f"{layer}.bias")
        return sums._replace(name=self.graph.op("Add", sums.name, named), steps=steps)

    def channel(self, name, x):
        layer = f"{name}.expand"
        with self.graph.scope("hidden"):
            z = self.map(layer, x)
            constants = {}
            if "threshold" in self.arrays[layer]:
                constants = {key: self.entry(layer, key)[:, None] for key in ("threshold", "reset", "below")}
                constant = self.entry(layer, "constant")[:, None]
                if constant.any():
                    z = z._replace(name=self.graph.op("Where", constant, np.float32(0), z.name))
                z = self.plus(z, along(self.entry(layer, "offset"), 2, -2))
            x = self.fire(f"{name}.hidden", z, **constants)
        layer = f"{name}.project"
        with self.graph.scope("project"):
            z = self.map(layer, x)
            if "scale" not in self.arrays[layer]:
                return z
            z = z._replace(name=self.graph.op("Mul", z.name, self.entry(layer, "scale")[:, None]))
            return self.plus(z, along(self.entry(layer, "offset"), 2, -2))

    def head(self, x):
        counts = self.graph.op("ReduceSum", x.name, np.array([2]), keepdims=0)
        return self.map("head", x._replace(name=counts, tail=x.tail[1:]))

    def plus(self, x: Signal, values: np.ndarray) -> Signal:
        """The sum with constants, which have T time steps only where x has."""
        return x._replace(name=self.graph.op("Add", x.name, values))

    def fire(self, neurons, x, threshold=None, reset=None, below=None):
        c, op = self.c, self.graph.op
        level = np.float32(c.v_threshold) if threshold is None else threshold
        rest = np.float32(c.v_reset or 0.0) if reset is None else reset
        turned = np.zeros((), bool) if below is None else below
        with self.graph.scope("neuron"):
            v: str | np.ndarray = np.asarray(rest)
            fired = []
            for t, now in enumerate(self.per_step(x)):
                h = self.charged(neurons, v, now, np.asarray(rest))
                fired.append(self.fired(h, np.asarray(level), turned))
                if t + 1 < c.time_steps:
                    after = op("Sub", h, np.asarray(level)) if c.v_reset is None else np.asarray(rest)
                    v = op("Where", fired[-1], after, h)
            return self.spikes(x, fired, FLOAT)

    def charged(self, neurons: str, v: str | np.ndarray, x: str, reset: np.ndarray) -> str:
        """The potential before it is compared; v is an array at the first step."""
        c, op = self.c, self.graph.op
        if c.neuron == "if":
            return self.sum(v, x)
        tau = self.entry(f"{neurons}.neurons", "tau") if c.neuron == "plif" else np.float32(c.tau)
        if c.decay_input:
            drive = x if isinstance(v, np.ndarray) else op("Sub", x, op("Sub", v, reset) if reset.any() else v)
            return self.sum(v, op("Div", drive, np.asarray(tau)))
        if isinstance(v, np.ndarray):
            return self.sum(v, x)
        return op("Add", op("Sub", v, op("Div", op("Sub", v, reset) if reset.any() else v, np.asarray(tau))), x)

    def sum(self, v: str | np.ndarray, x: str) -> str:
        """v + x, and x alone where v is an array of zeros."""
        return x if isinstance(v, np.ndarray) and not v.any() else self.graph.op("Add", v, x)
