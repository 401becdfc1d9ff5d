"""Save and load trained networks as weights folders; `models/folder.py` describes their files."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import numpy as np
from safetensors.numpy import save as to_bytes

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import folder as files
from spiking_mlp_jax.models.folder import (
    CARD,
    CONFIG,
    FILES,
    FORMAT,
    OLD_TENSORS,
    PRETRAINED,
    TENSORS,
    check_data,
    data_dir,
    find,
    max_bad_images,
    pretrained_names,
    pretrained_path,
    read_config,
    tensors_file,
    variables,
)
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.utils.files import SUMS, write_together
from spiking_mlp_jax.utils.paths import user_path

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


def save(path: str | os.PathLike[str], model: SpikingMLP, meta: dict[str, Any]) -> None:
    """Write a weights folder, replacing an older one.

    Both files are complete under temporary names before either is renamed, so that a reader never sees half a file.

    Args:
        path: the folder; created if missing.
        model: a SpikingMLP with concrete arrays, in training or evaluation mode.
        meta: JSON values. "data" holds preprocessing and class names (mean, std, resize_mode, eval_resize, class_names,
            dataset), which `predict` and `evaluate` need; "result" and other keys are free.

    Raises:
        InputError: meta cannot be written as JSON, uses a reserved key, or its "data" does not fit the model.
    """
    folder = user_path(path)
    for key in ("format", "model"):
        if key in meta:
            raise InputError(f'meta must not hold "{key}", which save writes itself: use another key')
    try:
        document = json.loads(json.dumps(meta, allow_nan=False))
        text = json.dumps(
            {"format": FORMAT, "model": dataclasses.asdict(model.config), **document},
            indent=1,
            ensure_ascii=False,
        )
    except (TypeError, ValueError) as error:
        raise InputError(
            f"meta cannot be written as JSON ({error}): use plain finite numbers, strings and lists"
        ) from error
    if "data" in document:
        check_data(document["data"], model.config, "meta")
    tensors = {name: np.asarray(variable[...]) for name, variable in variables(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.isfile(folder / OLD_TENSORS):
        # So that the folder never holds tensors under both names.
        (folder / OLD_TENSORS).replace(folder / TENSORS)
    if os.path.lexists(folder / SUMS):
        # Checksums first: the older files are complete without them.
        (folder / SUMS).unlink()
        (folder / CARD).unlink(missing_ok=True)
    # safetensors needs contiguous arrays; np.ascontiguousarray would turn shape () into (1,). Its save_file
    # would create a file that only the owner can read.
    contiguous = {name: np.require(tensor, requirements="C") for name, tensor in tensors.items()}
    write_together({folder / TENSORS: [to_bytes(contiguous)], folder / CONFIG: [(text + "\n").encode()]})


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
