"""Weights folders: find, check and read a trained model's `model.safetensors` and `config.json`.

    model.safetensors   parameters and running statistics by dotted path, e.g. "stages.0.encode.conv.kernel"; the
                        blocks of a stage are stacked on a leading axis, as in the model
    config.json         {"format": 1, "model": {ModelConfig fields}, "data": {...}, "result": {...}}
    SHA256SUMS          optional

JSON and safetensors hold data only: reading a folder executes nothing from it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.models import hub
from spiking_mlp_jax.models.config import ADDED, ModelConfig
from spiking_mlp_jax.models.pixels import Pixels, check_resize, check_statistics
from spiking_mlp_jax.utils.files import SUMS, verify, write_together
from spiking_mlp_jax.utils.paths import user_path

FORMAT = 1
TENSORS = "model.safetensors"
OLD_TENSORS = "weights.safetensors"  # its name in folders of earlier versions
CONFIG = "config.json"
CARD = "README.md"
FILES = (TENSORS, OLD_TENSORS, CONFIG, CARD, SUMS)
PRETRAINED = Path(__file__).parent / "pretrained"
# Types in a file that each type of variable accepts. With x64 off, F64 is rounded to float32.
_FLOATS = ("F16", "F32", "F64")
_DTYPES = {"float32": _FLOATS, "float64": _FLOATS, "int32": ("I32",)}
_DATA_FIELDS = {
    "mean": list,
    "std": list,
    "resize_mode": str,
    "eval_resize": int,
    "class_names": list,
    "dataset": str,
}

Network = TypeVar("Network", bound=Any)


def pretrained_names() -> list[str]:
    """Names of the trained networks in the package.

    Examples:
        >>> "fashion_mnist" in pretrained_names()
        True
    """
    return sorted(file.parent.name for file in PRETRAINED.glob(f"*/{CONFIG}"))


def pretrained_path(name: str) -> Path:
    """The weights folder of a trained network in the package.

    Raises:
        InputError: unknown name; the message suggests the nearest.
    """
    names = pretrained_names()
    if name not in names:
        known = nearest(name, names) if names else "this installation has none"
        raise InputError(f'unknown trained network "{name}": {known}')
    return PRETRAINED / name


def find(where: str | os.PathLike[str], *, revision: str | None = None, download: bool = False) -> Path:
    """The weights folder that `where` refers to.

    Args:
        where: a weights folder, a training run's workdir (its folder `weights`), the name of a trained network in the
            package, or OWNER/NAME on the Hugging Face Hub, in this order of precedence.
        revision: branch, tag or commit on the Hub; None: the main branch.
        download: fetch the network from the Hub. Otherwise only networks in the local cache are found.

    Raises:
        InputError: it is none of these, or cannot be downloaded.
    """
    if not isinstance(where, str | os.PathLike):
        raise InputError(f"expected a folder or the name of a shipped network, got {where!r}")
    folder = user_path(where)
    if folder.name in ("", "..") or (folder.name != "weights" and os.path.islink(folder)):
        folder = Path(os.path.realpath(folder))  # whose name and parent say what it is
    for candidate in (folder, folder / "weights"):
        # os.path returns False where pathlib raises, e.g. for a name that is too long.
        if any(os.path.isfile(candidate / name) for name in (TENSORS, OLD_TENSORS)):
            return _local(candidate, revision)
    if str(where) in pretrained_names():
        return _local(pretrained_path(str(where)), revision)
    on_hub = hub.is_repo(str(where)) and not os.path.exists(folder)
    if on_hub and (cached := hub.snapshot(str(where), revision, download)):
        return cached
    if os.path.isdir(folder):
        raise InputError(
            f"{folder} holds no {TENSORS}, nor does {folder / 'weights'}: it is not a weights folder, or "
            "a workdir before its first evaluation"
        )
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
    """The data_dir that the weights in a workdir were trained with, None if unknown.

    It stands in the workdir's configuration, not in the weights, because weights are shared.
    """
    found = _workdir_config(folder).get("data_dir")
    return found if isinstance(found, str) else None


def max_bad_images(folder: Path) -> float:
    """The share of corrupt images that a workdir's run allows, 0 if unknown."""
    found = _workdir_config(folder).get("max_bad_images")
    return found if isinstance(found, float) else 0.0


def _workdir_config(folder):
    for workdir in (folder.parent, Path(os.path.realpath(folder)).parent):  # the weights may be a link, either way
        try:
            config = json.loads((workdir / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and "format" not in config:
            return config
    return {}


def load(network: type[Network], path: str | os.PathLike[str]) -> Network:
    """A trained network from a weights folder, fully checked.

    Args:
        network: class of the network, called as `network(config, rngs=...)`.
        path: the folder.

    Returns:
        the network in evaluation mode, with `.pixels` (None if the folder has no "data"), `.meta` and `.loaded_from`.

    Raises:
        InputError: a missing folder or file, or one that is damaged or does not fit; the message names the file and
            the field or tensor.
    """
    config, meta = read_config(path)
    model = nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0)))
    wanted = variables(model)
    for name, tensor in _read_tensors(tensors_file(path), wanted).items():
        wanted[name].set_value(jnp.asarray(tensor, wanted[name].dtype))
    model.eval()
    model.meta = meta
    model.pixels = Pixels.from_data(meta["data"]) if "data" in meta else None
    model.loaded_from = os.path.realpath(path)
    return model


