"""Save and load trained networks as weights folders; `models/folder.py` describes their files."""

from __future__ import annotations

import os
from typing import Any

from spiking_mlp_jax.models import folder as files
from spiking_mlp_jax.models.folder import (
    CARD,
    CONFIG,
    FILES,
    OLD_TENSORS,
    PRETRAINED,
    TENSORS,
    data_dir,
    find,
    max_bad_images,
    pretrained_names,
    pretrained_path,
    read_config,
    save,
    tensors_file,
)
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP

__all__ = [
    "CARD",
    "CONFIG",
    "FILES",
    "OLD_TENSORS",
    "PRETRAINED",
    "TENSORS",
    "data_dir",
    "find",
    "load",
    "max_bad_images",
    "pretrained_names",
    "pretrained_path",
    "read_config",
    "save",
    "tensors_file",
]


def load(path: str | os.PathLike[str]) -> tuple[SpikingMLP, dict[str, Any]]:
    """Read a weights folder.

    Args:
        path: a folder that `save` wrote.

    Returns:
        model: in evaluation mode, bit for bit as saved if float32; without x64, float64 is rounded to float32.

        meta: as given to `save`, with lists in place of tuples; also the model's `.meta`.

    Raises:
        InputError: a missing folder or file, or one that is damaged or does not fit; the message names the file and
            the field or tensor.

    Examples:
        >>> model, meta = load(find("fashion_mnist"))
        >>> model.config.depths, meta["data"]["class_names"][:2]
        ((1, 2), ['T-shirt/top', 'Trouser'])
    """
    model = files.load(SpikingMLP, path)
    return model, model.meta or {}
