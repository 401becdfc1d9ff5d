"""The command `spiking-mlp convert`: weights of the official PyTorch code, to and from this package's."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from spiking_mlp_jax.cli.deploy import WHERE, check_export
from spiking_mlp_jax.errors import InputError

# What says how a file becomes a folder, and means nothing the other way round.
OPTIONS = ("set", "like", "key", "mean", "std", "classes", "dataset", "resize_mode", "eval_resize")


def add_commands(commands, command, positive) -> None:
    """Adds the commands' parsers; the arguments are those of `cli_deploy.add_commands`."""
    parser = command(
        commands,
        "convert",
        "weights of the official PyTorch code, to and from this package's",
        "Makes a weights folder of a state_dict under the official names, so that every command takes it; or writes a "
        "network's weights under these names, for a PyTorch module. Which of both is told by the first argument, a "
        "file or a network. Numbers are copied, not computed. Nothing in a file is executed.",
        "spiking-mlp convert official.pth -o runs/official\n"
        "  spiking-mlp convert cifar.pth -o runs/cifar --like cifar10 --set time_steps=6\n"
        "  spiking-mlp convert fashion_mnist -o fashion.safetensors",
        "Names and shapes tell what a network is made of, but not how its neurons compute nor how often an image is "
        "shown: that is taken from --set, --like or the paper, and printed. Files of PyTorch (.pth, .pt, .tar) need "
        "PyTorch; .safetensors and .npz do not.",
    )
    parser.add_argument("source", metavar="FILE_OR_NETWORK", help=f"a file of official weights; or {WHERE}")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="PATH",
        help="folder to make or file to write (.pth, .safetensors, .npz)",
    )
    group = parser.add_argument_group("from a file to a folder")
    group.add_argument(
        "--set", action="append", metavar="FIELD=VALUE", help="a field of the configuration, such as time_steps=6"
    )
    group.add_argument("--like", metavar="NETWORK", help="take what the file does not say from this network")
    group.add_argument("--key", metavar="KEY", help="which state of a checkpoint that holds several, such as model_ema")
    group.add_argument("--mean", nargs="+", type=float, metavar="X", help="mean of each channel, of pixels in [0, 1]")
    group.add_argument("--std", nargs="+", type=float, metavar="X", help="standard deviation of each channel")
    group.add_argument("--classes", metavar="NAMES", help="a file with a name a line, or names with commas")
    group.add_argument("--dataset", metavar="NAME", help='data that `evaluate` takes (default: "folder")')
    group.add_argument("--resize-mode", metavar="MODE", help='how images are fitted: "pad", "resize", "resize_crop"')
    group.add_argument("--eval-resize", type=int, metavar="N", help='shorter side before the crop of "resize_crop"')
    parser.set_defaults(run=_convert)


def _convert(chosen: argparse.Namespace) -> None:
    from spiking_mlp_jax.interop.official.files import SUFFIXES

    is_folder = os.path.isdir(chosen.source)
    if os.path.isfile(chosen.source) or (Path(chosen.source).suffix in SUFFIXES and not is_folder):
        if Path(chosen.output).suffix in SUFFIXES:
            raise InputError(f"{chosen.source} is a file and becomes a folder: name one, not {chosen.output}")
        _to_folder(chosen, Path(chosen.output))
    else:
        from spiking_mlp_jax.models.weights import find

        find(chosen.source)
        for name in OPTIONS:
            if getattr(chosen, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} goes with a file, and {chosen.source} is a network")
        _to_file(chosen, Path(chosen.output))


def _to_folder(chosen: argparse.Namespace, folder: Path) -> None:
    from spiking_mlp_jax.interop.official import convert
    from spiking_mlp_jax.interop.official.config import parse_fields
    from spiking_mlp_jax.interop.official.files import read_state
    from spiking_mlp_jax.models import weights

    given = parse_fields(chosen.set or [])
    like, like_data = None, None
    if chosen.like is not None:
        like, meta = weights.read_config(weights.find(chosen.like))
        like_data = like, meta.get("data", {})
    replaces = convert.check_folder(folder)
    stored = read_state(chosen.source, chosen.key)
    config, origins = convert.choose_config(stored, given, like)
    data, assumed = convert.data_of(
        config,
        mean=chosen.mean,
        std=chosen.std,
        classes=None if chosen.classes is None else convert.read_classes(chosen.classes),
        dataset=chosen.dataset,
        resize_mode=chosen.resize_mode,
        eval_resize=chosen.eval_resize,
        like=like_data,
    )
    state = convert.rounded(stored)
    model = convert.model_of(state, config)
    source = {"file": os.path.basename(chosen.source), "assumed": [*origins.assumed, *assumed]}
    try:
        weights.save(folder, model, {"data": data, "converted_from": source})
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}): give another place") from error
    _note(convert.not_finite(state))
    if any(a.dtype != stored[name].dtype for name, a in state.items()):
        _note(f"float64 in {chosen.source} was rounded to float32; JAX_ENABLE_X64=1 keeps it")
    print(f"{folder}: {len(state)} arrays of {chosen.source}" + (", in place of the weights there" if replaces else ""))
    values = {name: getattr(config, name) for name in (*origins.told, *origins.given, *origins.assumed)}
    print("told by the weights:", _listed(values, origins.told))
    if origins.given:
        print("given:", _listed(values, origins.given))
    if origins.assumed:
        print("assumed, as in the paper:", _listed(values, origins.assumed) + " (--set or --like changes them)")
    if assumed:
        print("assumed of images:", _listed(data, assumed))


def _to_file(chosen: argparse.Namespace, path: Path) -> None:
    from spiking_mlp_jax.interop.official.files import check_suffix, write_state

    check_suffix(path)
    check_export(path)
    from spiking_mlp_jax.models import weights

    folder = weights.find(chosen.source)
    from spiking_mlp_jax.interop.official import convert
    from spiking_mlp_jax.interop.official import state as official

    model, _ = weights.load(folder)
    state = official.dump(model)
    write_state(path, state)
    _note(convert.not_finite(state))
    print(f"{path}: {len(state)} arrays under the official names, {path.stat().st_size:,} bytes")
    unsaid = convert.unsaid(model.config)
    print("not in the file:", _listed(unsaid, list(unsaid)) + ", and how pixels become inputs")
    print(f"back to a folder: spiking-mlp convert {path} -o FOLDER --like {chosen.source}")


def _note(text: str) -> None:
    if text:
        print(f"note: {text}", file=sys.stderr)


def _listed(values: dict[str, Any], names) -> str:
    shown = {"class_names": lambda names: f"{names[0]} to {names[-1]}"}
    return ", ".join(f"{name} {shown.get(name, str)(values[name])}" for name in names) or "nothing"
