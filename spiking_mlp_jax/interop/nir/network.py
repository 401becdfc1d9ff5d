"""Runs NIR graphs: those of `nir.export`, and others of the same kinds of nodes.

Neurons take forward Euler steps, as `nn.dynamics.step` does:

    LIF    h = v + dt / tau (v_leak - v + r x)
    IF     h = v + dt r x
    both   s = 1 if h >= v_threshold else 0; v = v_reset where s else h

NIR's own condition is h > v_threshold (`strict=True`). Graphs are acyclic, so each node runs over all steps before the
next one.
"""

from __future__ import annotations

import graphlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop.nir.graph import require_nir

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_KNOWN = ("Input", "Output", "Affine", "Linear", "Conv2d", "Flatten", "LIF", "IF")
_ARRAYS = {
    "Affine": ("weight", "bias"),
    "Linear": ("weight",),
    "Conv2d": ("weight", "bias"),
    "LIF": ("tau", "r", "v_leak", "v_threshold", "v_reset"),
    "IF": ("r", "v_threshold", "v_reset"),
}


def read_nir(path: str | os.PathLike[str]) -> Any:
    """The `nir.NIRGraph` of a file, whose shapes `nir` has checked.

    Raises:
        InputError: the nir package is missing, there is no such file, or it is not a NIR graph.
    """
    nir = require_nir()
    if not Path(path).is_file():
        raise InputError(f"{path} is not a file: name one that `spiking-mlp export-nir` or another tool wrote")
    try:
        return nir.read(path)
    # On damaged files the libraries raise exceptions of any kind.
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not a readable NIR graph ({said}): write it again") from error


def from_nir(graph: Any, *, dt: float | None = None, time_steps: int | None = None, strict: bool = False) -> NirNetwork:
    """The network of a graph.

    Args:
        graph: a `nir.NIRGraph` with one input and one output, without cycles, of Affine, Linear, Conv2d, Flatten, LIF
            and IF nodes. It is not changed.
        dt: seconds of a time step; None: from the metadata of `to_nir`.
        time_steps: T; likewise.
        strict: fire only above the threshold, as NIR defines, and not at it.

    Raises:
        InputError: the graph has other nodes, cycles, loose ends or inconsistent shapes; dt or time_steps is
            unknown or not positive.

    Examples:
        >>> import nir, numpy as np
        >>> one = np.ones(2, np.float32)
        >>> lif = nir.LIF(tau=one, r=one, v_leak=0 * one, v_threshold=0.6 * one, v_reset=0 * one)
        >>> net = from_nir(nir.NIRGraph.from_list(lif), dt=0.5, time_steps=3)
        >>> out, spikes = net.run(np.array([[1.0, 2.0]], np.float32))
        >>> out[:, 0].tolist()
        [[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]]
    """
    nir = require_nir()
    if not isinstance(graph, nir.NIRGraph):
        raise InputError(f"expected a nir.NIRGraph, got {type(graph).__name__}")
    known = graph.metadata if isinstance(graph.metadata, dict) else {}
    dt = _positive("dt", known.get("dt") if dt is None else dt, float)
    steps = _positive("time_steps", known.get("time_steps") if time_steps is None else time_steps, int)
    return NirNetwork(graph, dt, steps, strict)


