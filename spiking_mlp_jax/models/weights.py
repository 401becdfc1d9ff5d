"""Weights folders: a trained model as `model.safetensors` and `config.json`, all that `predict` needs.

    model.safetensors   every parameter and running statistic by its dotted path,
                        "stages.0.encode.conv.kernel"; the blocks of a stage are stacked on a leading axis,
                        as they are in the model
    config.json         {"format": 1, "model": {ModelConfig fields}, "data": {...}, "result": {...}}

Reading executes nothing from the files: JSON and safetensors are data only.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.models import hub
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.pixels import Pixels
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.models.weights_config import check_data, model_config
from spiking_mlp_jax.utils.checksums import SUMS, verify

FORMAT = 1
TENSORS = "model.safetensors"
OLD_TENSORS = "weights.safetensors"  # the name in folders of earlier versions, which are still read
CONFIG = "config.json"
CARD = "README.md"
FILES = (TENSORS, OLD_TENSORS, CONFIG, CARD, SUMS)
PRETRAINED = Path(__file__).parent / "pretrained"
# Which types of safetensors each type of variable takes. Variables are float64 with x64 on and lose nothing then;
# with x64 off, F64 is rounded to float32.
_FLOATS = ("F16", "F32", "F64")
_DTYPES = {"float32": _FLOATS, "float64": _FLOATS, "int32": ("I32",)}


def save(path: str | os.PathLike[str], model: SpikingMLP, meta: dict[str, Any]) -> None:
    """Writes a weights folder, over an older one if need be.

    Both files are complete under temporary names before either gets its own, so that a reader never sees half
    a file.

    Args:
        path: the folder; it is made when missing.
        model: any SpikingMLP with concrete arrays, in training or evaluation mode.
        meta: JSON values. "data" says how images become inputs (mean, std, resize_mode, eval_resize,
            class_names, dataset), without it `predict` and `evaluate` refuse the weights; "result" and other
            keys are free.

    Raises:
        InputError: meta cannot be written as JSON, uses a reserved key, or its "data" does not fit the model.
    """
    folder = Path(path)
    for key in ("format", "model"):
        if key in meta:
            raise InputError(f'meta holds "{key}", which save itself writes: use another key')
    try:
        document = json.loads(json.dumps(meta, allow_nan=False))
        # A long list of numbers belongs on one line, but the file as a whole should be read by people.
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
    tensors = {name: np.asarray(variable[...]) for name, variable in _variables(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.isfile(folder / OLD_TENSORS):
        # At any moment the folder has tensors under one name.
        (folder / OLD_TENSORS).replace(folder / TENSORS)
    if os.path.lexists(folder / SUMS):
        # Checksums first: without them the older files are still whole.
        (folder / SUMS).unlink()
        (folder / CARD).unlink(missing_ok=True)
    suffix = f".{os.getpid()}.tmp"
    temporaries = [folder / (name + suffix) for name in (TENSORS, CONFIG)]
    try:
        # safetensors takes contiguous arrays only; np.ascontiguousarray would turn shape () into (1,). Its
        # save_file would make a file that only its owner can read.
        contiguous = {name: np.require(tensor, requirements="C") for name, tensor in tensors.items()}
        temporaries[0].write_bytes(to_bytes(contiguous))
        temporaries[1].write_text(text + "\n", encoding="utf-8")
        for temporary, name in zip(temporaries, (TENSORS, CONFIG), strict=True):
            temporary.replace(folder / name)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> tuple[SpikingMLP, dict[str, Any]]:
    """Reads a weights folder.

    Args:
        path: a folder that `save` wrote.

    Returns:
        model: a SpikingMLP in evaluation mode with the saved values: bit for bit if they are float32, and of
            other types those that JAX can hold (without x64, float64 is rounded to float32).

        meta: what was given to `save`, with lists in place of tuples.

    Raises:
        InputError: a missing folder or file, or a file that is damaged or does not fit; the sentence names
            the file and, where one is at fault, the field or tensor.

    Examples:
        >>> model, meta = load(find("fashion_mnist"))
        >>> model.config.depths, meta["data"]["class_names"][:2]
        ((1, 2), ['T-shirt/top', 'Trouser'])
    """
    config, meta = read_config(path)
    model = nnx.eval_shape(lambda: SpikingMLP(config, rngs=nnx.Rngs(0)))
    file = tensors_file(path)
    variables = _variables(model)
    for name, tensor in _read_tensors(file, variables).items():
        variables[name].set_value(jnp.asarray(tensor, variables[name].dtype))
    model.eval()
    if "data" in meta:
        model.pixels = Pixels.from_data(meta["data"])
    return model, meta


def read_config(path: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads and checks a weights folder's config.json alone.

    Returns:
        The ModelConfig and the meta that was given to `save`.

    Raises:
        InputError: as `load`.
    """
    folder = Path(path)
    file = folder / CONFIG
    if not os.path.isdir(folder):
        raise InputError(f"there is no weights folder {folder}: give a folder with {TENSORS} and {CONFIG}")
    tensors = tensors_file(folder)
    if not os.path.isfile(file):
        raise InputError(f"{folder} is no weights folder, because it has no {CONFIG}: train or copy it again")
    verify(folder, (tensors.name, CONFIG))
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error}): train or copy it again") from error
    if not isinstance(document, dict) or "format" not in document:
        raise InputError(f"{file} holds no weights' configuration, because it has no format number: copy it again")
    if document["format"] != FORMAT or isinstance(document["format"], bool):
        raise InputError(
            f"{file} has format {document['format']!r}, but this version reads format {FORMAT}: "
            "use the version that wrote it"
        )
    config = model_config(document.get("model"), file)
    meta = {key: value for key, value in document.items() if key not in ("format", "model")}
    if "data" in meta:
        check_data(meta["data"], config, str(file))
    return config, meta


