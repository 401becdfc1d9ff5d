"""A trained network as a folder to share: weights, configuration, model card (README.md) and checksums."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import yaml
from flax import nnx

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.utils.files import file_hash, write_sums, write_whole
from spiking_mlp_jax.utils.paths import user_path
from spiking_mlp_jax.utils.templates import render

# The Hub's rule for both parts of OWNER/NAME.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# Datasets on the Hub.
HUB_DATASETS = {
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "imagenet2012": "ILSVRC/imagenet-1k",
}
EMBEDDED = ("fashion_mnist",)
TRAINED_ON = {"fashion_mnist": "Fashion-MNIST, 28 x 28 grey images of garments (Zalando SE, MIT licence)"}


def save_pretrained(
    folder: str | os.PathLike[str],
    model: SpikingMLP,
    meta: dict[str, Any],
    *,
    name: str,
    license: str = "unknown",
    trained_on: str | None = None,
    repo: str | None = None,
) -> None:
    """Write a folder for the Hugging Face Hub, replacing an older one.

    It holds model.safetensors, config.json, README.md (the model card) and SHA256SUMS of these three. Every command
    and `SpikingMLP.from_pretrained` take it, and refuse it if a file does not match its checksum.

    Args:
        folder: to write; created if missing.
        model: a trained network.
        meta: as for `weights.save`, with "data"; "result" with "accuracy" (0 to 1) and "images" is shown on the card.
        name: of the network.
        license: the Hub's identifier of the weights' licence, such as "mit" or "cc-by-4.0".
        trained_on: the data in words; None: what meta says, or the data set's name.
        repo: OWNER/NAME on the Hub, for the card's download command.

    Raises:
        InputError: meta without "data"; an impossible name, licence, repo or result;
            a folder that cannot be written to, or in which other files or an edited card would be lost.
    """
    if "data" not in meta:
        raise InputError('the weights have no "data" (preprocessing and class names): save them again with it')
    meta = {key: value for key, value in meta.items() if key != "repo"}
    meta |= {"name": name, "license": license}
    meta |= {"trained_on": trained_on} if trained_on else {}
    meta |= {"repo": repo} if repo else {}
    _check(meta)
    folder = user_path(folder)
    try:
        _spare_other_files(folder)
        weights.save(folder, model, meta)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror}): name another folder") from error
    write_card(folder)


def write_card(folder: Path) -> None:
    """Write the model card and the checksums of a folder whose config.json has "name" and "license"."""
    write_whole(folder / weights.CARD, [_card(folder)])
    write_sums(folder, (weights.TENSORS, weights.CONFIG, weights.CARD))


def _card(folder: Path) -> bytes:
    config, meta = weights.read_config(folder)
    _check(meta)
    shapes = nnx.state(nnx.eval_shape(lambda: SpikingMLP(config, rngs=nnx.Rngs(0))), nnx.Param)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    hashes = {name: file_hash(folder / name) for name in (weights.TENSORS, weights.CONFIG)}
    return model_card(config, meta, parameters, hashes).encode()


def _spare_other_files(folder: Path) -> None:
    """Refuse a folder with other files or an edited card, which would be lost."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not any((folder / name).is_file() for name in (weights.TENSORS, weights.OLD_TENSORS)):
        raise InputError(f"{folder} holds other files: name a new folder, or one that this command wrote")
    if os.path.lexists(folder / weights.CARD):
        try:
            own = (folder / weights.CARD).read_bytes() != _card(folder)
        except (InputError, OSError):
            own = True
        if own:
            raise InputError(f"{folder / weights.CARD} was edited: move it away, or name a new folder")


