"""Layers of a folded network as nodes of a NIR graph, in one of two forms.

NIR's nodes take one array each: Affine maps its last axis, Conv2d convolves [channels, rows, columns], and nothing
moves an axis to another place. So the arrays of a stage of C channels and S x S tokens are laid out so that every map
is one node:

    RowsForm    [C * S, 1, S]: each row of each channel is a channel of one-row images. A Conv2d then maps channels and
                rows densely and is shared by the columns; what acts along a row is an Affine batched over the rest.
    DenseForm   [C * S * S]: every map is an Affine [out, in], every neuron has the same constants in its layer. It is
                the larger form, and the one that simulators of vectors read.

Both are [C, S, S] in C's order, reshaped. The `nir` package is imported here and in `nir_import.py` alone.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from spiking_mlp_jax.errors import InputError

MEGABYTE = 1 << 20


def require_nir() -> Any:
    """The `nir` package.

    Raises:
        InputError: it is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in ("h5py", "nir")):
        raise InputError("NIR files need the nir package: pip install 'spiking-mlp-jax[export]'")
    import nir

    return nir


@dataclasses.dataclass(frozen=True)
class Neurons:
    """Constants of a layer of neurons, in the network's units.

    Attributes:
        leaky: False for IF neurons.
        tau: time constant in steps.
        threshold: above `reset`.
        reset: potential after a spike, which the leak also goes to.
        decay_input: whether the input leaks as the potential does.
    """

    leaky: bool
    tau: float
    threshold: float
    reset: float
    decay_input: bool


@dataclasses.dataclass(frozen=True)
class PerToken:
    """y = scale * x + offset with one scale and offset for each of N tokens, of any channel; float64 [N]."""

    scale: np.ndarray
    offset: np.ndarray


@dataclasses.dataclass(frozen=True)
class Size:
    """A square grid: channels and tokens along a side."""

    channels: int
    side: int