def tensors_file(path: str | os.PathLike[str]) -> Path:
    """The file of a weights folder that holds the tensors.

    Raises:
        InputError: there is none, or there are two.
    """
    folder = Path(path)
    found = [folder / name for name in (TENSORS, OLD_TENSORS) if os.path.isfile(folder / name)]
    if not found:
        raise InputError(f"{folder} is no weights folder, because it has no {TENSORS}: train or copy it again")
    if len(found) > 1:
        raise InputError(f"{folder} holds {TENSORS} and {OLD_TENSORS}: remove the one that is not meant")
    return found[0]


def pretrained_names() -> list[str]:
    """Names of the trained networks that come with the package.

    Examples:
        >>> "fashion_mnist" in pretrained_names()
        True
    """
    return sorted(file.parent.name for file in PRETRAINED.glob(f"*/{CONFIG}"))


def pretrained_path(name: str) -> Path:
    """The weights folder of a trained network that comes with the package.

    Raises:
        InputError: there is none of that name; the sentence offers the nearest.
    """
    names = pretrained_names()
    if name not in names:
        known = nearest(name, names) if names else "this installation ships none"
        raise InputError(f'no trained network is called "{name}": {known}')
    return PRETRAINED / name


def find(where: str | os.PathLike[str], *, revision: str | None = None, download: bool = False) -> Path:
    """The weights folder that a user means.

    Args:
        where: a training run's workdir (its `weights` folder is taken), a weights folder, the name of a trained network
            that comes with the package, or OWNER/NAME on the Hugging Face Hub. A folder goes before a name, both go
            before the Hub.
        revision: branch, tag or commit on the Hub; None: the main branch.
        download: fetch the network from the Hub. Without it only networks in the local cache are found.

    Raises:
        InputError: it is none of them, or cannot be downloaded.
    """
    if not isinstance(where, str | os.PathLike):
        raise InputError(f"a network is named by a folder or a shipped network's name, but it is {where!r}")
    folder = Path(where)
    for candidate in (folder, folder / "weights"):
        # os.path answers False where pathlib raises, as for a name that is too long.
        if any(os.path.isfile(candidate / name) for name in (TENSORS, OLD_TENSORS)):
            return _local(candidate, revision)
    if str(where) in pretrained_names():
        return _local(pretrained_path(str(where)), revision)
    on_hub = hub.is_repo(str(where)) and not os.path.exists(folder)
    if on_hub and (cached := hub.snapshot(str(where), revision, download)):
        return cached
    if os.path.isdir(folder):
        raise InputError(f"{folder} holds no {TENSORS}, nor does {folder / 'weights'}: wait for the first evaluation")
    if os.path.exists(folder):
        raise InputError(f"{folder} is a file: give the folder that holds {TENSORS}")
    names = pretrained_names()
    known = f"; of the shipped networks, {nearest(str(where), names)}" if names else ""
    if on_hub:
        at = f" --revision {revision}" if revision else ""
        known += f"; if it is on the Hugging Face Hub, download it first: spiking-mlp download {where}{at}"
    raise InputError(f"there is no folder {folder}{known}")


def _local(folder: Path, revision: str | None) -> Path:
    if revision is not None:
        raise InputError(f"revision is for networks on the Hub, but {folder} is a local folder: leave it out")
    return folder


def data_dir(folder: Path) -> str | None:
    """Where the data lie that a workdir's weights were trained on; None where that is not known.

    Weights do not say it, because they travel; the configuration of the workdir around them does.
    """
    found = _workdir_config(folder).get("data_dir")
    return found if isinstance(found, str) else None


def max_bad_images(folder: Path) -> float:
    """The share of damaged images that a workdir's run allows; 0 where that is not known."""
    found = _workdir_config(folder).get("max_bad_images")
    return found if isinstance(found, float) else 0.0


def _workdir_config(folder):
    try:
        config = json.loads((folder.parent / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _variables(model) -> dict[str, nnx.Variable]:
    # The variables themselves, not copies: setting their values changes the model.
    state = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): variable for path, variable in state}


def _read_tensors(file: Path, variables: dict[str, nnx.Variable]) -> dict[str, np.ndarray]:
    try:
        with safe_open(file, framework="np") as stored:
            names = set(stored.keys())
            for name, variable in variables.items():
                if name not in names:
                    raise InputError(f'{file} lacks the tensor "{name}": it belongs to another model or is damaged')
                # Judged by the header, so that a wrong file costs neither time nor memory.
                tensor = stored.get_slice(name)
                shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                if shape != tuple(variable.shape):
                    raise InputError(
                        f'tensor "{name}" in {file} has shape {shape}, but the model needs {variable.shape}'
                    )
                if dtype not in _DTYPES[str(variable.dtype)]:
                    raise InputError(
                        f'tensor "{name}" in {file} has dtype {dtype}, but the model needs {variable.dtype}'
                    )
            extra = sorted(names - variables.keys())
            if extra:
                raise InputError(f'{file} holds the tensor "{extra[0]}", which the model does not have')
            return {name: stored.get_tensor(name) for name in variables}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is cut short or damaged ({error}): train or copy it again") from error
