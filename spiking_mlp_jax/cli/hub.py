"""The command `spiking-mlp hub`: a trained network as a folder that can be shared."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from spiking_mlp_jax.cli.deploy import WHERE
from spiking_mlp_jax.errors import InputError


def add_commands(commands, command, positive) -> None:
    """Adds the commands' parsers; the arguments are those of `cli_deploy.add_commands`."""
    parser = command(
        commands,
        "hub",
        "write a trained network as a folder for the Hugging Face Hub",
        "Writes the weights, their configuration, a model card (data, accuracy, commands, hashes, licence) and "
        "checksums into one folder. predict, evaluate, compile and all other commands take it, and refuse it when a "
        "file is not the one that was written.",
        "spiking-mlp hub fashion_mnist -o shared/fashion_mnist --license mit\n"
        "  spiking-mlp hub runs/pets -o pets --evaluate --trained-on 'the Oxford-IIIT Pet photos' --repo me/pets",
        'Upload it with "hf upload OWNER/NAME FOLDER". The accuracy on the card is that of the training run\'s best '
        "evaluation, or with --evaluate measured now.",
    )
    parser.add_argument("weights", metavar="WORKDIR_OR_WEIGHTS", help=WHERE)
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--name", metavar="NAME", help="what the network is called (default: the folder's name)")
    parser.add_argument(
        "--license", "--licence", metavar="ID", help='of the weights, such as "mit", "apache-2.0" or "cc-by-4.0"'
    )
    parser.add_argument("--trained-on", metavar="TEXT", help="the data in words")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="where it will be on the Hub")
    parser.add_argument("--evaluate", action="store_true", help="measure the accuracy on all test images now")
    parser.add_argument("--dataset", metavar="NAME", help="with --evaluate: other test images than the network's own")
    parser.add_argument("--data-dir", metavar="DIR", help="with --evaluate: folder of the data")
    parser.set_defaults(run=_hub)


def _hub(chosen: argparse.Namespace) -> None:
    if not chosen.evaluate and (chosen.dataset or chosen.data_dir):
        raise InputError("--dataset and --data-dir go with --evaluate: add it, or leave them out")
    output = Path(chosen.output)
    if os.path.exists(output) and not os.path.isdir(output):
        raise InputError(f"{output} is a file: name a folder with -o")
    from spiking_mlp_jax.interop.hub import save_pretrained
    from spiking_mlp_jax.models import weights

    folder = weights.find(chosen.weights)
    model, meta = weights.load(folder)
    if chosen.evaluate:
        meta["result"] = _measured(folder, model, meta, chosen)
    license = chosen.license or meta.get("license")
    save_pretrained(
        output,
        model,
        meta,
        name=chosen.name or output.resolve().name,
        license=license or "unknown",
        trained_on=chosen.trained_on,
        repo=chosen.repo or meta.get("repo"),
    )
    if license is None:
        print("note: the card says licence unknown; name it with --license, such as mit", file=sys.stderr)
    for name in sorted(path.name for path in output.iterdir()):
        print(output / name)


def _measured(folder, model, meta, chosen):
    from spiking_mlp_jax.analysis.samples import open_test_images
    from spiking_mlp_jax.models import weights
    from spiking_mlp_jax.train.evaluate import evaluate_source
    from spiking_mlp_jax.utils.compilation_cache import use_compilation_cache
    from spiking_mlp_jax.utils.progress import tracked

    use_compilation_cache("auto")
    _, _, data, source = open_test_images(str(folder), chosen.dataset, chosen.data_dir)
    if len(source.class_names) != model.config.num_classes:
        raise InputError(
            f"the network in {folder} knows {model.config.num_classes} classes, but the data have "
            f"{len(source.class_names)}: name its own data with --dataset and --data-dir"
        )
    bad = weights.max_bad_images(folder)
    found = evaluate_source(model, source, data, batch_size=256, max_bad_images=bad, shown=tracked)
    other = {"dataset": chosen.dataset} if chosen.dataset not in (None, data["dataset"]) else {}
    return {"accuracy": found.accuracy, "loss": found.loss, "images": found.images, **other}