class NirNetwork:
    """A graph's network; see `from_nir`.

    Attributes:
        time_steps: T.
        input_shape: of one input.
        neurons: names of the layers of neurons, in the order in which they run.
    """

    def __init__(self, graph: Any, dt: float, time_steps: int, strict: bool):
        self.time_steps = time_steps
        order = _order(graph)
        image = graph.metadata.get("image")
        self._image = None if image is None else tuple(int(n) for n in np.ravel(image))
        self.input_shape = tuple(int(n) for n in graph.nodes[order[0]].input_type["input"])
        self.neurons = [name for name in order if type(graph.nodes[name]).__name__ in ("LIF", "IF")]
        self._arrays = {name: _arrays(name, graph.nodes[name], dt) for name in order}
        self._forward = jax.jit(_forward(graph, order, time_steps, strict))
        try:
            x = jax.ShapeDtypeStruct((1, *self.input_shape), np.float32)
            jax.eval_shape(self._forward, self._arrays, x)
        except (TypeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise InputError(f"the graph's shapes are inconsistent ({said}): write it again") from error

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "T B K"]:
        """Logits of normalized images, as those of the folded network.

        Raises:
            InputError: images do not have the graph's input shape.
        """
        images = jnp.asarray(images)
        if images.ndim != 4 or math.prod(images.shape[1:]) != math.prod(self.input_shape) or not images.size:
            raise InputError(f"images must be [batch, H, W, C] that fill {self.input_shape}, got {images.shape}")
        if self._image is not None and images.shape[1:] != (*self._image[1:], self._image[0]):
            expected = ", ".join(map(str, (*self._image[1:], self._image[0])))
            raise InputError(f"images must be [batch, {expected}], channels last, got {images.shape}")
        return self.run(jnp.moveaxis(images, 3, 1).reshape(-1, *self.input_shape))[0]

    def run(self, x: Float[Array, "B *shape"]) -> tuple[Float[Array, "T B *out"], dict[str, Array]]:
        """Outputs of each step for a constant input, and each layer's spikes, bool [B, T, ...].

        Raises:
            InputError: x does not have the graph's input shape, or is not floating.
        """
        x = jnp.asarray(x)
        if x.shape[1:] != self.input_shape or not jnp.issubdtype(x.dtype, jnp.floating):
            shape = ", ".join(map(str, self.input_shape))
            raise InputError(f"the input must be floating [batch, {shape}], got {x.dtype} {x.shape}")
        output, spikes = self._forward(self._arrays, x)
        return jnp.moveaxis(output, 1, 0), spikes


def _positive(name, value, kind):
    if value is None:
        raise InputError(f"the graph's metadata has no {name}: give it as an argument")
    number = np.asarray(value)
    real = number.ndim == 0 and number.dtype.kind in "iuf" and math.isfinite(number) and number > 0
    if not real or (kind is int and number != int(number)):
        raise InputError(f"{name} must be a positive {'whole ' * (kind is int)}number, got {str(value)[:40]!r}")
    return kind(number)


def _order(graph) -> list[str]:
    """Names of the nodes in topological order."""
    for name, node in graph.nodes.items():
        if (kind := type(node).__name__) not in _KNOWN:
            raise InputError(f"{name} is a {kind} node; supported are {', '.join(_KNOWN)}")
    sources = {name: [] for name in graph.nodes}
    for source, name in graph.edges:
        if source not in sources or name not in sources:
            raise InputError(f"an edge from {source} to {name} names a node that the graph does not have")
        sources[name].append(source)
    ends = {kind: [n for n, node in graph.nodes.items() if type(node).__name__ == kind] for kind in _KNOWN[:2]}
    if any(len(names) != 1 for names in ends.values()):
        raise InputError("the graph must have one Input node and one Output node")
    for name in graph.nodes:
        if not sources[name] and name not in ends["Input"]:
            raise InputError(f"{name} has no input: every node except Input needs an edge into it")
    try:
        order = list(graphlib.TopologicalSorter(sources).static_order())
    except graphlib.CycleError as error:
        raise InputError(f"the graph has a cycle ({' -> '.join(error.args[1])}); it must be acyclic") from error
    return order


def _arrays(name, node, dt) -> dict[str, np.ndarray]:
    """A node's parameters; neurons have their rate per step instead of tau."""
    kind = type(node).__name__
    arrays = {key: np.asarray(getattr(node, key)) for key in _ARRAYS.get(kind, ())}
    for key, x in arrays.items():
        if x.dtype.kind not in "fiu":
            raise InputError(f"{key} of {name} must be numbers, got {x.dtype}")
    arrays = {key: x if x.dtype.kind == "f" else x.astype(np.float32) for key, x in arrays.items()}
    # In the parameters' dtype, in which a tau of two steps was rounded like 2 * dt.
    if kind == "LIF":
        tau = arrays.pop("tau")
        if not (tau > 0).all():
            raise InputError(f"tau of {name} must be positive")
        arrays["rate"] = np.asarray(dt, tau.dtype) / tau
    elif kind == "IF":
        arrays["rate"] = np.asarray(dt, arrays["r"].dtype) * arrays.pop("r")
    return arrays