class Form:
    """Collects nodes and edges; nothing is built before `graph`, so that a refusal costs no memory.

    Args:
        dt: seconds that a time step stands for.
        dtype: of the parameters.
    """

    name: str
    per_neuron: bool

    def __init__(self, dt: float, dtype: np.dtype):
        self.nir, self.dt, self.dtype = require_nir(), dt, np.dtype(dtype)
        self.nodes: dict[str, Callable[[], Any]] = {}
        self.edges: list[tuple[str, str]] = []
        self.entries = 0

    def shape(self, size: Size) -> tuple[int, ...]:
        """Of the array that stands for [channels, side, side]."""
        raise NotImplementedError

    def conv(self, name, source, kernel, bias, size: Size, stride=1, padding=0, per_token: PerToken | None = None):
        """A convolution, kernel [k, k, in, out] and bias [out], whose output `per_token` scales; its node's name."""
        raise NotImplementedError

    def along(self, name, source, kernel, bias, size: Size, axis: str):
        """Mixing of the tokens along "height" or "width", kernel [in, out] and bias [out]; its node's name."""
        raise NotImplementedError

    def head(self, name, source, kernel, bias, size: Size):
        """Scores of the sum over tokens, kernel [channels, out] and bias [out]; its node's name."""
        raise NotImplementedError

    def input(self, size: Size) -> str:
        """The graph's input; its node's name."""
        self._add("input", None, 0, lambda: self.nir.Input(np.array(self.shape(size))))
        return "input"

    def output(self, source: str, classes: int) -> None:
        """The graph's output, which takes scores."""
        self._add("output", source, 0, lambda: self.nir.Output(np.array([classes])))

    def neurons(self, name, sources: list[str], size: Size, k: Neurons, per_token: PerToken | None = None) -> str:
        """Neurons of the sum of their sources, which `per_token` scales; their node's name.

        One step of NIR's equation, tau dv/dt = v_leak - v + r I, is v + dt / tau (v_leak - v + r I).
        """
        shape = self.shape(size)
        self._add(name, None, (5 if k.leaky else 3) * int(np.prod(shape)), lambda: self._neurons(shape, k, per_token))
        self.edges += [(source, name) for source in sources]
        return name

    def graph(self, limit: float, metadata: dict[str, Any]) -> Any:
        """The `nir.NIRGraph`, checked by `nir` itself.

        Args:
            limit: megabytes that its parameters may take.
            metadata: strings, numbers and arrays.

        Raises:
            InputError: they would take more, or one of them is not finite.
        """
        needed = math.ceil(self.entries * self.dtype.itemsize / MEGABYTE)
        if self.entries * self.dtype.itemsize > limit * MEGABYTE:
            raise InputError(
                f"the graph needs {self.entries:,} numbers ({needed:,} MB), above the limit of {limit:,g} MB, "
                f"because NIR has no node that mixes an axis in the middle of an array: {self._advice(needed)}"
            )
        nodes = {name: build() for name, build in self.nodes.items()}
        for name, node in nodes.items():
            if not all(np.isfinite(x).all() for x in vars(node).values() if _is_floating(x)):
                raise InputError(f"{name} would hold numbers that are not finite: the network's weights are damaged")
        return self.nir.NIRGraph(nodes, self.edges, metadata)

    def _advice(self, needed):
        raise NotImplementedError

    def _add(self, name, source, entries, build):
        self.nodes[name] = build
        self.entries += entries
        if source is not None:
            self.edges.append((source, name))
        return name

    def _affine(self, name, source, weight_shape, weight, bias):
        """Bias and weight are functions, for the arrays may be large."""
        entries = int(np.prod(weight_shape)) + int(np.prod(weight_shape[:-1]))

        def build():
            made = self._array(weight(), weight_shape), self._array(bias(), weight_shape[:-1])
            return self.nir.Affine(*made)

        return self._add(name, source, entries, build)

    def _neurons(self, shape, k: Neurons, per_token: PerToken | None):
        scale, offset = np.ones(shape), np.zeros(shape)
        if per_token is not None:
            scale, offset = (self._over_tokens(x, shape) for x in (per_token.scale, per_token.offset))
        threshold, reset = (self._array(x, shape) for x in (k.threshold, k.reset))
        if not k.leaky:
            return self.nir.IF(self._array(scale / self.dt, shape), threshold, reset)
        gain = 1.0 if k.decay_input else k.tau
        constants = k.tau * self.dt, gain * scale, k.reset + gain * offset
        return self.nir.LIF(*(self._array(x, shape) for x in constants), threshold, reset)

    def _over_tokens(self, values, shape):
        """One value a token as an array of the shape, for every channel."""
        side = int(np.sqrt(values.size))
        channels = int(np.prod(shape)) // values.size
        return np.broadcast_to(values.reshape(1, side, side), (channels, side, side)).reshape(shape)

    def _array(self, values, shape):
        values = np.asarray(values, self.dtype)
        # Others write into a graph's arrays; what broadcast_to gives is read-only.
        return values if values.shape == shape and values.flags.writeable else np.array(np.broadcast_to(values, shape))


