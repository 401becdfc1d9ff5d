"""Trained networks to integer networks, in one call; and either to files."""

from __future__ import annotations

import os

import numpy as np

from spiking_mlp_jax.data.damaged import next_decodable
from spiking_mlp_jax.data.trained import Trained, open_trained
from spiking_mlp_jax.deploy import artifact
from spiking_mlp_jax.deploy.fold import fold
from spiking_mlp_jax.deploy.network import IntegerNet
from spiking_mlp_jax.deploy.quantize import quantize
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.utils.paths import user_path


def compile(
    network: SpikingMLP | Trained | str | os.PathLike[str],
    bits: int = 8,
    *,
    images: int = 512,
    dataset: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> IntegerNet:
    """Fold and quantize a trained network, calibrated on training images.

    Args:
        network: a `SpikingMLP` with `pixels`, a workdir, a weights folder, or the name of a network in the package.
        bits: per weight, 2 to 8.
        images: the number of calibration images; always the same ones.
        dataset: where they come from, see `data.sources.open_source`; None for the dataset the network was trained on,
            which a `SpikingMLP` that was not loaded does not know.
        data_dir: folder of the dataset; None where the package or the training run knows it.

    Returns:
        the integer network, proven not to overflow for any image. `save` writes it, `Engine` runs it.

    Raises:
        InputError: there is no such network or dataset, or the network cannot be folded or quantized.

    Examples:
        >>> compile("fashion_mnist", bits=4, images=8).description.bits
        4
    """
    trained = network if isinstance(network, Trained) else open_trained(network, dataset)
    source = trained.source("train", dataset, data_dir)
    folded = fold(trained.model)
    order = np.random.default_rng(0).permutation(len(source))[:images]
    pixels = trained.inputs(next_decodable(source, int(i))["image"] for i in order)
    return quantize(folded, pixels, bits, data=trained.data)


def save(network: IntegerNet | SpikingMLP, path: str | os.PathLike[str]) -> None:
    """Write a compiled network as a .smlp file, or a trained one as a weights folder.

    Args:
        network: from `compile` or `quantize`, or a `SpikingMLP`.
        path: of the file or folder, replaced if it exists.

    Raises:
        InputError: the file cannot be written, or the network is something else.

    References:
        `deploy.artifact` and `models.folder` describe the formats.
    """
    if isinstance(network, IntegerNet):
        artifact.save(network, user_path(path))
    elif isinstance(network, SpikingMLP):
        network.save(path)
    else:
        raise InputError(f"network is a {type(network).__name__}: give a compiled network or a SpikingMLP")
