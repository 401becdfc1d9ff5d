"""A trained network with test images in the form it takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from spiking_mlp_jax.data.damaged import Damaged, next_decodable
from spiking_mlp_jax.data.pipeline import network_batches
from spiking_mlp_jax.data.sources import Chosen, Source, open_source, spaced
from spiking_mlp_jax.data.transforms import fitted
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.pixels import Pixels, normalize


@dataclasses.dataclass(frozen=True)
class Samples:
    """Some images of a split.

    Attributes:
        decoded: as stored, of any sizes.
        raw: pixels as a deployed network takes them.
        normalised: the same as a trained network takes them, float32.
        labels: their classes.
        class_names: one per class.
    """

    decoded: list[UInt8[np.ndarray, "H W C"]]
    raw: UInt8[np.ndarray, "B H W C"]
    normalised: Float[np.ndarray, "B H W C"]
    labels: Int[np.ndarray, "B"]
    class_names: list[str]


def take(
    config: ModelConfig, data: dict[str, Any], count: int, *, split: str = "test", data_dir: str | None = None
) -> Samples:
    """Images spread evenly over a split, which is sorted by class.

    Args:
        config: of the network.
        data: "data" of the weights' metadata (`weights.load`): data set, resizing, mean, std.
        count: number of images; all of them if the split has fewer.
        split: "train" or "test".
        data_dir: folder of the data; None for the data in the package.

    Raises:
        InputError: count is below 1, or the data cannot be opened.

    Examples:
        >>> from spiking_mlp_jax.models import weights
        >>> model, meta = weights.load(weights.find("fashion_mnist"))
        >>> images = take(model.config, meta["data"], 4)
        >>> images.raw.shape, images.raw.dtype
        ((4, 32, 32, 1), dtype('uint8'))
        >>> [images.class_names[label] for label in images.labels]
        ['Ankle boot', 'Dress', 'Sneaker', 'Sandal']
    """
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    source = open_source(data["dataset"], split, data_dir)
    return decoded(source, spaced(len(source), count), config, data)


def decoded(source: Source, indices: Iterable[int], config: ModelConfig, data: dict[str, Any]) -> Samples:
    """Images of a source, resized and normalised; a corrupt one is replaced by the next that can be decoded.

    Args:
        source: the images.
        indices: which ones.
        config: of the network.
        data: as for `take`.
    """
    records = [next_decodable(source, i) for i in indices]
    raw = fitted((record["image"] for record in records), config, Pixels.from_data(data))
    labels = np.array([int(record["label"]) for record in records])
    normalised = np.asarray(normalize(raw, data["mean"], data["std"]))
    names = list(data.get("class_names", source.class_names))
    return Samples([record["image"] for record in records], raw, normalised, labels, names)


def drawn(source: Source, count: int, seed: int) -> Chosen:
    """Random images of a source, without replacement, in random order.

    Args:
        source: to draw from.
        count: number of images; all of them if the source has fewer.
        seed: of the draw.

    Raises:
        InputError: count is below 1.
    """
    if count < 1:
        raise InputError(f"the number of images must be at least 1, got {count}")
    # Sources are sorted by class: the first images would be of one class.
    return Chosen(source, np.random.default_rng(seed).permutation(len(source))[:count].tolist())


def labelled_batches(
    source: Source, config: ModelConfig, data: dict[str, Any], batch_size: int, damaged: Damaged | None = None
) -> Iterator[tuple[Float[np.ndarray, "B H W C"], Int[np.ndarray, " B"]]]:
    """Batches of normalised images with their labels, for `activity.stream.run`.

    Args:
        source: the images; corrupt ones are skipped.
        config: of the network.
        data: as for `take`.
        batch_size: images at a time.
        damaged: see `data.pipeline.eval_batches`.
    """
    for batch in network_batches(source, config, data, batch_size, damaged):
        real = batch["mask"]
        yield normalize(batch["image"][real], data["mean"], data["std"]), batch["label"][real]
