"""What each further time step buys: accuracy, loss, agreement with the final answer, mutual information."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from spiking_mlp_jax.analysis.activity import stream
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.train.loss import class_scores, image_cross_entropy


@dataclasses.dataclass(frozen=True)
class Information:
    """How good the answer is after each step, with the logits averaged over the steps so far.

    Attributes:
        images: how many.
        accuracy: [T], share of images classified correctly after 1, ..., T steps.
        loss: [T], mean cross-entropy after so many steps, nats.
        agreement: [T], share of images whose class is already that of all T steps.
        alone: [T], accuracy by one step's own logits. Its neurons remember the steps before, its answer does not.
        confusion: int64 [T, K, K], images by label (row) and class predicted after so many steps (column).
    """

    images: int
    accuracy: Float[np.ndarray, " T"]
    loss: Float[np.ndarray, " T"]
    agreement: Float[np.ndarray, " T"]
    alone: Float[np.ndarray, " T"]
    confusion: Int[np.ndarray, "T K K"]

    @property
    def errors(self) -> Float[np.ndarray, " T"]:
        """Standard error of `accuracy`, binomial: for a rate estimated from so many images."""
        return np.sqrt(self.accuracy * (1 - self.accuracy) / self.images)

    @property
    def mutual_information(self) -> Float[np.ndarray, " T"]:
        """Information between label and predicted class in bits, after so many steps, corrected for its bias.

        The plug-in estimate less `information_bias`; not below 0.
        """
        return np.maximum(self.plug_in_information - self.information_bias, 0)

    @property
    def plug_in_information(self) -> Float[np.ndarray, " T"]:
        """The same with frequencies in the place of probabilities, which is too high for few images."""
        return np.array([entropy(c.sum(1)) + entropy(c.sum(0)) - entropy(c) for c in self.confusion])

    @property
    def information_bias(self) -> Float[np.ndarray, " T"]:
        """By how much the plug-in estimate is too high, to first order, in bits.

        (cells - labels - predictions + 1) / (2 N ln 2), each counted where there are images.

        References: Miller, "Note on the bias of information estimates", 1955; Panzeri, Treves, Network 7, 1996.
        """
        occupied = self.confusion > 0
        cells, rows, columns = occupied.sum((1, 2)), occupied.any(2).sum(1), occupied.any(1).sum(1)
        return (cells - rows - columns + 1) / (2 * self.images * np.log(2))

    @property
    def label_entropy(self) -> float:
        """Entropy of the labels in bits, the most that a prediction can tell."""
        return entropy(self.confusion[0].sum(1))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        named = ("accuracy", "loss", "agreement", "alone", "mutual_information", "plug_in_information")
        found = {name: getattr(self, name).tolist() for name in (*named, "information_bias", "confusion")}
        return {"images": self.images, **found, "label_entropy": self.label_entropy}


def information(
    model: SpikingMLP,
    images: stream.Images,
    labels: Int[np.ndarray, " N"] | None = None,
    *,
    batch_size: int = stream.BATCH,
    progress: stream.Progress | None = None,
) -> Information:
    """Accuracy, loss and agreement after 1, ..., T steps.

    Args:
        model: in evaluation mode; it is not changed.
        images: normalised pixels: an array [N, H, W, C], or batches as pairs (images, labels), which may differ in
            size.
        labels: of an array of images, whole numbers.
        batch_size: images at a time.
        progress: called with the number of images done.

    Raises:
        InputError: as for `stream.run`.
    """
    sums = stream.run(model, images, {}, labels=labels, logits_sums=answers, batch_size=batch_size, progress=progress)
    return information_of(sums.logits, sums.images)


def information_of(sums: dict[str, np.ndarray], images: int) -> Information:
    """From the sums of `answers` over so many images."""
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
    """Sums over a batch's images for `stream.run`."""
    steps, _, classes = logits.shape
    # As evaluation averages them, so that the last step's answers are the same bit for bit.
    predicted = jnp.stack([class_scores(logits[: t + 1]).argmax(-1) for t in range(steps)])
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
    """Entropy of the frequencies that counts stand for, in bits."""
    share = counts[counts > 0] / counts.sum()
    return float(-np.sum(share * np.log2(share)))
