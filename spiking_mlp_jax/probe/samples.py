"""A few images of a data set, as a network gets them: what notebooks and figures look at."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from spiking_mlp_jax.config import ModelConfig
from spiking_mlp_jax.data.damaged import next_decodable
from spiking_mlp_jax.data.normalize import normalize
from spiking_mlp_jax.data.pipeline import fit_image
from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Samples:
    """Some images of a split.

    Attributes:
        raw: pixels as the deployed network takes them.
        normalised: the same as the trained network takes them, float32.
        labels: their classes.
        class_names: one for each class.
    """

    raw: UInt8[np.ndarray, "B H W C"]
    normalised: Float[np.ndarray, "B H W C"]
    labels: Int[np.ndarray, "B"]
    class_names: list[str]


def take(
    config: ModelConfig, data: dict[str, Any], count: int, *, split: str = "test", data_dir: str | None = None
) -> Samples:
    """Images spread evenly over a split, so that they are neither the best nor the worst, nor all of one class.

    Args:
        config: of the network.
        data: "data" of a weights folder's meta (`weights.load`), which says how pictures become pixels.
        count: how many; all of them where the split has fewer.
        split: "train" or "test".
        data_dir: folder of the data; None for data inside the package.

    Raises:
        InputError: no images are wanted, or there is no such data.

    Examples:
        >>> from spiking_mlp_jax import weights
        >>> model, meta = weights.load(weights.find("fashion_mnist"))
        >>> images = take(model.config, meta["data"], 4)
        >>> images.raw.shape, images.raw.dtype
        ((4, 32, 32, 1), dtype('uint8'))
        >>> [images.class_names[label] for label in images.labels]
        ['Ankle boot', 'Dress', 'Sneaker', 'Sandal']
    """
    if count < 1:
        raise InputError(f"at least one image is taken, but count is {count}")
    source = open_source(data["dataset"], split, data_dir)
    chosen = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
    records = [next_decodable(source, int(i)) for i in chosen]
    fitting = config.image_size, config.in_channels, data["resize_mode"], data["eval_resize"]
    raw = np.stack([fit_image(record["image"], *fitting) for record in records])
    labels = np.array([int(record["label"]) for record in records])
    return Samples(raw, np.asarray(normalize(raw, data["mean"], data["std"])), labels, list(data["class_names"]))