def _forward(graph, order, time_steps, strict) -> Callable:
    """A function of all parameters and an input [B, ...]: outputs [B, T, ...] and spikes of each layer."""
    kinds = {name: type(graph.nodes[name]).__name__ for name in order}
    sources = {name: [a for a, b in graph.edges if b == name] for name in order}
    windows = {name: _window(graph.nodes[name]) for name in order if kinds[name] == "Conv2d"}

    def forward(arrays, x):
        values, spikes = {}, {}
        for name in order:
            # Up to the first neurons one step stands for all, because the image is constant.
            y = x[:, None] if kinds[name] == "Input" else values[sources[name][0]]
            for source in sources[name][1:]:
                y = y + values[source]
            k = arrays[name]
            if kinds[name] in ("Affine", "Linear"):
                y = _affine(y, k["weight"]) + k.get("bias", 0)
            elif kinds[name] == "Conv2d":
                y = _conv(y, k["weight"], k["bias"], windows[name])
            elif kinds[name] == "Flatten":
                y = _flatten(y, graph.nodes[name])
            elif kinds[name] in ("LIF", "IF"):
                spikes[name] = _fire(y, k, time_steps, strict)
                y = spikes[name].astype(y.dtype)
            values[name] = y
        last = values[next(name for name in order if kinds[name] == "Output")]
        return jnp.broadcast_to(last, (last.shape[0], time_steps, *last.shape[2:])), spikes

    return forward


def _affine(x, weight):
    """x [B, T, *batch, in] by [*batch, out, in]."""
    if weight.ndim == 2:
        return x @ weight.T
    return jnp.matmul(weight, x[..., None])[..., 0]


def _flatten(x, node):
    """Merge the node's dimensions, which it counts without batch and time."""
    first, last = (int(n) % (x.ndim - 2) for n in (node.start_dim, node.end_dim))
    return x.reshape(*x.shape[: 2 + first], -1, *x.shape[3 + last :])


def _window(node):
    """Stride, padding, dilation and groups of a convolution, as Python numbers."""
    pairs = [tuple(int(n) for n in np.broadcast_to(x, 2)) for x in (node.stride, node.dilation)]
    padding = node.padding
    if isinstance(padding, str):
        padding = padding.upper()
    else:
        padding = tuple((int(n), int(n)) for n in np.broadcast_to(padding, 2))
    return pairs[0], padding, pairs[1], int(node.groups)


def _conv(x, weight, bias, window):
    stride, padding, dilation, groups = window
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]),
        weight.astype(x.dtype),
        stride,
        padding,
        rhs_dilation=dilation,
        feature_group_count=groups,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )
    return y.reshape(*x.shape[:2], *y.shape[1:]) + bias[:, None, None]


def _fire(x, k, time_steps, strict):
    """Whether each neuron fires at each step, [B, T, ...]."""
    x = jnp.broadcast_to(x, (x.shape[0], time_steps, *x.shape[2:]))
    v = jnp.broadcast_to(k["v_reset"].astype(x.dtype), x[:, 0].shape)
    fired = []
    for t in range(time_steps):
        step = k["rate"] * (k["v_leak"] - v + k["r"] * x[:, t]) if "v_leak" in k else k["rate"] * x[:, t]
        h = v + step
        s = h > k["v_threshold"] if strict else h >= k["v_threshold"]
        v = jnp.where(s, k["v_reset"], h).astype(x.dtype)
        fired.append(s)
    return jnp.stack(fired, 1)
