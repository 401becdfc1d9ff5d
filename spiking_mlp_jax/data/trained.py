"""A trained network with its preprocessing and its dataset."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from spiking_mlp_jax.data.sources import Source, check_classes, open_source
from spiking_mlp_jax.data.transforms import fitted
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.pixels import Pixels
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network with its preprocessing.

    Attributes:
        model: the network, with its `pixels`.
        data: as in config.json: mean, std, resize_mode, eval_resize, class_names, dataset.
        folder: the weights folder; None for a network that was never in one.
        meta: the other keys of config.json.
    """

    model: SpikingMLP
    data: dict[str, Any]
    folder: Path | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def pixels(self) -> Pixels:
        """The preprocessing."""
        return Pixels.from_data(self.data)

    @property
    def name(self) -> str:
        """The network's name in messages."""
        return "the network" if self.folder is None else f"the network in {self.folder}"

    @property
    def max_bad_images(self) -> float:
        """The share of corrupt images that the training run allowed."""
        return 0.0 if self.folder is None else weights.max_bad_images(self.folder)

    def source(self, split: str, dataset: str | None = None, data_dir: str | os.PathLike[str] | None = None) -> Source:
        """A split of a dataset that has the network's number of classes.

        Args:
            split: "train" or "test".
            dataset: see `open_source`; None: the dataset of the training run.
            data_dir: its folder; None, with `dataset` None: that of the training run.

        Raises:
            InputError: there is no such dataset, or its number of classes differs.
        """
        if dataset is None and "data" not in self.meta:
            raise InputError("the network does not know what it was trained on: give dataset")
        if dataset is None and data_dir is None and self.folder is not None:
            data_dir = weights.data_dir(self.folder)
        known: str = dataset or self.data["dataset"]
        return check_classes(open_source(known, split, data_dir), self.model.config.num_classes, self.name, known)

    def inputs(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Images of any size, resized for the network: uint8 [N, H, W, C]."""
        return fitted(images, self.model.config, self.pixels)


def open_trained(network: str | os.PathLike[str] | SpikingMLP, dataset: str | None = None) -> Trained:
    """A trained network, from a folder or in memory.

    Args:
        network: a workdir, a weights folder, the name of a network in the package, or a `SpikingMLP` with `pixels`.
        dataset: its name; None: as the network's metadata says.

    Raises:
        InputError: there is no such network, its files are corrupt, or it has no preprocessing.
    """
    if isinstance(network, SpikingMLP):
        pixels = network.pixels
        if pixels is None:
            raise InputError("the model has no pixels (preprocessing): set model.pixels")
        saved = (network.meta or {}).get("data", {}).get("dataset")
        data = pixels.to_data(network.config.num_classes, dataset or saved or "folder")
        return Trained(
            network, data, None if network.loaded_from is None else Path(network.loaded_from), network.meta or {}
        )
    folder = weights.find(network)
    model, meta = weights.load(folder)
    if "data" not in meta:
        raise InputError(f'{folder / weights.CONFIG} has no "data" (preprocessing): save the weights again')
    return Trained(model, meta["data"], folder, meta)
