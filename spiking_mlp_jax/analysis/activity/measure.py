"""What a network does while it classifies images: everything about its spikes, and all of it in one pass.

    spikes.py         rasters of a few images, mean firing rates
    rates.py          rates by layer, step, channel, token and neuron; dead and saturated units
    intervals.py      spike counts, inter-spike intervals, regularity, bursts
    membrane.py       membrane potentials against the threshold
    information.py    accuracy after 1, ..., T steps
    similarity.py     how alike time steps represent the images

Each gives a function of a model in evaluation mode and normalised images, an array or batches of them. `measure` gives
all at the price of one pass.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from spiking_mlp_jax.analysis.activity import stream
from spiking_mlp_jax.analysis.activity.information import Information, answers, information, information_of
from spiking_mlp_jax.analysis.activity.intervals import Intervals, Trains, intervals, intervals_of
from spiking_mlp_jax.analysis.activity.membrane import (
    Membrane,
    Potentials,
    charge,
    equations,
    membrane,
    membrane_potentials,
)
from spiking_mlp_jax.analysis.activity.rates import (
    Counts,
    DeadAndSaturated,
    Rates,
    Units,
    check_thresholds,
    dead_and_saturated,
    rates,
    rates_of,
)
from spiking_mlp_jax.analysis.activity.rates import to_dict as rates_to_dict
from spiking_mlp_jax.analysis.activity.similarity import (
    Similarity,
    between_steps,
    image_features,
    linear_cka,
    rdm,
    rsa,
    similarity,
)
from spiking_mlp_jax.analysis.activity.spikes import SPIKES, firing_rates, in_network_order, rasters, spikes_of_first
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP

__all__ = [
    "SPIKES",
    "Activity",
    "DeadAndSaturated",
    "Information",
    "Intervals",
    "Membrane",
    "Rates",
    "Similarity",
    "Units",
    "between_steps",
    "charge",
    "dead_and_saturated",
    "equations",
    "firing_rates",
    "in_network_order",
    "information",
    "intervals",
    "linear_cka",
    "measure",
    "membrane",
    "membrane_potentials",
    "rasters",
    "rates",
    "rdm",
    "rsa",
    "similarity",
    "spikes_of_first",
]


@dataclasses.dataclass(frozen=True)
class Activity:
    """Everything that `measure` finds; by layer everywhere, in the network's order.

    Attributes:
        rates: firing rates.
        units: dead and saturated units.
        intervals: spike trains.
        membrane: membrane potentials.
        information: None without labels.
        similarity: between time steps; empty for fewer than 4 images.
        similarity_images: over how many images.
    """

    rates: Rates
    units: DeadAndSaturated
    intervals: dict[str, Intervals]
    membrane: Membrane
    information: Information | None
    similarity: dict[str, Similarity]
    similarity_images: int

    def to_dict(self) -> dict[str, Any]:
        """Everything but the rates of single neurons, as JSON values in which NaN stays.

        Returns:
            {"images", "time_steps", "dead", "saturated", "unseen", "silent_layers", "saturated_layers", "information",
            "similarity_images", "v_threshold", "v_rest", "potential_edges", "layers": {name: {...}}}.
        """
        by_rate = rates_to_dict(self.rates, self.units)
        layers = {
            name: {
                **found,
                "trains": self.intervals[name].to_dict(),
                "membrane": self.membrane.to_dict(name),
                "similarity": self.similarity[name].to_dict() if name in self.similarity else None,
            }
            for name, found in by_rate.items()
        }
        return {
            "images": self.rates.images,
            "time_steps": len(next(iter(self.rates.step.values()))),
            "dead": self.units.dead,
            "saturated": self.units.saturated,
            "unseen": self.units.unseen,
            "silent_layers": self.units.silent_layers,
            "saturated_layers": self.units.saturated_layers,
            "information": None if self.information is None else self.information.to_dict(),
            "similarity_images": self.similarity_images,
            "v_threshold": self.membrane.v_threshold,
            "v_rest": self.membrane.v_rest,
            "potential_edges": self.membrane.edges.tolist(),
            "layers": layers,
        }


def measure(
    model: SpikingMLP,
    images: stream.Images,
    labels: Int[np.ndarray, " N"] | None = None,
    *,
    labelled: bool = True,
    dead: float = 0.0,
    saturated: float = 1.0,
    similarity_images: int = 256,
    features: str = "channel",
    seed: int = 0,
    batch_size: int = stream.BATCH,
    progress: stream.Progress | None = None,
) -> Activity:
    """All measures of activity in one pass over the images.

    What is kept is a count for each neuron and step, histograms, and the rates of each channel for a few images.

    Args:
        model: in evaluation mode; it is not changed.
        images: normalised pixels: an array [N, H, W, C] or batches, as pairs (images, labels) or, with
            labelled=False, images alone. Batches may differ in size.
        labels: of an array of images, whole numbers.
        labelled: whether there are labels.
        dead, saturated: thresholds of `dead_and_saturated`.
        similarity_images: how many of the images, from the first on, `similarity` compares; 0 leaves it out.
        features: see `similarity`.
        seed: likewise.
        batch_size: images at a time.
        progress: called with the number of images done.

    Raises:
        InputError: wrong images, labels or thresholds, as the single functions say.
    """
    check_thresholds(dead, saturated)
    potentials = Potentials(model)
    sums = stream.run(
        model,
        images,
        {"counts": Counts(), "trains": Trains(), "membrane": potentials},
        labels=labels,
        logits_sums=answers if labelled else None,
        keep=image_features(features),
        keep_images=similarity_images,
        batch_size=batch_size,
        progress=progress,
    )
    found = rates_of(sums.layers["counts"], sums.images)
    kept = len(next(iter(sums.kept.values()), ()))
    return Activity(
        rates=found,
        units=dead_and_saturated(found, dead=dead, saturated=saturated),
        intervals=intervals_of(sums.layers["trains"]),
        membrane=potentials.result(sums.layers["membrane"]),
        information=information_of(sums.logits, sums.images) if labelled else None,
        similarity={name: between_steps(x, seed) for name, x in sums.kept.items()} if kept > 3 else {},
        similarity_images=kept,
    )