def save(path: str | os.PathLike[str], model, meta: dict[str, Any]) -> None:
    """Writes a weights folder, replacing an older one.

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
    from safetensors.numpy import save as to_bytes  # the network itself runs where it is not installed

    # safetensors needs contiguous arrays; np.ascontiguousarray would turn shape () into (1,). Its save_file
    # would create a file that only the owner can read.
    contiguous = {name: np.require(tensor, requirements="C") for name, tensor in tensors.items()}
    write_together({folder / TENSORS: [to_bytes(contiguous)], folder / CONFIG: [(text + "\n").encode()]})


def read_config(path: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, Any]]:
    """The checked config.json of a weights folder: the ModelConfig, and the other keys as `meta`.

    Raises:
        InputError: as `load`.
    """
    folder = user_path(path)
    file = folder / CONFIG
    if not os.path.isdir(folder):
        raise InputError(f"there is no weights folder {folder}: give a folder with {TENSORS} and {CONFIG}")
    tensors = tensors_file(folder)
    if not os.path.isfile(file):
        raise InputError(f"{folder} is not a weights folder, {CONFIG} is missing: train or copy it again")
    verify(folder, (tensors.name, CONFIG))
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error}): train or copy it again") from error
    if not isinstance(document, dict) or "format" not in document:
        raise InputError(f"{file} is not a weights folder's {CONFIG}, it has no format number: copy it again")
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
    """The safetensors file of a weights folder.

    Raises:
        InputError: there is none, or one under each of its two names.
    """
    folder = user_path(path)
    found = [folder / name for name in (TENSORS, OLD_TENSORS) if os.path.isfile(folder / name)]
    if not found:
        raise InputError(f"{folder} is not a weights folder, {TENSORS} is missing: train or copy it again")
    if len(found) > 1:
        raise InputError(f"{folder} holds both {TENSORS} and {OLD_TENSORS}: remove one of them")
    return found[0]


def model_config(fields: Any, file: Path) -> ModelConfig:
    """The ModelConfig of a file's "model" object.

    Raises:
        InputError: a field is missing, unknown or invalid; the message names the file.
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
        raise InputError(f'invalid "model" in {file}: {error}') from error


def check_data(data: Any, config: ModelConfig, where: str) -> None:
    """Check "data", the preprocessing and class names, against a network.

    Raises:
        InputError: a field is missing, has the wrong type, or does not fit; the message names `where`.
    """
    if not isinstance(data, dict):
        raise InputError(f'"data" in {where} must be an object with {", ".join(_DATA_FIELDS)}')
    for name, kind in _DATA_FIELDS.items():
        if name not in data:
            raise InputError(f'"data" in {where} lacks "{name}": it needs {", ".join(_DATA_FIELDS)}')
        if not isinstance(data[name], kind) or isinstance(data[name], bool):
            raise InputError(f'"{name}" of "data" in {where} must be a {kind.__name__}, got {data[name]!r}')
    for name in ("mean", "std"):
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in data[name]):
            raise InputError(f'"{name}" of "data" in {where} must hold numbers, got {data[name]!r}')
    names = data["class_names"]
    if not all(isinstance(name, str) for name in names) or len(names) != config.num_classes:
        raise InputError(f'"class_names" of "data" in {where} must be {config.num_classes} strings, one for each class')
    try:
        check_statistics(data["mean"], data["std"], config.in_channels)
        check_resize(data["resize_mode"], data["eval_resize"], config.image_size)
    except InputError as error:
        raise InputError(f'"data" in {where}: {error}') from error


def variables(model) -> dict[str, nnx.Variable]:
    """The model's own variables by dotted path; setting their values changes the model."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): variable for path, variable in state}


def _read_tensors(file: Path, wanted: dict[str, nnx.Variable]) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open  # a network that reads no files does without it

    try:
        with safe_open(file, framework="np") as stored:
            names = set(stored.keys())
            for name, variable in wanted.items():
                if name not in names:
                    raise InputError(f'{file} lacks the tensor "{name}": it is damaged, or of another model')
                # Checked in the header, before anything is read.
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
            extra = sorted(names - wanted.keys())
            if extra:
                raise InputError(f'{file} holds the tensor "{extra[0]}", which the model does not have')
            tensors = {name: stored.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or damaged ({error}): train or copy it again") from error
    check_finite(tensors, str(file))
    return tensors


def check_finite(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Checks that every number is finite, and variances not negative.

    A neuron whose potential is NaN never fires, and the logits look sound.

    Raises:
        InputError: a tensor holds NaN or inf, or negative variances; the message names `where`.
    """
    bad = [name for name, x in tensors.items() if x.dtype.kind == "f" and not np.isfinite(x).all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise InputError(
            f'tensor "{bad[0]}"{more} in {where} contains NaN or inf: training diverged, or a 16-bit dtype overflowed; '
            "use weights of an earlier step, or retrain with a lower learning rate"
        )
    if bad := [name for name, x in tensors.items() if name.endswith(".var") and (x < 0).any()]:
        raise InputError(f'tensor "{bad[0]}" in {where} contains negative variances: copy or convert the file again')
