"""Firing rates by layer, step, channel, token and neuron, and the units that never or always fire."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from spiking_mlp_jax.analysis.activity import stream
from spiking_mlp_jax.analysis.activity.stream import SPIKES
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.train.evaluate import silent_and_saturated


@dataclasses.dataclass(frozen=True)
class Rates:
    """Firing rates over a set of images, 0 to 1: spikes per neuron and time step, by layer in the network's order.

    Attributes:
        images: number of images.
        layer: mean over neurons and steps, as `train.evaluate` reports it.
        step: [T], mean over neurons.
        channel: [C], mean over tokens and steps.
        token: [H, W], mean over channels and steps: where in the image a layer fires.
        neuron: [H, W, C], mean over steps. Exactly 0 or 1 where a neuron never or always fired.
    """

    images: int
    layer: dict[str, float]
    step: dict[str, Float[np.ndarray, " T"]]
    channel: dict[str, Float[np.ndarray, " C"]]
    token: dict[str, Float[np.ndarray, "H W"]]
    neuron: dict[str, Float[np.ndarray, "H W C"]]


def rates(model: SpikingMLP, images: stream.Images) -> Rates:
    """Firing rates over images; arguments and errors as for `stream.run`."""
    sums = stream.run(model, images, {"counts": Counts()})
    return rates_of(sums.layers["counts"], sums.images)


class Counts(stream.Part):
    """Spike counts of each neuron at each step, [T, H, W, C]."""

    def observe(self, name, value, mask):
        """See `stream.Part`."""
        if not name.endswith(SPIKES):
            return None
        return jnp.sum(jnp.where(mask[:, None, None, None, None], value, 0), 0, dtype=jnp.int32)


def rates_of(counts: Mapping[str, Int[np.ndarray, "T H W C"]], images: int) -> Rates:
    """Firing rates from spike counts of each neuron and step, summed over `images` images."""

    def mean(count, axes):
        # Sums of integers, so that 0 and 1 are exact.
        return count.sum(axes) / (images * count.size / count.sum(axes).size)

    return Rates(
        images,
        {name: float(mean(count, (0, 1, 2, 3))) for name, count in counts.items()},
        {name: mean(count, (1, 2, 3)) for name, count in counts.items()},
        {name: mean(count, (0, 1, 2)) for name, count in counts.items()},
        {name: mean(count, (0, 3)) for name, count in counts.items()},
        {name: mean(count, (0,)) for name, count in counts.items()},
    )


@dataclasses.dataclass(frozen=True)
class Units:
    """Dead and saturated units of one layer.

    Attributes:
        dead_neurons: bool [H, W, C].
        saturated_neurons: bool [H, W, C].
        dead_channels: bool [C]: all the channel's neurons are dead.
        saturated_channels: bool [C], likewise.
    """

    dead_neurons: Bool[np.ndarray, "H W C"]
    saturated_neurons: Bool[np.ndarray, "H W C"]
    dead_channels: Bool[np.ndarray, " C"]
    saturated_channels: Bool[np.ndarray, " C"]

    def shares(self) -> dict[str, float]:
        """The share of each kind, 0 to 1, by the attribute's name."""
        return {field.name: float(getattr(self, field.name).mean()) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class DeadAndSaturated:
    """Units that carry no information over a set of images, and the layers that have any.

    Attributes:
        dead: a neuron is dead if its rate is at most this.
        saturated: a neuron is saturated if its rate is at least this.
        unseen: upper bound, with 95 % confidence, on the share of such images for which a neuron that never fired does
            fire (rule of three; Hanley and Lippman-Hand, JAMA 1983). For a neuron that fired at every step of every
            image, the bound on the share of images with a step without a spike.
        units: by layer, in the network's order.
        silent_layers: layers with a mean rate below 0.001, as `train.evaluate` reports them.
        saturated_layers: layers with a mean rate above 0.95, likewise.
    """

    dead: float
    saturated: float
    unseen: float
    units: dict[str, Units]
    silent_layers: list[str]
    saturated_layers: list[str]


def dead_and_saturated(rates: Rates, *, dead: float = 0.0, saturated: float = 1.0) -> DeadAndSaturated:
    """Neurons and channels that never or always fire.

    `train.evaluate.silent_and_saturated` judges layers by their mean rate: a layer that it calls healthy may have half
    of its neurons dead, and one below 0.1 % may have no dead neuron. The result has both.

    Args:
        rates: of any images.
        dead: highest rate of a dead neuron; 0 for those that never fired.
        saturated: lowest rate of a saturated neuron; 1 for those that fired at every step of every image.

    Raises:
        InputError: not 0 <= dead < saturated <= 1.
    """
    check_thresholds(dead, saturated)
    units = {}
    for name, rate in rates.neuron.items():
        low, high = rate <= dead, rate >= saturated
        units[name] = Units(low, high, np.all(low, (0, 1)), np.all(high, (0, 1)))
    silent, full = silent_and_saturated(rates.layer)
    return DeadAndSaturated(dead, saturated, min(1.0, 3 / rates.images), units, silent, full)


def check_thresholds(dead: float, saturated: float) -> None:
    """Raises InputError unless 0 <= dead < saturated <= 1."""
    if not 0 <= dead < saturated <= 1:
        raise InputError(f"dead ({dead}) and saturated ({saturated}) must be rates with 0 <= dead < saturated <= 1")


def to_dict(rates: Rates, found: DeadAndSaturated) -> dict[str, dict[str, Any]]:
    """By layer, rates and shares of dead and saturated units as JSON values, without the rates of single neurons."""
    return {
        name: {
            "rate": rates.layer[name],
            "rate_per_step": rates.step[name].tolist(),
            "rate_per_channel": rates.channel[name].tolist(),
            "rate_per_token": rates.token[name].tolist(),
            **found.units[name].shares(),
        }
        for name in rates.layer
    }
