"""A trained network together with the dataset that it was trained on."""

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
    """A trained network that knows how images become its inputs.

    Attributes:
        model: the network, with its `pixels`.
        data: the same settings as in config.json: mean, std, resize_mode, eval_resize, class_names, dataset.
        folder: the weights folder; None for a network that is only in memory.
        meta: what else config.json holds.
    """

    model: SpikingMLP
    data: dict[str, Any]
    folder: Path | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def pixels(self) -> Pixels:
        """How images become inputs."""
        return Pixels.from_data(self.data)

    @property
    def name(self) -> str:
        """The weights folder, for messages."""
        return "the network" if self.folder is None else f"the network in {self.folder}"

    @property
    def max_bad_images(self) -> float:
        """The share of damaged images that its training run allowed."""
        return 0.0 if self.folder is None else weights.max_bad_images(self.folder)

    def source(self, split: str, dataset: str | None = None, data_dir: str | os.PathLike[str] | None = None) -> Source:
        """Opens a split of a dataset with as many classes as the network has.

        Args:
            split: "train" or "test".
            dataset: see `open_source`; None: the one that the network was trained on.
            data_dir: its folder; None: with its own dataset, where the training run found it.

        Raises:
            InputError: there is no such dataset, or it has another number of classes.
        """
        if dataset is None and data_dir is None and self.folder is not None:
            data_dir = weights.data_dir(self.folder)
        known: str = dataset or self.data["dataset"]
        return check_classes(open_source(known, split, data_dir), self.model.config.num_classes, self.name, known)

    def inputs(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Images of any size as uint8 [N, H, W, C] of the network's size."""
        return fitted(images, self.model.config, self.pixels)


def open_trained(network: str | os.PathLike[str] | SpikingMLP, dataset: str | None = None) -> Trained:
    """Opens a trained network, or takes one that is in memory.

    Args:
        network: a workdir, a weights folder, the name of a network in the package, or a `SpikingMLP` with `pixels`.
        dataset: what a `SpikingMLP` was trained on, which it does not know itself.

    Raises:
        InputError: there is no such network, its files are damaged, or it does not know how images become inputs.
    """
    if isinstance(network, SpikingMLP):
        pixels = network.pixels
        if pixels is None:
            raise InputError("the model has no pixels, which say how images become inputs: set model.pixels")
        names = list(pixels.class_names) or list(map(str, range(network.config.num_classes)))
        data = dataclasses.asdict(pixels) | {"class_names": names, "dataset": dataset or "folder"}
        return Trained(network, data | {"mean": list(pixels.mean), "std": list(pixels.std)})
    folder = weights.find(network)
    model, meta = weights.load(folder)
    if "data" not in meta:
        raise InputError(
            f'{folder / weights.CONFIG} has no "data", which says how images become inputs: save the weights again'
        )
    return Trained(model, meta["data"], folder, meta)
