"""Activity of a trained network on its test images: which images, and the figures and the file that come out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from spiking_mlp_jax.analysis.activity.maps import membrane_histograms, similarity_matrices, token_maps
from spiking_mlp_jax.analysis.activity.measure import Activity, spikes_of_first
from spiking_mlp_jax.analysis.activity.plots import accuracy_per_step, channel_rates, rates_by_step, spike_trains
from spiking_mlp_jax.analysis.plots import spike_raster, write
from spiking_mlp_jax.data.damaged import Damaged
from spiking_mlp_jax.data.pipeline import eval_batches
from spiking_mlp_jax.data.sources import Chosen, Source
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.train.logging import to_json
from spiking_mlp_jax.utils.storage import write_text


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


def figures(activity: Activity) -> dict[str, Figure]:
    """All figures of an activity by the name of their file; those that it has no data for are left out."""
    found = {
        "rates_by_step": rates_by_step(activity.rates),
        "token_maps": token_maps(activity.rates),
        "channel_rates": channel_rates(activity.rates, activity.units),
        "spike_trains": spike_trains(activity.intervals),
        "membrane": membrane_histograms(activity.membrane),
    }
    if activity.information is not None:
        found["accuracy_per_step"] = accuracy_per_step(activity.information)
    # A step is like itself: of one step there is nothing to show.
    if activity.similarity and len(next(iter(activity.similarity.values())).cka) > 1:
        found["similarity"] = similarity_matrices(activity.similarity)
    return found


def raster(model: SpikingMLP, source: Source, data: dict[str, Any], class_names: Sequence[str]) -> Figure:
    """The spikes of a source's first image that can be decoded, with its true and predicted class."""
    images, labels = next(labelled_batches(source, model.config, data, 1))
    logits, spikes = spikes_of_first(model, jnp.asarray(images))
    predicted = class_names[int(logits.mean(0)[0].argmax())]
    pixels = images[0] * np.asarray(data["std"]) + np.asarray(data["mean"])
    title = f"true: {class_names[int(labels[0])]}\npredicted: {predicted}"
    return spike_raster(np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8), spikes, title)


def save(folder: str | os.PathLike[str], drawn: dict[str, Figure], document: dict[str, Any]) -> list[Path]:
    """Writes figures as PNG files and, last, activity.json; each under a temporary name that is then renamed.

    Args:
        folder: made when missing.
        drawn: figures by name.
        document: JSON values; null takes the place of NaN.

    Returns:
        the files.

    Raises:
        InputError: they cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [write(figure, folder / f"{name}.png") for name, figure in drawn.items()]
        write_text(folder / "activity.json", to_json(document) + "\n")
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror or error}): give another folder") from error
    return [*paths, folder / "activity.json"]