def _check(meta) -> None:
    name, license, repo, result = (meta.get(key) for key in ("name", "license", "repo", "result"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f'the name "{name}" cannot be used on the Hub: use letters, digits, "-", "_" and "."')
    if not isinstance(license, str) or not _LICENSE.fullmatch(license):
        raise InputError(f'"{license}" is not a licence identifier: use one such as "mit", "apache-2.0", "cc-by-4.0"')
    parts = repo.split("/") if isinstance(repo, str) else []
    if repo is not None and not (len(parts) == 2 and all(_NAME.fullmatch(part) for part in parts)):
        raise InputError(f'"{repo}" is not a repository on the Hub: give OWNER/NAME')
    if result is None:
        return
    known = result if isinstance(result, dict) else {}
    accuracy, images = known.get("accuracy"), known.get("images")
    possible = isinstance(accuracy, int | float) and not isinstance(accuracy, bool) and 0 <= accuracy <= 1
    if not possible or type(images) is not int or images < 1:
        raise InputError(f'"result" needs "accuracy" from 0 to 1 and a number of "images", got {result!r}')
    if not isinstance(known.get("dataset", ""), str) or type(known.get("step", 0)) is not int:
        raise InputError(f'"result" has a "dataset" that is not text or a "step" that is not an integer: {result!r}')


def model_card(config: ModelConfig, meta: Mapping[str, Any], parameters: int, hashes: Mapping[str, str]) -> str:
    """The text of README.md: metadata for the Hugging Face Hub, then a page for people.

    Args:
        config: of the network.
        meta: of its weights folder: "data", perhaps "result", and what `save_pretrained` adds: "name", "license",
            perhaps "trained_on" and "repo". Texts may contain anything.
        parameters: their number.
        hashes: SHA-256 of each file, by its name.
    """
    name, data, result = meta["name"], meta["data"], meta.get("result")
    dataset = data["dataset"].removeprefix("tfds:")
    head: dict[str, Any] = {
        "license": meta["license"],
        "library_name": "spiking-mlp-jax",
        "pipeline_tag": "image-classification",
        "tags": ["jax", "flax", "spiking-neural-network", "mlp-mixer", "multiplication-free", "arxiv:2306.12465"],
    }
    if dataset in HUB_DATASETS:
        head["datasets"] = [HUB_DATASETS[dataset]]
    if result:
        # The result may be for other data than those of training.
        tested = result.get("dataset", data["dataset"]).removeprefix("tfds:")
        about = {
            "name": _one_line((tested == dataset and meta.get("trained_on")) or tested),
            "type": HUB_DATASETS.get(tested) or _slug(tested),
            "split": "test",
        }
        metric = {"type": "accuracy", "value": result["accuracy"], "name": f"accuracy, T = {config.time_steps}"}
        task = {"type": "image-classification", "name": "Image Classification"}
        head["metrics"] = ["accuracy"]
        head["model-index"] = [{"name": name, "results": [{"task": task, "dataset": about, "metrics": [metric]}]}]
    values: dict[str, Any] = {
        "c": config,
        "meta": meta,
        "head": yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000),
        "about": meta.get("trained_on") or TRAINED_ON.get(data["dataset"]),
        "tested": (result or {}).get("dataset"),
        "parameters": parameters,
        "hashes": hashes,
        "embedded": EMBEDDED,
        "command": _command,
    }
    return render(
        "spiking_mlp_jax.interop",
        "card.md.jinja",
        values,
        code=lambda text: _one_line(text).replace("`", "'"),
        escaped=_escaped,
        json=functools.partial(json.dumps, ensure_ascii=False),
        numbers=lambda numbers: ", ".join(f"{number:g}" for number in numbers),
        quoted=shlex.quote,
    )


def _command(name, meta, dataset=None):
    data = f" --dataset {shlex.quote(_one_line(dataset))}" if dataset else ""
    data += "" if (dataset or meta["data"]["dataset"]) in EMBEDDED else " --data-dir DIR"
    return f"spiking-mlp {name} {shlex.quote(meta['name'])}{data}"


def _escaped(text: str) -> str:
    """Text on one line, with Markdown and HTML escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|&$~])", r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"
