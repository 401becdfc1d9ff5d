"""Membrane potentials, and how far they are from the threshold.

The intermediates named ".potential" are what a layer of neurons *receives*. The membrane potential h[t], charged and
not yet reset, follows from it by the equations in `nn/dynamics.py`; a neuron fires where h[t] >= v_threshold.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spiking_mlp_jax.analysis.activity import stream
from spiking_mlp_jax.analysis.activity.stream import POTENTIAL, SPIKES, observed
from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.models.topology import neurons
from spiking_mlp_jax.nn import dynamics, layers
from spiking_mlp_jax.nn.dynamics import Constants, Mode
from spiking_mlp_jax.nn.neuron import potential_dtype

MAX_BINS = 10_000


def membrane_potentials(
    model: SpikingMLP, images: Float[Array, "B H W C"]
) -> dict[str, Float[np.ndarray, "B T H W C"]]:
    """The membrane potential h of every neuron at every step, before it fires, for a few images.

    Args:
        model: in evaluation mode; it is not changed.
        images: normalised pixels; the result needs four bytes per neuron, step and image.

    Returns:
        by layer of spikes, in the network's order; at least float32. Neurons fire where h - v_threshold >= 0.

    Raises:
        InputError: the model is in training mode, or the images have a wrong shape.
    """
    if not model.norm.use_running_average:
        raise InputError("the model is in training mode, where its norms follow the batch: call model.eval() first")
    _, received = observed(model, images, lambda name, x: x if name.endswith(POTENTIAL) else None)
    layers = [name.removesuffix(POTENTIAL) + SPIKES for name in received]
    inputs = list(received.values())
    of = [equations(model, layer, potential_dtype(x.dtype)) for layer, x in zip(layers, inputs, strict=True)]
    modes = [mode for mode, _ in of]

    @jax.jit
    def charges(inputs, constants):
        return [charge(x, m, k, model.config.time_steps) for x, m, k in zip(inputs, modes, constants, strict=True)]

    return dict(zip(layers, map(np.asarray, charges(inputs, [k for _, k in of])), strict=True))


def equations(model: SpikingMLP, layer: str, dtype: Any = jnp.float32) -> tuple[Mode, Constants]:
    """Equations and constants of a layer's neurons, including the learned time constant of "plif".

    Args:
        model: the network.
        layer: a layer of spikes ("stage0.block1.token.height.spikes").
        dtype: of the potentials.

    Raises:
        InputError: the network has no such layer.
    """
    rows = {f"{row.name}{SPIKES}": row for row in neurons(model.config)}
    if layer not in rows:
        raise InputError(f'the network has no layer of spikes "{layer}": {nearest(layer, rows)}')
    neuron: Any = model
    for part in rows[layer].path:
        neuron = neuron[part] if isinstance(part, int) else getattr(neuron, part)
    mode, k = layers.equations(neuron, dtype)
    block = re.search(r"\.block(\d+)\.", layer)
    # The blocks of a stage are stacked, and so are their neurons' parameters.
    return mode, k._replace(tau=k.tau[int(block[1])]) if block and k.tau.ndim else k


def charge(x: Float[Array, "B T *shape"], mode: Mode, k: Constants, time_steps: int) -> Float[Array, "B T *shape"]:
    """Membrane potentials h of neurons at rest before the first step, before each step's spike is reset.

    Args:
        x: what the neurons receive; a time axis of length 1 means T equal steps.
        mode: their equations.
        k: their constants.
        time_steps: T.

    Returns:
        [B, T, *shape], at least float32.
    """
    wide = jnp.broadcast_to(x, (x.shape[0], time_steps, *x.shape[2:])).astype(potential_dtype(x.dtype))
    k = Constants(*(jnp.asarray(value, wide.dtype) for value in k))
    rest = jnp.broadcast_to(k.v_reset, (wide.shape[0], *wide.shape[2:]))
    return dynamics.charged(mode, 1, k, wide, rest)


@dataclasses.dataclass(frozen=True)
class Membrane:
    """Histograms of membrane potentials.

    Attributes:
        edges: [bins + 1], in units of the potential. The threshold is one of them. The first and the last bin also
            count what lies beyond.
        v_threshold: where neurons fire.
        v_rest: where they start, and the reset value of a hard reset.
        counts: by layer in the network's order, int64 [T, bins], neurons and images together.
        mismatches: by layer, how often h >= v_threshold differs from the spike the network sent; 0 everywhere means
            that these are the potentials that it fired by.
    """

    edges: Float[np.ndarray, " bins1"]
    v_threshold: float
    v_rest: float
    counts: dict[str, Int[np.ndarray, "T bins"]]
    mismatches: dict[str, int]

    def above(self, layer: str) -> Float[np.ndarray, " T"]:
        """Share of a layer's potentials at or above the threshold, [T]: its firing rate at each step."""
        first = int(np.argmin(np.abs(self.edges - self.v_threshold)))
        return self.counts[layer][:, first:].sum(1) / self.counts[layer].sum(1)

    def near(self, layer: str, share: float = 0.1) -> float:
        """Share of a layer's potentials, all steps together, that are less than `share` of the way from rest to
        threshold away from the threshold, in whole bins."""
        reach = share * (self.v_threshold - self.v_rest)
        centres = (self.edges[1:] + self.edges[:-1]) / 2
        counts = self.counts[layer].sum(0)
        return float(counts[np.abs(centres - self.v_threshold) < reach].sum() / counts.sum())

    def to_dict(self, layer: str) -> dict[str, Any]:
        """A layer's histogram as JSON values; the edges are the same for all."""
        return {
            "counts": self.counts[layer].tolist(),
            "near_threshold": self.near(layer),
            "mismatches": self.mismatches[layer],
        }


