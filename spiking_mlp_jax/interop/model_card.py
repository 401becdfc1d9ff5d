"""The README.md of a shared network: what the Hugging Face Hub shows, for machines in its head and for people below."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from spiking_mlp_jax.models.config import ModelConfig

# Data sets of ours that the Hub has under a name of its own.
HUB_DATASETS = {
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "imagenet2012": "ILSVRC/imagenet-1k",
}
EMBEDDED = ("fashion_mnist",)
TRAINED_ON = {"fashion_mnist": "Fashion-MNIST, 28 x 28 grey pictures of garments (Zalando SE, MIT licence)"}
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


def model_card(config: ModelConfig, meta: Mapping[str, Any], parameters: int, hashes: Mapping[str, str]) -> str:
    """The text of README.md.

    Args:
        config: of the network.
        meta: of its weights folder: "data", "result" where it was measured, and what `hub.save_pretrained` adds:
            "name", "license", and where they are known "trained_on" and "repo". Texts may hold anything.
        parameters: how many there are.
        hashes: SHA-256 of each file, by its name.
    """
    name, data, result = meta["name"], meta["data"], meta.get("result")
    dataset = data["dataset"].removeprefix("tfds:")
    hub_dataset = HUB_DATASETS.get(dataset)
    head: dict[str, Any] = {
        "license": meta["license"],
        "library_name": "spiking-mlp-jax",
        "pipeline_tag": "image-classification",
        "tags": ["jax", "flax", "spiking-neural-network", "mlp-mixer", "multiplication-free", "arxiv:2306.12465"],
    }
    if hub_dataset:
        head["datasets"] = [hub_dataset]
    if result:
        # Measured on other data than those it was trained on, if the result says so.
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
        f"{trained} Pictures are {resize}, pixels become (pixel / 255 - mean) / std with mean {mean} and std {std}; "
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
    lines += ["pip install spiking-mlp-jax", f"spiking-mlp predict {folder} picture.png"]
    if c.norm != "layer":
        lines += [f"{_command('compile', meta)} -o {folder}.smlp    # integers, no multiplication left"]
    code = (
        "from spiking_mlp_jax import SpikingMLP, classify\n\n"
        f'model = SpikingMLP.from_pretrained("{meta["name"]}")\n'
        'print(classify(model, ["picture.png"], top=3))'
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
    """Text in which Markdown and HTML find nothing of theirs, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|&])", r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


def _code(text: str) -> str:
    return _one_line(text).replace("`", "'")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"
