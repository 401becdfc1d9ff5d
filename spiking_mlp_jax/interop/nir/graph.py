"""Base class of the two forms of a NIR graph. Only this file imports `nir`."""

from __future__ import annotations

import abc
import dataclasses
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from spiking_mlp_jax.errors import InputError

MEGABYTE = 1 << 20
# Seconds of a time step: snnTorch's constant and SpikingJelly's default.
DT = 1e-4
MAX_MEGABYTES = 1024.0


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
        tau: time constant in steps; or one a channel, [C].
        threshold: above `reset`.
        reset: potential after a spike and without input.
        decay_input: whether the input decays like the potential.
    """

    leaky: bool
    tau: float | np.ndarray
    threshold: float
    reset: float
    decay_input: bool


@dataclasses.dataclass(frozen=True)
class PerToken:
    """y = scale * x + offset, the same for all channels of a token; float64 [N]."""

    scale: np.ndarray
    offset: np.ndarray


@dataclasses.dataclass(frozen=True)
class Size:
    """Channels, and tokens along a side, of a square grid."""

    channels: int
    side: int


class Form(abc.ABC):
    """Collects nodes and edges; arrays are built by `graph`, so that a refusal costs no memory.

    Args:
        dt: seconds of a time step.
        dtype: of the parameters.

    Attributes:
        name: for users.
        per_neuron: whether neurons of a layer may have different constants, as a norm per token needs.
    """

    name: str
    per_neuron: bool

    def __init__(self, dt: float, dtype: np.dtype):
        self.nir, self.dt, self.dtype = require_nir(), dt, np.dtype(dtype)
        self.nodes: dict[str, Callable[[], Any]] = {}
        self.edges: list[tuple[str, str]] = []
        self.entries = 0

    @abc.abstractmethod
    def shape(self, size: Size) -> tuple[int, ...]:
        """The shape of an array [channels, side, side] in this form."""

    @abc.abstractmethod
    def conv(
        self, name, source, kernel, bias, size: Size, stride=1, padding=0, per_token: PerToken | None = None
    ) -> str:
        """A convolution, kernel [k, k, in, out] and bias [out], whose output `per_token` scales; its node's name."""

    @abc.abstractmethod
    def along(self, name, source, kernel, bias, size: Size, axis: str) -> str:
        """Mixing of the tokens along "height" or "width", kernel [in, out] and bias [out]; its node's name."""

    @abc.abstractmethod
    def head(self, name, source, kernel, bias, size: Size) -> str:
        """Logits of the sum over tokens, kernel [channels, out] and bias [out]; its node's name."""

    def input(self, size: Size) -> str:
        """The graph's input; its node's name."""
        self._add("input", None, 0, lambda: self.nir.Input(np.array(self.shape(size))))
        return "input"

    def output(self, source: str, classes: int) -> None:
        """The graph's output: logits."""
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
                raise InputError(f"{name} has NaN or inf: retrain the network")
        return self.nir.NIRGraph(nodes, self.edges, metadata)

    @abc.abstractmethod
    def _advice(self, needed: int) -> str:
        """What to do about a graph of this many megabytes."""

    def _add(self, name, source, entries, build):
        self.nodes[name] = build
        self.entries += entries
        if source is not None:
            self.edges.append((source, name))
        return name

    def _affine(self, name, source, weight_shape, weight, bias):
        """Weight and bias are functions, because the arrays may be large."""
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
        tau = np.repeat(k.tau, np.prod(shape) // np.size(k.tau)).reshape(shape)  # channels lead
        gain = 1.0 if k.decay_input else tau
        constants = tau * self.dt, gain * scale, k.reset + gain * offset
        return self.nir.LIF(*(self._array(x, shape) for x in constants), threshold, reset)

    def _over_tokens(self, values, shape):
        """Values per token, broadcast over channels to a shape."""
        side = int(np.sqrt(values.size))
        channels = int(np.prod(shape)) // values.size
        return np.broadcast_to(values.reshape(1, side, side), (channels, side, side)).reshape(shape)

    def _array(self, values, shape):
        values = np.asarray(values, self.dtype)
        # Other tools write into a graph's arrays; broadcast_to returns a read-only view.
        return values if values.shape == shape and values.flags.writeable else np.array(np.broadcast_to(values, shape))


def _is_floating(values) -> bool:
    return isinstance(values, np.ndarray) and np.issubdtype(values.dtype, np.floating)
