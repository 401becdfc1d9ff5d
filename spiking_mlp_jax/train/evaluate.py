"""Exact evaluation: accuracy, per class and confusion matrix, and how much each layer fires."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from spiking_mlp_jax.data.damaged import Damaged
from spiking_mlp_jax.data.pipeline import eval_batches
from spiking_mlp_jax.data.sources import Source
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.train.sharding import make_mesh, put_batch, replicated
from spiking_mlp_jax.train.step import make_eval_step

SILENT, SATURATED = 0.001, 0.95


def silent_and_saturated(rates: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Picks out the layers that carry next to no information.

    Args:
        rates: mean firing rate of each layer, spikes per neuron and time step, 0 to 1.

    Returns:
        silent: names of the layers below 0.001 (0.1 %).

        saturated: names of the layers above 0.95 (95 %). Both in the order given.

    Examples:
        >>> silent_and_saturated({"a": 0.0, "b": 0.2, "c": 0.99})
        (['a'], ['c'])
    """
    silent = [name for name, rate in rates.items() if rate < SILENT]
    saturated = [name for name, rate in rates.items() if rate > SATURATED]
    return silent, saturated


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result over a whole set of images.

    Attributes:
        images: how many.
        loss: mean cross-entropy of the time-mean logits, in nats.
        confusion: int64 [K, K], images by label (row) and predicted class (column).
        firing_rates: mean over images, time and neurons, for each layer of spikes.
    """

    images: int
    loss: float
    confusion: np.ndarray
    firing_rates: dict[str, float]

    @property
    def accuracy(self) -> float:
        """Share of images whose class was predicted, in [0, 1]."""
        return int(np.trace(self.confusion)) / self.images

    @property
    def class_accuracy(self) -> list[float | None]:
        """The same for the images of each class [K]; None for a class without images."""
        totals = self.confusion.sum(1).tolist()
        hits = np.diagonal(self.confusion).tolist()
        return [hit / total if total else None for hit, total in zip(hits, totals, strict=True)]

    def unhealthy_layers(self) -> list[str]:
        """A sentence for each layer that is silent (< 0.1 %) or saturated (> 95 %)."""
        rates = self.firing_rates
        silent, saturated = silent_and_saturated(rates)
        found = [f"{name} is silent: it fires at {100 * rates[name]:.3f} %" for name in silent]
        return found + [f"{name} is saturated: it fires at {100 * rates[name]:.1f} %" for name in saturated]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "images": self.images,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "class_accuracy": self.class_accuracy,
            "confusion": self.confusion.tolist(),
            "firing_rates": self.firing_rates,
        }


def evaluate(
    eval_step: Callable[..., dict[str, Any]],
    params: Any,
    stats: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
) -> Evaluation:
    """Evaluates a network on every image of some batches.

    Args:
        eval_step: from `make_eval_step`.
        params: parameters, on the mesh.
        stats: running averages, on the mesh.
        batches: {"image", "label", "mask"}, this process's share; masked images do not count.
        mesh: the devices.

    Raises:
        InputError: there are no images.
    """
    # Sums are fetched one batch late, so that the devices never wait for the host.
    total: dict[str, Any] = {}
    pending = None
    for batch in batches:
        sums = eval_step(params, stats, put_batch(batch, mesh))
        if pending is not None:
            total = _add(total, pending)
        pending = sums
    if pending is None:
        raise InputError("there are no images to evaluate: give a split that has some")
    total = _add(total, pending)
    images = int(total["confusion"].sum())
    rates = {name: float(value) / images for name, value in total["rates"].items()}
    return Evaluation(images, float(total["loss"]) / images, total["confusion"], rates)


def evaluate_model(
    model: SpikingMLP, batches: Iterable[dict[str, np.ndarray]], mean: Sequence[float], std: Sequence[float]
) -> Evaluation:
    """Evaluates a model on one device.

    Args:
        model: the network; it is not changed.
        batches: as for `evaluate`.
        mean: of the pixels in [0, 1], per channel.
        std: likewise.
    """
    mesh = make_mesh(jax.devices()[:1])
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, stats = jax.device_put((params, stats), replicated(mesh))
    return evaluate(make_eval_step(graphdef, mean, std, mesh), params, stats, batches, mesh)


def evaluate_source(
    model: SpikingMLP,
    source: Source,
    data: Mapping[str, Any],
    *,
    batch_size: int,
    max_bad_images: float = 0.0,
    shown: Callable[[Iterable[dict[str, np.ndarray]], int], Iterable[dict[str, np.ndarray]]] | None = None,
) -> Evaluation:
    """Evaluates a model on all images of a source, on one device.

    Args:
        model: the network; it is not changed.
        source: the images. Those that cannot be decoded are left out and told on stderr.
        data: "data" of a weights folder's meta, which says how pictures become inputs.
        batch_size: images at a time.
        max_bad_images: the share of images that may be left out, 0 to 1.
        shown: function of the batches and their number to the same batches, which shows how far it is.

    Raises:
        InputError: there are no images, or too many that cannot be decoded.
    """
    batches = eval_batches(
        source,
        batch_size=batch_size,
        image_size=model.config.image_size,
        in_channels=model.config.in_channels,
        resize_mode=data["resize_mode"],
        eval_resize=data["eval_resize"],
        damaged=Damaged(source, max_bad_images, lambda text: print(text, file=sys.stderr)),
    )
    if shown is not None:
        batches = shown(batches, -(-len(source) // batch_size))
    return evaluate_model(model, batches, data["mean"], data["std"])


def _add(total, sums):
    # 64 bits on the host: the sums stay exact however many images there are.
    wide = jax.tree.map(lambda x: x.astype(f"{x.dtype.kind}8"), jax.device_get(sums))
    return jax.tree.map(np.add, total, wide) if total else wide
