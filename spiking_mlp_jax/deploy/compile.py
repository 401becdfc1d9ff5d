"""From a folder of trained weights to an integer network, in one call."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from spiking_mlp_jax.data.damaged import next_decodable
from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.data.transforms import fit_image
from spiking_mlp_jax.deploy.fold import fold
from spiking_mlp_jax.deploy.network import IntegerNet
from spiking_mlp_jax.deploy.quantize import quantize
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights


def compile_weights(
    folder: Path, bits: int = 8, *, images: int = 512, dataset: str | None = None, data_dir: str | None = None
) -> IntegerNet:
    """Folds and quantises trained weights, with training images of their own data for calibration.

    Args:
        folder: a weights folder.
        bits: of each weight, 2 to 8.
        images: how many training images are looked at; the same ones each time.
        dataset: data to take them from; None for what the network was trained on.
        data_dir: their folder; None for the workdir's, or for data inside the package.

    Raises:
        InputError: weights without "data", or that cannot be folded or quantised; no such data.
    """
    model, meta = weights.load(folder)
    if "data" not in meta:
        raise InputError(f'{folder / weights.CONFIG} has no "data", which says how images become inputs: save it again')
    data, config = meta["data"], model.config
    folded = fold(model)
    if data_dir is None and dataset is None:
        data_dir = weights.data_dir(folder)
    source = open_source(dataset or data["dataset"], "train", data_dir)
    order = np.random.default_rng(0).permutation(len(source))[:images]
    fitting = config.image_size, config.in_channels, data["resize_mode"], data["eval_resize"]
    pixels = np.stack([fit_image(next_decodable(source, int(i))["image"], *fitting) for i in order])
    return quantize(folded, pixels, bits, data=data)
