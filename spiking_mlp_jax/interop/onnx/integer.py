"""The integer network as an ONNX model of integer operators: the reference's integers, bit for bit.

A linear layer is a MatMulInteger of 0 and 1 with the int8 weights; pixels are eight bit planes, one product each. So no
sum of two products exceeds 16 bits, where some processors' instructions saturate. ONNX shifts only unsigned integers: a
potential is raised by a power of two that makes it positive, shifted, and lowered again. Potentials are int32, or int64
where the range analysis shows that the raised one needs a 33rd bit.

Runtimes multiply in MatMulInteger; the engine does not.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from spiking_mlp_jax.deploy import artifact, ranges
from spiking_mlp_jax.deploy.network import IntegerNet
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop.onnx.graph import Graph, described
from spiking_mlp_jax.interop.onnx.network import FLOAT, INT32, INT64, UINT8, UINT32, UINT64, Network, Signal, along

if TYPE_CHECKING:
    from onnx import ModelProto


def integer_model(net: IntegerNet) -> ModelProto:
    """An integer network as an ONNX model for any number of images.

    Args:
        net: any integer network.

    Returns:
        a model with the input "images", uint8 [batch, H, W, C], raw pixels; and the outputs "logits", float32
        [batch, K], averaged over the time steps and in the trained network's units; and "step_logits", int32
        [T, batch, K], the integers of `reference.run` and `Engine.logits`.

    Raises:
        InputError: onnx is not installed; the network fails `artifact.check`, or is too large for one file.
    """
    if not isinstance(net, IntegerNet):
        raise InputError(f"expected an IntegerNet, as `quantize` returns it, got {type(net).__name__}")
    artifact.check(net)
    c, run = net.description, _IntegerNetwork(Graph(), net)
    graph = run.graph
    steps = run.logits("images").name
    graph.rename(steps, "step_logits")
    with graph.scope("mean"):
        total = graph.op("ReduceSum", graph.op("Cast", steps, to=INT64), np.array([0]), keepdims=0)
        scaled = graph.op("Mul", graph.op("Cast", total, to=FLOAT), np.float32(2.0 ** -c.formats["head"].fraction))
        graph.rename(graph.op("Div", scaled, np.float32(c.time_steps)), "logits")
    config = {key: value for key, value in dataclasses.asdict(c).items() if key != "data"}
    return graph.finish(
        {"images": (np.uint8, ("batch", c.image_size, c.image_size, c.in_channels))},
        {
            "logits": (np.float32, ("batch", c.num_classes)),
            "step_logits": (np.int32, (c.time_steps, "batch", c.num_classes)),
        },
        {"network": f"integers, weights of {c.bits} bits", "config": config, **described(c.data)},
    )


class _IntegerNetwork(Network):
    product = "MatMulInteger"

    def __init__(self, graph: Graph, net: IntegerNet):
        super().__init__(graph, net.description)
        self.arrays = net.arrays
        self.bits = {place: ranges.bits(*found) for place, found in ranges.check(net).items()}

    def entry(self, layer, key):
        values = np.asarray(self.arrays[f"{layer}.{key}"])
        return values if key in ("kernel", "below", "constant") else values.astype(np.int32)

    def stem(self, layer, pixels):
        # Planes come before tokens; a left shift drops the bits above each.
        patches = self.windows(pixels, self.c.patch_size, self.c.patch_size, 0)
        patches = self.reshaped(patches, (1, *patches.tail))
        bits = np.arange(8).reshape(8, 1, 1)
        high = self.graph.op("BitShift", patches.name, (7 - bits).astype(np.uint8), direction="LEFT")
        planes = self.graph.op("BitShift", high, np.uint8(7), direction="RIGHT")
        sums = self.accumulate(layer, Signal(planes, 1, (8, *patches.tail[1:])))
        worth = self.graph.op("Mul", sums.name, (1 << bits).astype(np.int32))
        acc = self.graph.op("ReduceSum", worth, np.array([2]), keepdims=0)
        # The range analysis covers the stem's sum only after its shift.
        kernel = self.arrays[f"{layer.name}.kernel"]
        right = int(np.maximum(-self.entry(layer.name, "shift"), 0).max())
        most = 255 * int(np.abs(kernel, dtype=np.int32).sum(1).max()) + (1 << right >> 1)
        bound = max(ranges.bits(-most, most), self.bits[layer.place])
        return self.scaled(layer, sums._replace(name=acc, tail=sums.tail[1:]), -1, bound)

    def scaled(self, layer, sums, axis, bits=None):
        bits = self.bits[layer.place] if bits is None else bits
        by, bias = (along(self.entry(layer.name, key), len(sums.tail), axis) for key in ("shift", "bias"))
        steps = max(sums.steps, len(self.arrays[f"{layer.name}.bias"]))
        bias = bias.astype(np.int64) - _raised(by, bits)
        wide = bits > 31 or by.max() > 30 or bias.min() < -(2**31) or bias.max() >= 2**31
        found = self.graph.op("Add", self.shifted(sums.name, by, bits, wide), _constant(bias, wide))
        return sums._replace(name=self.graph.op("Cast", found, to=INT32) if wide else found, steps=steps)

    def per_token(self, layer, z):
        op, offset = self.graph.op, self.entry(layer.name, "offset")
        steps = max(z.steps, len(offset))
        rest = along(offset, 2, -2)
        if f"{layer.name}.constant" in self.arrays:
            constant = self.entry(layer.name, "constant")[:, None]
            name = op("Where", constant, np.int32(0), z.name) if constant.any() else z.name
            return z._replace(name=op("Add", name, rest), steps=steps)
        # A token's scale is a sum of signed powers of two.
        exponents, signs = (self.arrays[f"{layer.name}.{key}"].astype(np.int64) for key in ("exponents", "signs"))
        bits, rest = self.bits[layer.name.partition(".")[0]], rest.astype(np.int64)
        used = [d for d in range(signs.shape[1]) if signs[:, d].any()]
        # Terms are summed before they are lowered.
        wide = bits + len(used).bit_length() > 31 or exponents.max() > 30
        total = None
        for d in used:
            by, sign = exponents[:, d, None], signs[:, d, None]
            term = self.shifted(z.name, by, bits, wide)
            rest = rest - sign * _raised(by, bits)
            term = term if (sign == 1).all() else op("Mul", term, _constant(sign, wide))
            total = term if total is None else op("Add", total, term)
        if total is None:
            total = op("Mul", z.name, np.int32(0))
            wide = False
        total = op("Add", total, _constant(rest, wide))
        return z._replace(name=op("Cast", total, to=INT32) if wide else total, steps=steps)

    def head(self, layer, spikes):
        sums = self.accumulate(layer, spikes)
        total = self.graph.op("ReduceSum", sums.name, np.array([2]), keepdims=0)
        logits = self.scaled(layer, sums._replace(name=total, tail=sums.tail[1:]), -1)
        return self.each_step(logits, self.c.time_steps)

    def shifted(self, x: str, by: np.ndarray, bits: int, wide: bool) -> str:
        """x * 2^by with halves rounded up, plus `_raised(by, bits)`; intermediates have `bits` bits."""
        op = self.graph.op
        left, right = np.maximum(by, 0).astype(np.int64), np.maximum(-by, 0).astype(np.int64)
        if wide:
            x = op("Cast", x, to=INT64)
        if left.any():
            x = op("Mul", x, _constant(1 << left, wide))
        if not right.any():
            return x
        x = op("Add", x, _constant((1 << right >> 1) + (1 << (bits - 1)), wide))
        return self.right(x, right, wide)

    def right(self, x: str, by: np.ndarray, wide: bool) -> str:
        """x >> by for x >= 0."""
        signed, unsigned = (INT64, UINT64) if wide else (INT32, UINT32)
        distance = by.astype(np.uint64 if wide else np.uint32)
        moved = self.graph.op("BitShift", self.graph.op("Cast", x, to=unsigned), distance, direction="RIGHT")
        return self.graph.op("Cast", moved, to=signed)

    def fire(self, neurons, potential):
        c, op, form, bits = self.c, self.graph.op, self.c.formats[neurons.place], self.bits[neurons.place]
        lif, below = c.neuron != "if", np.zeros((), bool)
        threshold, rest = (np.array(value, np.int64) for value in (form.threshold, form.reset))
        if neurons.per_token:
            threshold, rest = (self.entry(neurons.layer, k)[:, None].astype(np.int64) for k in ("threshold", "reset"))
            below = self.entry(neurons.layer, "below")[:, None]
        gain = (1 << c.leak) - 1 if lif else 1
        # The stored potential is raised, so that it can be shifted directly.
        up = 1 << max(bits - 1, c.leak) if c.leak else 0
        wide = bool(up) and bits > 31
        level, start = (threshold << c.leak) + up, rest + (up >> c.leak)
        pull = (rest if lif else 0) + up - (up >> c.leak) * gain
        with self.graph.scope("neuron"):
            driven = op("Cast", potential.name, to=INT64) if wide else potential.name
            if lif and not c.decay_input and c.leak:
                driven = op("Mul", driven, _constant(np.array(1 << c.leak), wide))
            if np.any(pull):
                driven = op("Add", driven, _constant(pull, wide))
            v: str | None = None
            fired = []
            for t, now in enumerate(self.per_step(potential._replace(name=driven))):
                charged = now
                if v is not None and gain:
                    charged = op("Add", now, v if gain == 1 else op("Mul", v, _constant(np.array(gain), wide)))
                elif np.any(start * gain):
                    charged = op("Add", now, _constant(start * gain, wide))
                fired.append(self.fired(charged, _constant(level, wide), below))
                if t + 1 < c.time_steps:
                    quiet = self.right(charged, np.array(c.leak), wide) if c.leak else charged
                    after = op("Sub", quiet, _constant(threshold, wide)) if c.soft_reset else _constant(start, wide)
                    v = op("Where", fired[-1], after, quiet)
            return self.spikes(potential, fired, UINT8)


def _constant(values: np.ndarray, wide: bool) -> np.ndarray:
    return np.asarray(values).astype(np.int64 if wide else np.int32)


def _raised(by: np.ndarray, bits: int) -> np.ndarray:
    """The excess of `shifted`: the raise that made x positive, shifted."""
    right = np.maximum(-by, 0).astype(np.int64)
    return (np.int64(1) << (bits - 1)) >> right if right.any() else np.zeros_like(right)
