"""Conversion from and to weights of the paper's official PyTorch code."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from spiking_mlp_jax.data.prepare.imagenet import class_names as imagenet_classes
from spiking_mlp_jax.data.sources import check_dataset
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop.official.config import choose_config
from spiking_mlp_jax.interop.official.files import check_suffix, read_state, write_state
from spiking_mlp_jax.interop.official.state import load_state_dict, state_dict
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.pixels import Pixels, check_resize, check_statistics
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "resize_mode": "resize_crop"}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A network made of official weights, and where its configuration comes from.

    Attributes:
        model: the network in evaluation mode.
        meta: for a weights folder: "data", if known, and "converted_from".
        inferred: fields of ModelConfig that names and shapes determine.
        given: fields that the caller gave, or that `like` did.
        assumed: fields with the paper's values.
        assumed_data: entries of "data" with default values.
        notes: warnings about the numbers.
    """

    model: SpikingMLP
    meta: dict[str, Any]
    inferred: tuple[str, ...]
    given: tuple[str, ...]
    assumed: tuple[str, ...]
    assumed_data: tuple[str, ...]
    notes: tuple[str, ...]


def load(source: str | os.PathLike[str] | Mapping[str, np.ndarray], **options: Any) -> SpikingMLP:
    """A network with the weights of the official code, in evaluation mode. Nothing in a file is executed.

    Args:
        source: a file (`.pth`, `.pt`, `.tar`, `.safetensors`, `.npz`), or a state: official names to arrays.
        options: those of `convert`, such as `like`, `mean`, `std`, and fields of ModelConfig.

    Returns:
        the model; `.pixels` is None without mean and std from the options, `like` or ImageNet's recipe.

    Raises:
        InputError: as `convert`.

    Examples:
        >>> model = SpikingMLP.from_pretrained("fashion_mnist")
        >>> again = load(state_dict(model), like="fashion_mnist")
        >>> again.config == model.config, again.pixels == model.pixels
        (True, True)
    """
    return convert(source, **options).model


