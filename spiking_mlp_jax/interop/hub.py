"""A trained network as a folder to share: weights, configuration, model card (README.md) and checksums."""

from __future__ import annotations

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
CITATION = """@article{li2025spikingmlp,
  title   = {Efficient Deep Spiking Multilayer Perceptrons With Multiplication-Free Inference},
  author  = {Li, Boyan and Leng, Luziwei and Shen, Shuaijie and Zhang, Kaixuan and Zhang, Jianguo and Liao, Jianxing
             and Cheng, Ran},
  journal = {IEEE Transactions on Neural Networks and Learning Systems},
  volume  = {36},
  number  = {4},
  pages   = {7542--7554},
  year    = {2025},
  doi     = {10.1109/TNNLS.2024.3394837},
  note    = {arXiv:2306.12465}
}"""


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
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000)}---",
        f"# {_escaped(name)}",
        _introduction(config, parameters),
        f"## Data\n\n{_data(config, meta)}",
        f"## Accuracy\n\n{_accuracy(config, meta)}",
        f"## Use it\n\n{_use(config, meta)}",
        f"## Files\n\n{_files(hashes)}",
        f"## Licence and citation\n\nLicence of these weights: {_escaped(meta['license'])}. The data, which are not in "
        "this folder, have terms of their own. The network is that of\n\n"
        f"```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(c, parameters):
    encoding = "spiking patch encoding" if c.encoding == "spe" else "plain downsampling"
    grown = " + ".join(map(str, c.depths))
    return (
        "An image classifier whose layers exchange only binary spikes: a spiking MLP after Li et al. "
        "([arXiv 2306.12465](https://arxiv.org/abs/2306.12465)), trained with `spiking_mlp_jax`. An image is shown for "
        f"T = {c.time_steps} time steps.\n\n"
        f"- {parameters:,} parameters, {grown} blocks of {', '.join(str(c.stage_dim(i)) for i in range(c.stages))} "
        f"channels, {encoding}\n"
        f'- norm "{c.norm}", neuron "{c.neuron}" with tau = {c.tau:g}, threshold {c.v_threshold:g}\n'
        f"- input: {c.image_size} x {c.image_size} pixels, {'colour' if c.in_channels == 3 else 'grey'}"
        f"{'' if c.in_channels in (1, 3) else f' ({c.in_channels} channels)'}; {c.num_classes} classes"
    )


def _data(c, meta):
    data = meta["data"]
    about = meta.get("trained_on") or TRAINED_ON.get(data["dataset"])
    resize = {
        "pad": f"shrunk to fit {c.image_size} x {c.image_size} and centred on black",
        "resize": f"stretched to {c.image_size} x {c.image_size}",
        "resize_crop": f"scaled so that the shorter side is {data['eval_resize'] or round(c.image_size * 8 / 7)}, "
        f"and cut to the middle {c.image_size} x {c.image_size}",
    }[data["resize_mode"]]
    mean, std = (", ".join(f"{value:g}" for value in data[key]) for key in ("mean", "std"))
    trained = f"Trained on {_escaped(about)}." if about else f"Trained on the data set `{_code(data['dataset'])}`."
    return (
        f"{trained} Images are {resize}, pixels become (pixel / 255 - mean) / std with mean {mean} and std {std}; "
        "`config.json` says so to every command. Classes, in the order of the scores:\n\n"
        f"```json\n{json.dumps(data['class_names'], ensure_ascii=False)}\n```"
    )


def _accuracy(c, meta):
    result = meta.get("result")
    dataset = result.get("dataset") if result else None
    command = _command("evaluate", meta, dataset)
    if not result:
        return f"Not measured. This does, on the data's test images:\n\n```sh\n{command}\n```"
    embedded = (dataset or meta["data"]["dataset"]) in EMBEDDED
    where = "the data's own test images" if embedded else "the test images in DIR"
    chosen = (
        f" These weights are those of step {result['step']:,}, the best of their training run on these same images."
        if "step" in result
        else ""
    )
    return (
        f"{100 * result['accuracy']:.2f} % of {result['images']:,} test images with T = {c.time_steps}.{chosen} "
        f"On {where} this prints it again:\n\n```sh\n{command}\n```"
    )


def _use(c, meta):
    folder = shlex.quote(meta["name"])
    lines = [f"hf download {meta['repo']} --local-dir {folder}"] if meta.get("repo") else []
    lines += ["pip install spiking-mlp-jax", f"spiking-mlp predict {folder} image.png"]
    if c.norm != "layer":
        lines += [f"{_command('compile', meta)} -o {folder}.smlp    # integers, no multiplication left"]
    code = (
        "from spiking_mlp_jax import SpikingMLP, classify\n\n"
        f'model = SpikingMLP.from_pretrained("{meta["name"]}")\n'
        'print(classify(model, ["image.png"], top=3))'
    )
    return "```sh\n" + "\n".join(lines) + f"\n```\n\n```python\n{code}\n```"


def _files(hashes):
    rows = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in hashes.items())
    return (
        f"| file | SHA-256 |\n|---|---|\n{rows}\n\n`SHA256SUMS` holds these and this page's own. Every command "
        "compares them before it uses the weights; `sha256sum --check SHA256SUMS` does the same."
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


def _code(text: str) -> str:
    return _one_line(text).replace("`", "'")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"
