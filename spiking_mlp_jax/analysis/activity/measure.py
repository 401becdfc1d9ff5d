"""All measures of a network's activity in one pass, and accuracy and information by number of time steps.

    stream        passes over images; spike rasters
    rates         rates by layer, step, channel, token and neuron; dead and saturated units
    trains        spike counts, inter-spike intervals, regularity, bursts
    membrane      membrane potentials against the threshold
    similarity    how similarly time steps represent the images
    plots         figures

Each takes a model in evaluation mode and normalised images, an array or batches.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from spiking_mlp_jax.analysis.activity import stream
from spiking_mlp_jax.analysis.activity.membrane import Membrane, Potentials
from spiking_mlp_jax.analysis.activity.rates import (
    Counts,
    DeadAndSaturated,
    Rates,
    check_thresholds,
    dead_and_saturated,
    rates_of,
)
from spiking_mlp_jax.analysis.activity.rates import to_dict as rates_to_dict
from spiking_mlp_jax.analysis.activity.similarity import Similarity, between_steps, image_features
from spiking_mlp_jax.analysis.activity.trains import Intervals, Trains, intervals_of
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP, mean_logits
from spiking_mlp_jax.train.loss import image_cross_entropy
from spiking_mlp_jax.utils.settings import usual_settings


@dataclasses.dataclass(frozen=True)
class Information:
    """Quality of the prediction after each step, with logits averaged over the steps so far.

    Attributes:
        images: number of images.
        accuracy: [T], after 1, ..., T steps.
        loss: [T], mean cross-entropy after 1, ..., T steps, in nats.
        agreement: [T], share of images whose predicted class is that of all T steps.
        alone: [T], accuracy of the logits of one step; its neurons still have their state from the steps before.
        confusion: int64 [T, K, K], images by label (row) and predicted class (column) after 1, ..., T steps.
    """

    images: int
    accuracy: Float[np.ndarray, " T"]
    loss: Float[np.ndarray, " T"]
    agreement: Float[np.ndarray, " T"]
    alone: Float[np.ndarray, " T"]
    confusion: Int[np.ndarray, "T K K"]

    @property
    def errors(self) -> Float[np.ndarray, " T"]:
        """Binomial standard error of `accuracy`."""
        return np.sqrt(self.accuracy * (1 - self.accuracy) / self.images)

    @property
    def mutual_information(self) -> Float[np.ndarray, " T"]:
        """Mutual information of label and predicted class, in bits: the plug-in estimate less its bias, at least 0."""
        return np.maximum(self.plug_in_information - self.information_bias, 0)

    @property
    def plug_in_information(self) -> Float[np.ndarray, " T"]:
        """The estimate from frequencies, which is too high for few images."""
        return np.array([entropy(c.sum(1)) + entropy(c.sum(0)) - entropy(c) for c in self.confusion])

    @property
    def information_bias(self) -> Float[np.ndarray, " T"]:
        """Bias of the plug-in estimate to first order, in bits.

        (cells - labels - predictions + 1) / (2 N ln 2), counting those with images.

        References: Miller, "Note on the bias of information estimates", 1955; Panzeri, Treves, Network 7, 1996.
        """
        occupied = self.confusion > 0
        cells, rows, columns = occupied.sum((1, 2)), occupied.any(2).sum(1), occupied.any(1).sum(1)
        return (cells - rows - columns + 1) / (2 * self.images * np.log(2))

    @property
    def label_entropy(self) -> float:
        """Entropy of the labels in bits, the upper bound of the mutual information."""
        return entropy(self.confusion[0].sum(1))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        named = ("accuracy", "loss", "agreement", "alone", "mutual_information", "plug_in_information")
        found = {name: getattr(self, name).tolist() for name in (*named, "information_bias", "confusion")}
        return {"images": self.images, **found, "label_entropy": self.label_entropy}


def information(model: SpikingMLP, images: stream.Images, labels: Int[np.ndarray, " N"] | None = None) -> Information:
    """Accuracy, loss and agreement after 1, ..., T steps; arguments and errors as for `stream.run`."""
    sums = stream.run(model, images, {}, labels=labels, logits_sums=answers)
    return information_of(sums.logits, sums.images)


def information_of(sums: dict[str, np.ndarray], images: int) -> Information:
    """From the sums of `answers` over `images` images."""
    confusion = sums["confusion"]
    return Information(
        images,
        np.trace(confusion, axis1=1, axis2=2) / images,
        sums["loss"] / images,
        sums["agreement"] / images,
        sums["alone"] / images,
        confusion,
    )


def answers(logits, labels, mask):
    """Sums over a batch, for `stream.run`."""
    steps, _, classes = logits.shape
    # Averaged as in evaluation, so that the last step's predictions are the same bit for bit.
    predicted = jnp.stack([mean_logits(logits[: t + 1]).argmax(-1) for t in range(steps)])
    pairs = jnp.where(mask, labels * classes + predicted, classes**2)
    confusion = jnp.zeros((steps, classes**2 + 1), jnp.int32).at[jnp.arange(steps)[:, None], pairs].add(1)
    loss = jnp.stack([image_cross_entropy(logits[: t + 1], labels) for t in range(steps)])
    return {
        "confusion": confusion[:, :-1].reshape(steps, classes, classes),
        "loss": jnp.sum(jnp.where(mask, loss, 0), 1),
        "agreement": jnp.sum(mask & (predicted == predicted[-1]), 1, dtype=jnp.int32),
        "alone": jnp.sum(mask & (logits.argmax(-1) == labels), 1, dtype=jnp.int32),
    }


def entropy(counts: Int[np.ndarray, "..."]) -> float:
    """Entropy of a histogram, in bits."""
    share = counts[counts > 0] / counts.sum()
    return float(-np.sum(share * np.log2(share)))


@dataclasses.dataclass(frozen=True)
class Activity:
    """Results of `measure`, by layer in the network's order.

    Attributes:
        rates: firing rates.
        units: dead and saturated units.
        intervals: spike trains.
        membrane: membrane potentials.
        information: None without labels.
        similarity: between time steps; empty for fewer than 4 images.
        similarity_images: number of images that `similarity` is over.
    """

    rates: Rates
    units: DeadAndSaturated
    intervals: dict[str, Intervals]
    membrane: Membrane
    information: Information | None
    similarity: dict[str, Similarity]
    similarity_images: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, NaN included, without the rates of single neurons.

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


@usual_settings()
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
    """All measures in one pass over the images.

    Memory: a count per neuron and step, histograms, and the rates of each channel for some images.

    Args:
        model, images, labels, batch_size, progress: as for `stream.run`.
        labelled: whether there are labels.
        dead, saturated: thresholds of `dead_and_saturated`.
        similarity_images: how many of the first images `similarity` compares; 0 for none.
        features, seed: as for `similarity`.

    Raises:
        InputError: invalid images, labels or thresholds.
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