def dump(model: SpikingMLP, path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Write a network's weights under the official names, for the official module's `load_state_dict`.

    Args:
        model: any network with concrete parameters.
        path: of the file; its suffix determines the format: .pth, .pt and .tar (need PyTorch), .safetensors or .npz.

    Returns:
        the written state.

    Raises:
        InputError: another suffix, PyTorch is needed and not installed, or the file cannot be written.
    """
    check_suffix(path)
    state = state_dict(model)
    write_state(path, state)
    return state


def convert(
    source: str | os.PathLike[str] | Mapping[str, np.ndarray],
    *,
    key: str | None = None,
    like: str | os.PathLike[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    dataset: str | None = None,
    resize_mode: str | None = None,
    eval_resize: int | None = None,
    **fields: Any,
) -> Converted:
    """A network made of official weights, with the origin of every field of its configuration.

    Names and shapes determine most of the configuration; the rest comes from `fields`, else from `like`, else from the
    paper. Preprocessing comes from the options, else from `like` as far as channels, classes and image size agree,
    else, for 1000 classes and 3 channels, from the official recipe for ImageNet.

    Args:
        source: a file, as `read_state` takes it, or a state: official names to arrays. float64 is rounded to float32
            unless JAX's x64 mode is on.
        key: the state to take from a checkpoint that holds several, such as "model_ema".
        like: a network, as `SpikingMLP.from_pretrained` takes it, for what the weights leave open.
        mean: of each channel, of pixels in [0, 1].
        std: likewise.
        class_names: in the order of the logits.
        dataset: for `evaluate`.
        resize_mode: "pad", "resize" or "resize_crop".
        eval_resize: shorter side before the crop of "resize_crop".
        fields: of ModelConfig.

    Raises:
        InputError: the file cannot be read, the weights belong to no network of this package, or an option is
            impossible or contradicts them.
    """
    stored = source if isinstance(source, Mapping) else read_state(source, key)
    like_config, like_meta = (None, {}) if like is None else weights.read_config(weights.find(like))
    config, origins = choose_config(stored, fields, like_config)
    given = {"mean": mean, "std": std, "class_names": class_names, "dataset": dataset}
    given |= {"resize_mode": resize_mode, "eval_resize": eval_resize}
    given = {name: value for name, value in given.items() if value is not None}
    data, assumed_data = _data(config, given, like_config, like_meta.get("data", {}))
    state = stored if jnp.result_type(float) == np.float64 else _rounded(stored)
    if problem := not_finite(state):
        raise InputError(problem)
    model = nnx.eval_shape(lambda: SpikingMLP(config, rngs=nnx.Rngs(0)))
    load_state_dict(model, state)
    model.eval()
    meta: dict[str, Any] = {} if data is None else {"data": data}
    if data is not None:
        model.pixels = Pixels.from_data(data)
    if not isinstance(source, Mapping):
        meta["converted_from"] = {"file": os.path.basename(source), "assumed": [*origins.assumed, *assumed_data]}
    rounded = any(a.dtype != state[name].dtype for name, a in stored.items())
    notes = ("float64 was rounded to float32; JAX_ENABLE_X64=1 keeps it",) if rounded else ()
    return Converted(model, meta, origins.inferred, origins.given, origins.assumed, assumed_data, notes)


def not_finite(state: Mapping[str, np.ndarray]) -> str:
    """A warning about entries with NaN or inf, or with negative variances; "" if there are none."""
    found = [name for name, a in state.items() if a.dtype.kind == "f" and not np.all(np.isfinite(a))]
    if found:
        more = f" and {len(found) - 1} more entries" if len(found) > 1 else ""
        return f'"{found[0]}"{more} contain NaN or inf: training diverged, or a 16-bit dtype overflowed'
    found = [name for name, a in state.items() if name.endswith("running_var") and np.any(a < 0)]
    return f'"{found[0]}" contains negative variances, so logits will be NaN: copy the file again' if found else ""


def _rounded(state):
    with np.errstate(over="ignore"):
        return {n: a.astype(np.float32) if a.dtype == np.float64 else a for n, a in state.items()}


def _data(
    config: ModelConfig, given: dict[str, Any], like: ModelConfig | None, like_data: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """A weights folder's "data", None if nothing is known; and the names of its entries that are defaults."""
    data = given
    if like is not None:
        names = ["mean", "std"] * (like.in_channels == config.in_channels)
        names += ["class_names", "dataset"] * (like.num_classes == config.num_classes)
        names += ["resize_mode"] + ["eval_resize"] * (like.image_size == config.image_size)
        data = {name: like_data[name] for name in names if name in like_data} | data
    imagenet = config.num_classes == 1000 and config.in_channels == 3
    if not imagenet and not {"mean", "std"} <= data.keys():
        if not given:
            return None, ()
        raise InputError(missing_statistics(config))
    defaults: dict[str, Any] = {"resize_mode": "resize", "eval_resize": 0, "dataset": "folder"}
    defaults |= IMAGENET if imagenet else {}
    if "class_names" not in data:
        defaults["class_names"] = imagenet_classes() if imagenet else [f"class {i}" for i in range(config.num_classes)]
    elif len(data["class_names"]) != config.num_classes:
        raise InputError(f"{len(data['class_names'])} class names were given, but there are {config.num_classes}")
    dataset = given.get("dataset")
    if dataset is not None:
        check_dataset(dataset)
    chosen = {**defaults, **data}
    check_statistics(chosen["mean"], chosen["std"], config.in_channels)
    check_resize(chosen["resize_mode"], chosen["eval_resize"], config.image_size)
    return chosen, tuple(name for name in defaults if name not in data)


def missing_statistics(config: ModelConfig) -> str:
    """The message that mean and std are missing."""
    return (
        f"mean and std of the training images are missing: give {config.in_channels} of each, one per channel, with "
        "--mean and --std (mean=, std=), or a network that has them with --like (like=)"
    )