class RowsForm(Form):
    """Arrays [C * S, 1, S], see the module."""

    name, per_neuron = "rows", True

    def shape(self, size):
        """See `Form`."""
        return size.channels * size.side, 1, size.side

    def conv(self, name, source, kernel, bias, size, stride=1, padding=0, per_token=None):
        """See `Form`."""
        k, _, fan_in, fan_out = kernel.shape
        side = (size.side + 2 * padding - k) // stride + 1
        # One row of pixels, padded above and below as on its sides (nir infers shapes of square kernels alone).
        pad = max(padding, k - 1 - padding)
        shape = fan_out * side, fan_in * size.side, 2 * pad + 1, 2 * pad + 1

        def build():
            weight = np.zeros((fan_out, side, fan_in, size.side, *shape[2:]), self.dtype)
            columns = slice(pad - padding, pad - padding + k)
            for row in range(side):
                for i in range(k):
                    if 0 <= (read := row * stride + i - padding) < size.side:
                        weight[:, row, :, read, pad, columns] = kernel[i].transpose(2, 1, 0)
            return self.nir.Conv2d(
                (1, size.side),
                weight.reshape(shape),
                stride,
                pad,
                1,
                1,
                self._array(np.repeat(bias, side), shape[:1]),
            )

        self._add(name, source, int(np.prod(shape)) + shape[0], build)
        if per_token is None:
            return name
        scaled = self.shape(Size(fan_out, side))
        return self._affine(
            f"{name}_norm",
            name,
            (*scaled, side),
            lambda: self._over_tokens(per_token.scale, scaled)[..., None] * np.eye(side),
            lambda: self._over_tokens(per_token.offset, scaled),
        )

    def along(self, name, source, kernel, bias, size, axis):
        """See `Form`."""
        if axis == "width":
            weight = (*self.shape(size), size.side)
            return self._affine(name, source, weight, lambda: kernel.T, lambda: bias)
        rows = size.channels * size.side

        def build():
            weight = np.kron(np.eye(size.channels, dtype=self.dtype), kernel.T.astype(self.dtype))
            every = self._array(np.tile(bias, size.channels), (rows,))
            return self.nir.Conv2d((1, size.side), weight.reshape(rows, rows, 1, 1), 1, 0, 1, 1, every)

        return self._add(name, source, rows * (rows + 1), build)

    def head(self, name, source, kernel, bias, size):
        """See `Form`."""
        flat = f"{name}_tokens"
        self._add(flat, source, 0, lambda: self.nir.Flatten(np.array(self.shape(size)), 0, -1))
        weight = kernel.shape[1], int(np.prod(self.shape(size)))
        return self._affine(name, flat, weight, lambda: np.repeat(kernel.T, size.side**2, 1), lambda: bias)

    def _advice(self, needed):
        return f"take a network of fewer channels or tokens, or raise the limit to {needed:,} MB (--max-dense)"


class DenseForm(Form):
    """Arrays [C * S * S], see the module."""

    name, per_neuron = "dense", False

    def shape(self, size):
        """See `Form`."""
        return (size.channels * size.side**2,)

    def conv(self, name, source, kernel, bias, size, stride=1, padding=0, per_token=None):
        """See `Form`."""
        k, _, fan_in, fan_out = kernel.shape
        side = (size.side + 2 * padding - k) // stride + 1
        shape = fan_out * side**2, fan_in * size.side**2
        token = PerToken(np.ones(side**2), np.zeros(side**2)) if per_token is None else per_token

        def weight():
            made = np.zeros((fan_out, side, side, fan_in, size.side, size.side), self.dtype)
            scale = token.scale.reshape(side, side)
            for row, column, i, j in np.ndindex(side, side, k, k):
                y, x = row * stride + i - padding, column * stride + j - padding
                if 0 <= y < size.side and 0 <= x < size.side:
                    made[:, row, column, :, y, x] = scale[row, column] * kernel[i, j].T
            return made.reshape(shape)

        return self._affine(
            name, source, shape, weight, lambda: (bias[:, None] * token.scale + token.offset).reshape(-1)
        )

    def along(self, name, source, kernel, bias, size, axis):
        """See `Form`."""
        one, every = np.eye(size.side, dtype=self.dtype), np.eye(size.channels, dtype=self.dtype)
        pair = (kernel.T, one) if axis == "height" else (one, kernel.T)
        spread = bias[:, None] if axis == "height" else bias
        tokens = np.broadcast_to(spread, (size.side, size.side)).reshape(-1)
        shape = self.shape(size) * 2
        return self._affine(
            name,
            source,
            shape,
            lambda: np.kron(every, np.kron(*pair).astype(self.dtype)),
            lambda: np.tile(tokens, size.channels),
        )

    def head(self, name, source, kernel, bias, size):
        """See `Form`."""
        weight = kernel.shape[1], *self.shape(size)
        return self._affine(name, source, weight, lambda: np.repeat(kernel.T, size.side**2, 1), lambda: bias)

    def _advice(self, needed):
        return f"the form of rows, without --dense, is smaller, or raise the limit to {needed:,} MB (--max-dense)"


FORMS: dict[str, type[Form]] = {form.name: form for form in (RowsForm, DenseForm)}


def _is_floating(values) -> bool:
    return isinstance(values, np.ndarray) and np.issubdtype(values.dtype, np.floating)
