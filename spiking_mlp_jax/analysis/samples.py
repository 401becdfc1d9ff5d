"""A few images of a data set, as a network gets them: what notebooks and figures look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float, Int, UInt8

from spiking_mlp_jax.data.damaged import Damaged, next_decodable
from spiking_mlp_jax.data.pipeline import eval_batches, fit_image
from spiking_mlp_jax.data.sources import Chosen, Source, open_source
from spiking_mlp_jax.data.trained import open_trained
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP


def open_test_images(
    where: str, dataset: str | None = None, data_dir: str | None = None
) -> tuple[Path, SpikingMLP, dict[str, Any], Source]:
    """A trained network and the images to look at it with.

    Args:
        where: a training run's workdir, a weights folder, or the name of a shipped network.
        dataset: other test images than those of the data set that it was trained on.
        data_dir: their folder; None: the one that the workdir names, if they are the same data set's.

    Returns:
        the weights folder, the network in evaluation mode, its "data" (how pictures become inputs), and the test split.

    Raises:
        InputError: there is no such network, its weights are not all finite, or the data cannot be opened.
    """
    trained = open_trained(where)
    folder, model = trained.folder, trained.model
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if not np.all(np.isfinite(np.asarray(variable[...]))):
            name = ".".join(map(str, path))
            raise InputError(
                f"{name} in {folder} has values that are not finite: the training diverged or the file was changed"
            )
    assert folder is not None
    return folder, model, trained.data, trained.source("test", dataset, data_dir)


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
        >>> from spiking_mlp_jax.models import weights
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


def drawn(source: Source, count: int, seed: int) -> Chosen:
    """Some images of a source, drawn at random without repetition, in random order.

    Args:
        source: where they come from.
        count: how many; all of them if there are not so many.
        seed: of the draw.

    Raises:
        InputError: none are wanted.
    """
    if count < 1:
        raise InputError(f"the number of images is {count}, but must be at least 1")
    # Sources are sorted by class: the first ones would be of one kind.
    return Chosen(source, np.random.default_rng(seed).permutation(len(source))[:count].tolist())


def labelled_batches(
    source: Source, config: ModelConfig, data: dict[str, Any], batch_size: int, damaged: Damaged | None = None
) -> Iterator[tuple[Float[np.ndarray, "B H W C"], Int[np.ndarray, " B"]]]:
    """Normalised images with their labels, as the functions of `probe.activity` take them.

    Args:
        source: the images; damaged ones are left out.
        config: of the network.
        data: how pixels become inputs: "data" of a weights folder.
        batch_size: images at a time.
        damaged: see `eval_batches`.
    """
    for batch in eval_batches(
        source,
        batch_size=batch_size,
        image_size=config.image_size,
        in_channels=config.in_channels,
        resize_mode=data["resize_mode"],
        eval_resize=data["eval_resize"],
        damaged=damaged,
    ):
        real = batch["mask"]
        yield normalize(batch["image"][real], data["mean"], data["std"]), batch["label"][real]
