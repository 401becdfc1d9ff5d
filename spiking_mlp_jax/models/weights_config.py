"""What stands in the config.json of a weights folder, checked field by field."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.models.config import ADDED, ModelConfig
from spiking_mlp_jax.models.pixels import check_resize, check_statistics

_DATA_FIELDS = {
    "mean": list,
    "std": list,
    "resize_mode": str,
    "eval_resize": int,
    "class_names": list,
    "dataset": str,
}


def model_config(fields: Any, file: Path) -> ModelConfig:
    """The network that a file's "model" object describes.

    Raises:
        InputError: a field is missing, unknown or impossible; the sentence names the file.
    """
    if not isinstance(fields, dict):
        raise InputError(f'{file} has no "model" object with the ModelConfig fields: copy it again')
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for name in fields:
        if name not in known:
            raise InputError(f'{file} has the unknown model field "{name}": {nearest(name, known)}')
    for name in known:
        if name not in fields and name not in ADDED:
            raise InputError(f'{file} lacks the model field "{name}": copy it again')
    try:
        return ModelConfig(**fields)
    except InputError as error:
        raise InputError(f"{file} describes no possible model: {error}") from error


def check_data(data: Any, config: ModelConfig, where: str) -> None:
    """Checks "data", which says how pictures become inputs, against a network.

    Raises:
        InputError: a field is missing, of another type, or does not fit; the sentence begins with `where`.
    """
    if not isinstance(data, dict):
        raise InputError(f'"data" in {where} is no object: it needs {", ".join(_DATA_FIELDS)}')
    for name, kind in _DATA_FIELDS.items():
        if name not in data:
            raise InputError(f'"data" in {where} lacks "{name}": it needs {", ".join(_DATA_FIELDS)}')
        if not isinstance(data[name], kind) or isinstance(data[name], bool):
            raise InputError(f'"{name}" of "data" in {where} must be a {kind.__name__}, but it is {data[name]!r}')
    for name in ("mean", "std"):
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in data[name]):
            raise InputError(f'"{name}" of "data" in {where} must hold numbers, but it is {data[name]!r}')
    names = data["class_names"]
    if not all(isinstance(name, str) for name in names) or len(names) != config.num_classes:
        raise InputError(f'"class_names" of "data" in {where} must be {config.num_classes} strings, one for each class')
    try:
        check_statistics(data["mean"], data["std"], config.in_channels)
        check_resize(data["resize_mode"], data["eval_resize"], config.image_size)
    except InputError as error:
        raise InputError(f'"data" in {where}: {error}') from error
