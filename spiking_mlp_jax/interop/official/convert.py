"""Official states as this package's networks: the model, and how pixels become its inputs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from spiking_mlp_jax.data.prepare.imagenet import class_names
from spiking_mlp_jax.data.sources import DATASETS
from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.interop.official import state as official
from spiking_mlp_jax.interop.official.config import ASSUMED, TRAINING, infer_config, possible_fields
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.pixels import check_resize, check_statistics
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "resize_mode": "resize_crop"}


@dataclasses.dataclass(frozen=True)
class Origins:
    """Where the fields of a converted network's configuration come from, name by name."""

    told: tuple[str, ...]
    given: tuple[str, ...]
    assumed: tuple[str, ...]


def model_of(state: Mapping[str, np.ndarray], config: ModelConfig) -> SpikingMLP:
    """The network of a configuration with an official state's weights, in evaluation mode.

    Args:
        state: as `official.load` takes it.
        config: such as `infer_config` finds.

    Raises:
        InputError: as `official.load`.
    """
    model = nnx.eval_shape(lambda: SpikingMLP(config, rngs=nnx.Rngs(0)))
    official.load(model, state)
    model.eval()
    return model


def choose_config(
    state: Mapping[str, np.ndarray], given: Mapping[str, Any], like: ModelConfig | None = None
) -> tuple[ModelConfig, Origins]:
    """The configuration of a state, and where each field comes from.

    Args:
        state: as in `infer_config`.
        given: fields that the user states; one that contradicts the weights is an error.
        like: a network whose fields are taken where the weights say nothing and the user neither.

    Raises:
        InputError: as `infer_config`.
    """
    possible = possible_fields(state)
    told = tuple(name for name, values in possible.items() if len(values) == 1)
    given = dict(given)
    for name in (*ASSUMED, *TRAINING) if like is not None else ():
        value = getattr(like, name)
        if name not in told and value in possible.get(name, (value,)):
            given.setdefault(name, value)
    config = infer_config(state, **given)
    assumed = tuple(name for name in ASSUMED if name not in told and name not in given and _matters(name, config))
    return config, Origins(told, tuple(name for name in given if name not in told), assumed)


def unsaid(config: ModelConfig) -> dict[str, Any]:
    """The fields on which a network's scores depend and that its official state does not hold."""
    told = {"layer": ("norm",), "tebn": ("norm", "time_steps")}.get(config.norm, ())
    told += ("neuron",) if config.neuron == "plif" else ()
    names = [name for name in ASSUMED if name not in told and name != "norm_features" and _matters(name, config)]
    return {name: getattr(config, name) for name in names}


def data_of(
    config: ModelConfig,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    dataset: str | None = None,
    resize_mode: str | None = None,
    eval_resize: int | None = None,
    like: tuple[ModelConfig, Mapping[str, Any]] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """How pixels become a network's inputs, as a weights folder's "data" says it.

    What is None comes from `like`, as far as its channels, classes and image size are the same; then, for 1000
    classes and 3 channels, from the official recipe for ImageNet.

    Returns:
        the "data", and the names of its entries that neither was given nor came from `like`.

    Raises:
        InputError: mean and std are not known, the number of names is not that of classes, a value that cannot be, or
            no such data set.
    """
    given = {"mean": mean, "std": std, "class_names": classes, "dataset": dataset}
    given |= {"resize_mode": resize_mode, "eval_resize": eval_resize}
    data = {name: value for name, value in given.items() if value is not None}
    if like is not None:
        other, known = like
        names = ["mean", "std"] * (other.in_channels == config.in_channels)
        names += ["class_names", "dataset"] * (other.num_classes == config.num_classes)
        names += ["resize_mode"] + ["eval_resize"] * (other.image_size == config.image_size)
        data = {name: known[name] for name in names if name in known} | data
    imagenet = config.num_classes == 1000 and config.in_channels == 3
    if not imagenet and not {"mean", "std"} <= data.keys():
        raise InputError(
            f"say how pixels become inputs: the mean and std that images were normalised with in training, one number "
            f"for each channel ({config.in_channels}), with --mean and --std or with --like of such a network"
        )
    defaults: dict[str, Any] = {"resize_mode": "resize", "eval_resize": 0, "dataset": "folder"}
    defaults |= IMAGENET if imagenet else {}
    if "class_names" not in data:
        defaults["class_names"] = class_names() if imagenet else [f"class {i}" for i in range(config.num_classes)]
    if len(data.get("class_names", ())) not in (0, config.num_classes):
        raise InputError(f"--classes has {len(data['class_names'])} names, but there are {config.num_classes} classes")
    if dataset is not None and dataset not in DATASETS and not dataset.startswith("tfds:"):
        raise InputError(f'--dataset: "{dataset}" is unknown: {nearest(dataset, [*DATASETS, "tfds:NAME"])}')
    chosen = {**defaults, **data}
    check_statistics(chosen["mean"], chosen["std"], config.in_channels)
    check_resize(chosen["resize_mode"], chosen["eval_resize"], config.image_size)
    return chosen, [name for name in defaults if name not in data]


def read_classes(text: str) -> list[str]:
    """The class names that a command line means: those of a file, one a line, or a list with commas.

    Raises:
        InputError: the file cannot be read.
    """
    if not os.path.isfile(text):
        return [name.strip() for name in text.split(",")]
    try:
        return [line for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the class names in {text} cannot be read ({error}): give UTF-8 text, a name a line"
        ) from error


def rounded(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state with float64 as float32, unless JAX is to compute in float64."""
    wide = jnp.result_type(float) == np.float64
    with np.errstate(over="ignore"):
        return {n: a if wide or a.dtype != np.float64 else a.astype(np.float32) for n, a in state.items()}


def not_finite(state: Mapping[str, np.ndarray]) -> str:
    """A sentence about entries with NaN, infinite values or negative variances; "" where there are none."""
    found = [name for name, a in state.items() if a.dtype.kind == "f" and not np.all(np.isfinite(a))]
    if not found:
        found = [name for name, a in state.items() if name.endswith("running_var") and np.any(a < 0)]
        return f'"{found[0]}" holds variances below 0, whose roots are no numbers: copy the file again' if found else ""
    more = f" and {len(found) - 1} more entries" if len(found) > 1 else ""
    return f'"{found[0]}"{more} hold values that are not finite: the training diverged, or a short dtype overflowed'


def check_folder(folder: Path) -> bool:
    """Whether a folder holds weights, which would be replaced; new and empty ones do not.

    Raises:
        InputError: it is a file or holds something else.
    """
    if not os.path.lexists(folder):
        return False
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is a file: name a new folder for the weights")
    found = sorted(os.listdir(folder))
    others = [name for name in found if name not in (weights.TENSORS, weights.OLD_TENSORS, weights.CONFIG)]
    if others or found == [weights.CONFIG]:
        raise InputError(f"{folder} holds other things, such as {(others or found)[0]}: name a new folder")
    return bool(found)


def _matters(name: str, config: ModelConfig) -> bool:
    """Whether the scores depend on an untold field."""
    if name == "norm_features":
        return config.norm != "layer"
    if name == "tau":
        return config.neuron == "lif"
    return not (name == "decay_input" and config.neuron == "if")
