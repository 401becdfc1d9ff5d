"""The commands `predict`, `evaluate` and `plot`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from spiking_mlp_jax.cli.options import (
    NETWORK,
    WHERE,
    add_command,
    add_data,
    add_json,
    add_value,
    is_compiled,
    number,
    positive,
    use_jax_cache,
)
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.paths import user_path


def add_commands(commands) -> None:
    """Add the parsers to the subparsers of `spiking-mlp`."""
    parser = add_command(
        commands,
        "predict",
        "classify image files",
        "Prints the best classes of each image with their scores. A score is the softmax of the logits averaged over "
        "the time steps. Images of any size, gray or color, are resized as the network's test images were.",
        "spiking-mlp predict fashion_mnist shoe.png\n  spiking-mlp predict runs/demo *.jpg --top 3 --json\n"
        "  spiking-mlp predict fashion.smlp shoe.png --margin 3",
        "A network knows only what it was trained on: an image of Fashion-MNIST shows one garment, light on black, "
        "that fills the frame. Photos that look different are classified badly.",
        run=_predict,
    )
    parser.add_argument("network", metavar="NETWORK", help=f"{WHERE}; or {NETWORK}, which needs no JAX")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file, e.g. JPEG or PNG")
    add_value(parser, "--top", 5, "classes to print per image")
    add_json(parser)
    _add_compiled(parser)

    parser = add_command(
        commands,
        "evaluate",
        "measure accuracy and firing rates on a test set",
        "Prints the accuracy on the test images, overall and per class, and each layer's mean firing rate: the "
        "fraction of its neurons that spike in a time step. Silent (< 0.1 %) and saturated (> 95 %) layers are marked. "
        "For a compiled network, prints accuracy and speed.",
        "spiking-mlp evaluate fashion_mnist\n  spiking-mlp evaluate runs/demo --limit 1000\n"
        "  spiking-mlp evaluate fashion.smlp --against fashion_mnist\n"
        "  spiking-mlp evaluate runs/flowers/weights --dataset folder --data-dir flowers",
        run=_evaluate,
    )
    parser.add_argument("network", metavar="NETWORK", help=f"{WHERE}; or {NETWORK}")
    add_data(parser, batch_size=256, limit="use only N test images, evenly spaced")
    add_json(parser)
    group = _add_compiled(parser)
    parser.add_argument(
        "--allow-other-data", action="store_true", help="evaluate classes with other names, label by label"
    )
    group.add_argument("--against", metavar="WEIGHTS", help="also compare predictions with this trained network's")

    parser = add_command(
        commands,
        "plot",
        "redraw the plots of a training run",
        "Draws learning curves, confusion matrix, firing rates, one image's spikes and some predictions into "
        "WORKDIR/plots, as training does at its end.",
        "spiking-mlp plot runs/demo",
        run=_plot,
    )
    parser.add_argument("workdir", metavar="WORKDIR", help="folder of a training run")


def _add_compiled(parser):
    group = parser.add_argument_group("compiled networks")
    group.add_argument("--steps", type=positive, metavar="N", help="time steps to run (default: all)")
    group.add_argument(
        "--margin",
        type=number(0),
        metavar="M",
        help="stop an image as soon as its best class's mean logit leads by M",
    )
    return group


def _check_compiled(chosen: argparse.Namespace) -> bool:
    if is_compiled(chosen.network):
        return True
    for name in ("steps", "margin", "against"):
        if getattr(chosen, name, None) is not None:
            raise InputError(f"--{name} needs {NETWORK}, got {chosen.network}")
    use_jax_cache()
    return False


def _predict(chosen: argparse.Namespace) -> None:
    # A mistyped name is reported before anything slow is imported.
    for name in chosen.images:
        if not os.path.exists(user_path(name)):
            raise InputError(f"there is no image {name}: give the path of an image file")
    where = chosen.network
    if not _check_compiled(chosen):
        from spiking_mlp_jax.models.weights import find

        where = find(where)
    from spiking_mlp_jax.deploy.predict import classify, config_of, open_network

    network = open_network(where)
    guesses = classify(network, chosen.images, chosen.top, steps=chosen.steps, margin=chosen.margin)
    if chosen.margin is None:
        steps = guesses[0][0].steps
        meaning = f"softmax of the logits averaged over {steps} time step{'s' * (steps > 1)}"
    else:
        meaning = "softmax of the logits averaged over each image's time steps"
    found = []
    for name, best in zip(chosen.images, guesses, strict=True):
        classes = [{"class": guess.name, "label": guess.label, "score": guess.score} for guess in best]
        steps = {} if chosen.margin is None else {"steps": best[0].steps}
        found.append({"image": name, "classes": classes, **steps})
    if chosen.json:
        print(json.dumps({"weights": str(where), "score": meaning, "images": found}, indent=1))
        return
    print(f"scores: {meaning}")
    for entry in found:
        of = f"of {config_of(network).time_steps} time steps"
        print(entry["image"] + (f"  ({entry['steps']} {of})" if "steps" in entry else ""))
        for place in entry["classes"]:
            print(f"  {100 * place['score']:6.2f} %  {place['class']}")


def _evaluate(chosen: argparse.Namespace) -> None:
    options = {name: getattr(chosen, name) for name in ("limit", "batch_size", "steps", "margin", "against")}
    if not _check_compiled(chosen):
        return _evaluate_trained(chosen, options)
    from spiking_mlp_jax.analysis.evaluate import CompiledEvaluation, check_labels, evaluate
    from spiking_mlp_jax.deploy.predict import config_of, open_network, test_images
    from spiking_mlp_jax.utils.progress import tracked

    network: Any = open_network(chosen.network)
    source = test_images(network, chosen.dataset, chosen.data_dir, chosen.against)
    _note(check_labels(network.description.data, source, chosen.network, chosen.allow_other_data))
    found = evaluate(network, source, shown=tracked, **options)
    assert isinstance(found, CompiledEvaluation)
    if chosen.json:
        against = {} if chosen.against is None else {"against": chosen.against}
        print(json.dumps({"network": chosen.network, **found.to_dict(), **against}, indent=1))
        return
    correct = round(found.accuracy * found.images)
    print(f"accuracy {100 * found.accuracy:.2f} % ({correct:,} of {found.images:,} test images)")
    print(f"{found.steps:.2f} of {config_of(network).time_steps} time steps per image")
    print(f"{found.images_per_second:,.0f} images/s on {found.threads} thread{'s' * (found.threads > 1)}")
    if found.agreement is not None:
        print(f"same class as {chosen.against} in floating point: {100 * found.agreement:.2f} %")


def _evaluate_trained(chosen: argparse.Namespace, options) -> None:
    from spiking_mlp_jax.analysis.activity.stream import SPIKES, in_network_order
    from spiking_mlp_jax.analysis.evaluate import check_labels, evaluate
    from spiking_mlp_jax.data.trained import open_trained
    from spiking_mlp_jax.train.evaluate import Evaluation, silent_and_saturated
    from spiking_mlp_jax.train.logging import to_json
    from spiking_mlp_jax.utils.progress import tracked

    trained = open_trained(chosen.network)
    dataset = chosen.dataset or trained.data["dataset"]
    source = trained.source("test", chosen.dataset, chosen.data_dir)
    _note(check_labels(trained.data, source, trained.name, chosen.allow_other_data))
    result = evaluate(trained, source, shown=tracked, **options)
    assert isinstance(result, Evaluation)
    rates = in_network_order(result.firing_rates, trained.model.config)
    silent, saturated = silent_and_saturated(rates)
    if chosen.json:
        document = {"weights": str(trained.folder), "dataset": dataset, "class_names": list(source.class_names)}
        document |= {**result.to_dict(), "firing_rates": rates, "silent": silent, "saturated": saturated}
        print(to_json(document, indent=1))
        return
    correct = f"{int(result.confusion.trace()):,} of {result.images:,} test images"
    print(f"accuracy {100 * result.accuracy:.2f} % ({correct}), loss {result.loss:.4f}")
    print("\naccuracy per class")
    width = max(map(len, source.class_names))
    counts = result.confusion.sum(1).tolist()
    for name, accuracy, images in zip(source.class_names, result.class_accuracy, counts, strict=True):
        share = "      -  " if accuracy is None else f"{100 * accuracy:6.2f} %"
        print(f"  {name:{width}}  {share}  of {images:,} images")
    print("\nmean firing rate per layer")
    width = max(len(name.removesuffix(SPIKES)) for name in rates)
    for name, rate in rates.items():
        mark = "  silent (< 0.1 %)" if name in silent else "  saturated (> 95 %)" if name in saturated else ""
        print(f"  {name.removesuffix(SPIKES):{width}}  {100 * rate:6.2f} %{mark}")


def _note(found: list[str]) -> None:
    if found:
        print(f"note: other data than the training run's: {'; '.join(found)}", file=sys.stderr)


def _plot(chosen: argparse.Namespace) -> None:
    from spiking_mlp_jax.analysis.plots import plot_workdir

    use_jax_cache()
    for path in plot_workdir(chosen.workdir):
        print(path)
