"""The commands `convert`, `hub` and `download`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from spiking_mlp_jax.cli.options import (
    WHERE,
    add_command,
    add_data,
    add_dataset,
    add_output,
    check_export,
    use_jax_cache,
)
from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.utils.paths import output_folder, real_name, user_path


def add_commands(commands) -> None:
    """Add the parsers to the subparsers of `spiking-mlp`."""
    parser = add_command(
        commands,
        "convert",
        "convert weights of the official PyTorch code, in both directions",
        "Makes a weights folder of an official state_dict, which every command takes; or writes a network's weights "
        "under the official names, for a PyTorch module. The first argument decides: a file or a network. Numbers are "
        "copied, not computed. Nothing in a file is executed.",
        "spiking-mlp convert official.pth -o runs/official\n"
        "  spiking-mlp convert cifar.pth -o runs/cifar --like cifar10 --set time_steps=6\n"
        "  spiking-mlp convert fashion_mnist -o fashion.safetensors",
        "Names and shapes determine the layers of a network, but not its neurons' constants nor the number of time "
        "steps: these come from --set, --like or the paper, and are printed. Files of PyTorch (.pth, .pt, .tar) need "
        "PyTorch; .safetensors and .npz do not.",
    )
    parser.add_argument("source", metavar="FILE_OR_NETWORK", help=f"a file of official weights; or {WHERE}")
    add_output(parser, "folder or file to write (.pth, .safetensors, .npz)", "PATH", required=True)
    group = parser.add_argument_group("from a file to a folder")
    options = [
        group.add_argument(
            "--set", action="append", metavar="FIELD=VALUE", help="a field of the configuration, such as time_steps=6"
        ),
        group.add_argument("--like", metavar="NETWORK", help="take fields that the file leaves open from this network"),
        group.add_argument("--key", metavar="KEY", help="state to take from a checkpoint with several, e.g. model_ema"),
        group.add_argument("--mean", nargs="+", type=float, metavar="X", help="per channel, of pixels in [0, 1]"),
        group.add_argument("--std", nargs="+", type=float, metavar="X", help="standard deviation per channel"),
        group.add_argument("--classes", metavar="NAMES", help="a file with a name per line, or comma-separated names"),
        add_dataset(group, 'dataset for `evaluate` (default: "folder")'),
        group.add_argument("--resize-mode", metavar="MODE", help='"pad", "resize" or "resize_crop"'),
        group.add_argument(
            "--eval-resize", type=int, metavar="N", help='shorter side before the crop of "resize_crop"'
        ),
    ]
    parser.set_defaults(run=_convert, file_options=[option.dest for option in options])

    parser = add_command(
        commands,
        "hub",
        "write a trained network as a folder for the Hugging Face Hub",
        "Writes the weights, their configuration, a model card (data, accuracy, commands, hashes, licence) and "
        "checksums into one folder, which every command takes and verifies.",
        "spiking-mlp hub fashion_mnist -o shared/fashion_mnist --license mit\n"
        "  spiking-mlp hub runs/pets -o pets --evaluate --trained-on 'the Oxford-IIIT Pet photos' --repo me/pets",
        'Upload it with "hf upload OWNER/NAME FOLDER". The accuracy on the card is that of the training run\'s best '
        "evaluation, or with --evaluate measured now.",
        run=_hub,
    )
    parser.add_argument("weights", metavar="WORKDIR_OR_WEIGHTS", help=WHERE)
    add_output(parser, "folder to write", "FOLDER", required=True)
    parser.add_argument("--name", metavar="NAME", help="the network's name (default: the folder's name)")
    parser.add_argument(
        "--license", "--licence", metavar="ID", help='of the weights, such as "mit", "apache-2.0" or "cc-by-4.0"'
    )
    parser.add_argument("--trained-on", metavar="TEXT", help="description of the training data")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="its repository on the Hub")
    parser.add_argument("--evaluate", action="store_true", help="measure the accuracy on all test images now")
    add_data(parser.add_argument_group("with --evaluate"))

    parser = add_command(
        commands,
        "download",
        "download a network from the Hugging Face Hub",
        "Fetches weights, configuration, model card and checksums into the cache of huggingface_hub, and checks them. "
        "Afterwards every command takes OWNER/NAME as a network, offline; no other command uses the network.",
        "spiking-mlp download me/garments && spiking-mlp predict me/garments shoe.png",
        "HF_HOME chooses the cache, HF_ENDPOINT the server. Needs huggingface_hub: pip install 'spiking-mlp-jax[hub]'.",
        run=_download,
    )
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the Hub")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: the main branch)")


def _convert(chosen: argparse.Namespace) -> None:
    from spiking_mlp_jax.interop.official.files import SUFFIXES

    chosen.source, output = str(user_path(chosen.source)), user_path(chosen.output)
    is_folder = os.path.isdir(chosen.source)
    if os.path.isfile(chosen.source) or (Path(chosen.source).suffix in SUFFIXES and not is_folder):
        if output.suffix in SUFFIXES:
            raise InputError(f"{chosen.source} becomes a weights folder: -o needs a folder, got {chosen.output}")
        _to_folder(chosen, output)
    else:
        from spiking_mlp_jax.models.weights import find

        find(chosen.source)
        for name in chosen.file_options:
            if getattr(chosen, name) is not None:
                option = name.replace("_", "-")
                raise InputError(f"--{option} needs a file of official weights, got the network {chosen.source}")
        _to_file(chosen, output)


def _to_folder(chosen: argparse.Namespace, folder: Path) -> None:
    from spiking_mlp_jax.interop import official
    from spiking_mlp_jax.models import weights

    fields = _fields(chosen.set or [])
    replaces = _holds_weights(folder)
    found = official.convert(
        chosen.source,
        key=chosen.key,
        like=chosen.like,
        mean=chosen.mean,
        std=chosen.std,
        class_names=None if chosen.classes is None else _class_names(chosen.classes),
        dataset=chosen.dataset,
        resize_mode=chosen.resize_mode,
        eval_resize=chosen.eval_resize,
        **fields,
    )
    if "data" not in found.meta:
        raise InputError(official.missing_statistics(found.model.config))
    try:
        weights.save(folder, found.model, found.meta)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}): name another folder") from error
    for note in found.notes:
        print("note:", note, file=sys.stderr)
    arrays = len(official.state_dict(found.model))
    print(f"{folder}: {arrays} arrays of {chosen.source}" + (", replacing the weights there" if replaces else ""))
    config, data = vars(found.model.config), found.meta["data"]
    print("from the weights:", _listed(config, found.inferred))
    if found.given:
        print("given:", _listed(config, found.given))
    if found.assumed:
        print("assumed, as in the paper:", _listed(config, found.assumed) + " (change with --set or --like)")
    if found.assumed_data:
        print("assumed for the data:", _listed(data, found.assumed_data))


def _to_file(chosen: argparse.Namespace, path: Path) -> None:
    from spiking_mlp_jax.interop.official.files import check_suffix

    check_suffix(path)
    check_export(path)
    from spiking_mlp_jax.interop import official
    from spiking_mlp_jax.interop.official.config import missing_fields
    from spiking_mlp_jax.models import weights

    model, _ = weights.load(weights.find(chosen.source))
    state = official.dump(model, path)
    if note := official.not_finite(state):
        print("note:", note, file=sys.stderr)
    missing = missing_fields(model.config)
    print(f"{path}: {len(state)} arrays under the official names, {path.stat().st_size:,} bytes")
    print("not in the file:", _listed(missing, missing) + ", and the preprocessing of images")
    print(f"back to a folder: spiking-mlp convert {path} -o FOLDER --like {chosen.source}")


def _fields(texts: list[str]) -> dict[str, Any]:
    """The fields of FIELD=VALUE, such as "depths=2,8,14,2" or "v_reset=None"; ModelConfig checks the values."""
    import ast

    from spiking_mlp_jax.interop.official.config import FIELDS
    from spiking_mlp_jax.models.config import CHOICES

    fields = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f'--set needs FIELD=VALUE, e.g. time_steps=4, got "{text}"')
        if name not in FIELDS:
            raise InputError(f'--set: there is no field "{name}": {nearest(name, FIELDS)}')
        if name in fields:
            raise InputError(f"--set has {name} twice")
        try:
            fields[name] = value if name in CHOICES else ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise InputError(f'--set {name} cannot be "{value}": give a number, True, False, None or a list') from error
    return fields


def _class_names(text: str) -> list[str]:
    """The lines of a file, or comma-separated names."""
    path = user_path(text)
    if not os.path.isfile(path):
        return [name.strip() for name in text.split(",")]
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read class names from {text} ({error}): give UTF-8 text, a name per line") from error


def _holds_weights(folder: Path) -> bool:
    """Whether a folder holds weights, to be replaced; anything else in it is an error."""
    if not os.path.lexists(folder):
        return False
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is a file: name a new folder for the weights")
    from spiking_mlp_jax.models import weights

    found = sorted(os.listdir(folder))
    others = [name for name in found if name not in (weights.TENSORS, weights.OLD_TENSORS, weights.CONFIG)]
    if others or found == [weights.CONFIG]:
        raise InputError(f"{folder} holds other files, such as {(others or found)[0]}: name a new folder")
    return bool(found)


def _listed(values, names) -> str:
    shown = {"class_names": lambda names: f"{names[0]} to {names[-1]}"}
    return ", ".join(f"{name} {shown.get(name, str)(values[name])}" for name in names) or "nothing"


def _hub(chosen: argparse.Namespace) -> None:
    if not chosen.evaluate and (chosen.dataset or chosen.data_dir):
        raise InputError("--dataset and --data-dir need --evaluate: add it, or leave them out")
    output = output_folder(chosen.output)
    from spiking_mlp_jax.interop.hub import save_pretrained
    from spiking_mlp_jax.models import weights

    folder = weights.find(chosen.weights)
    model, meta = weights.load(folder)
    if chosen.evaluate:
        meta["result"] = _measured(chosen)
    license = chosen.license or meta.get("license")
    save_pretrained(
        output,
        model,
        meta,
        name=chosen.name or real_name(output),
        license=license or "unknown",
        trained_on=chosen.trained_on,
        repo=chosen.repo or meta.get("repo"),
    )
    if license is None:
        print("note: the card says licence unknown; set it with --license, such as mit", file=sys.stderr)
    for name in sorted(path.name for path in output.iterdir()):
        print(output / name)


def _measured(chosen) -> dict[str, Any]:
    from spiking_mlp_jax.analysis.evaluate import evaluate
    from spiking_mlp_jax.data.trained import open_trained
    from spiking_mlp_jax.train.evaluate import Evaluation
    from spiking_mlp_jax.utils.progress import tracked

    use_jax_cache()
    trained = open_trained(chosen.weights)
    found = evaluate(trained, chosen.dataset, chosen.data_dir, shown=tracked)
    assert isinstance(found, Evaluation)
    other = {"dataset": chosen.dataset} if chosen.dataset not in (None, trained.data["dataset"]) else {}
    return {"accuracy": found.accuracy, "loss": found.loss, "images": found.images, **other}


def _download(chosen: argparse.Namespace) -> None:
    from spiking_mlp_jax.models import hub, weights

    if not hub.is_repo(chosen.repo):
        raise InputError(f'"{chosen.repo}" is not a repository on the Hub: give OWNER/NAME')
    folder = hub.snapshot(chosen.repo, chosen.revision, download=True)
    assert folder is not None
    config, _ = weights.read_config(folder)
    print(f"{chosen.repo}: {config.num_classes} classes, {config.image_size} x {config.image_size} pixels, in {folder}")