class Potentials(stream.Part):
    """Histograms of the membrane potentials of each layer, summed over images.

    Args:
        model: the network.
        width: of a bin, in units of the distance from rest to threshold, as are the next two.
        below: how far the bins reach below the threshold.
        above: how far they reach above it.

    Raises:
        InputError: impossible bins.
    """

    def __init__(self, model: SpikingMLP, width: float = 0.05, below: float = 4.0, above: float = 2.0):
        if not (width > 0 and below > 0 and above > 0 and (below + above) / width <= MAX_BINS):
            raise InputError(
                f"width {width}, below {below} and above {above} make no histogram: all must be positive, with at most "
                f"{MAX_BINS} bins"
            )
        self._model, c = model, model.config
        self._threshold, self._rest = c.v_threshold, c.v_reset or 0.0
        self._width = width * (self._threshold - self._rest)
        self._below, self._above = round(below / width), round(above / width)
        self._received: tuple[str, Array] | None = None

    def observe(self, name, value, mask):
        """See `stream.Part`."""
        if name.endswith(POTENTIAL):
            self._received = name.removesuffix(POTENTIAL), value
            return None
        assert self._received is not None and self._received[0] + SPIKES == name, name
        (_, x), self._received = self._received, None
        if self._model.config.neuron == "plif":
            # Inside the scan over blocks the block, and so its time constant, is unknown until `finish`.
            return x, value, mask
        # All blocks have the same constants.
        return self._sums(x, value, mask, equations(self._model, name.replace("*", "0"), potential_dtype(x.dtype)))

    def finish(self, name, found):
        """See `stream.Part`."""
        if not isinstance(found, tuple):
            return found
        x, spikes, mask = found
        return self._sums(x, spikes, mask, equations(self._model, name, potential_dtype(x.dtype)))

    def _sums(self, x, spikes, mask, of):
        mode, k = of
        steps, bins = self._model.config.time_steps, self._below + self._above
        h = charge(x, mode, k, steps)
        counted = jnp.broadcast_to(mask[:, None, None, None, None], h.shape)
        # Relative to the threshold, so that the bins above it hold exactly the potentials that fire.
        over = h - k.v_threshold.astype(h.dtype)
        index = jnp.clip(jnp.floor(over / self._width) + self._below, 0, bins - 1).astype(jnp.int32)
        index = index + bins * jnp.arange(steps, dtype=jnp.int32)[:, None, None, None]
        # Padding gets a bin of its own.
        index = jnp.where(counted, index, bins * steps)
        counts = jnp.zeros(bins * steps + 1, jnp.int32).at[index.reshape(-1)].add(1)
        return {
            "counts": counts[:-1].reshape(steps, bins),
            "mismatches": jnp.sum(counted & ((over >= 0) != (spikes > 0)), dtype=jnp.int32),
        }

    def result(self, sums: dict[str, Any]) -> Membrane:
        """The histograms, from the sums over all images."""
        return Membrane(
            self._threshold + self._width * np.arange(-self._below, self._above + 1),
            self._threshold,
            self._rest,
            {name: found["counts"] for name, found in sums.items()},
            {name: int(found["mismatches"]) for name, found in sums.items()},
        )
