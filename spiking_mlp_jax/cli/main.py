"""The command `spiking-mlp`.

Modules that take long to import are imported by the commands that need them, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from spiking_mlp_jax import __version__
from spiking_mlp_jax.cli import demo as cli_demo
from spiking_mlp_jax.cli import deploy as cli_deploy
from spiking_mlp_jax.cli import export as cli_export
from spiking_mlp_jax.cli import prepare as cli_prepare
from spiking_mlp_jax.cli import probe as cli_probe
from spiking_mlp_jax.cli import report as cli_report
from spiking_mlp_jax.cli import sweep as cli_sweep
from spiking_mlp_jax.cli import train as cli_train
from spiking_mlp_jax.cli import weights as cli_weights
from spiking_mlp_jax.cli.deploy import NETWORK, WHERE
from spiking_mlp_jax.errors import InputError

if TYPE_CHECKING:
    from spiking_mlp_jax.models.spiking_mlp import SpikingMLP

TRAINING_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain", "ml_collections")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message}; see "{self.prog} --help"\n')


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: the command line without the program's name; None takes the process's.

    Returns:
        The exit status: 0, 1 when `audit` finds multiplications, 2 for bad input (one line on stderr says what is
        wrong), 130 after Ctrl-C, 141 when the reader of the output went away.
    """
    # Class and file names can hold what the terminal's encoding cannot.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    status = 0
    try:
        try:
            status = _run(arguments)
        finally:
            sys.stdout.flush()
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        # Compiled networks are run where numpy and numba are all there is.
        if (error.name or "").partition(".")[0] not in TRAINING_PACKAGES:
            raise
        print(f"error: this needs {error.name}, which is not installed: pip install spiking-mlp-jax", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


def _run(arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "train":
        return cli_train.main(arguments[1:])
    parser = _parser()
    chosen, rest = parser.parse_known_args(arguments)
    if rest := cli_sweep.take_overrides(chosen, rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if chosen.command is None:
        parser.print_help()
        return 0
    return chosen.run(chosen) or 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="spiking-mlp",
        description="Trains and uses spiking MLPs: classifies images, measures accuracy, draws plots, compiles them to "
        "integer networks without multiplications.",
        epilog='"spiking-mlp COMMAND --help" explains a command.',
    )
    parser.add_argument("--version", action="version", version=f"spiking-mlp-jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser(
        "train",
        help="train a network",
        description=cli_train.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[cli_train.parser(add_help=False)],
    )

    predict = _command(
        commands,
        "predict",
        "classify image files",
        "Prints the best classes of each image with their scores. A score is the softmax of the logits "
        "averaged over the time steps. Images of any size, grey or colour, are brought to the network's "
        "size as its test images were.",
        "spiking-mlp predict fashion_mnist shoe.png\n  spiking-mlp predict runs/demo *.jpg --top 3 --json\n"
        "  spiking-mlp predict fashion.smlp shoe.png --margin 3",
        "A network knows only what it was trained on: a picture in Fashion-MNIST shows one garment, light on "
        "black, that fills the frame. Photos that look otherwise are classified badly.",
    )
    predict.add_argument("weights", metavar="NETWORK", help=f"{WHERE}; or {NETWORK}, which needs no JAX")
    predict.add_argument("images", metavar="IMAGE", nargs="+", help="image file, such as JPEG or PNG")
    predict.add_argument("--top", type=_positive, default=5, metavar="N", help="how many classes to print (default: 5)")
    predict.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    _compiled_options(predict)
    predict.set_defaults(run=_predict)

    evaluate = _command(
        commands,
        "evaluate",
        "measure accuracy and firing rates on a test set",
        "Prints the accuracy over all test images, the accuracy of each class, and each layer's mean "
        "firing rate: the share of its neurons that spike in a time step. Silent (< 0.1 %) and saturated "
        "(> 95 %) layers are marked. Of a compiled network, accuracy and speed.",
        "spiking-mlp evaluate fashion_mnist\n  spiking-mlp evaluate runs/demo --limit 1000\n"
        "  spiking-mlp evaluate fashion.smlp --against fashion_mnist\n"
        "  spiking-mlp evaluate runs/flowers/weights --dataset folder --data-dir flowers",
    )
    evaluate.add_argument("weights", metavar="NETWORK", help=f"{WHERE}; or {NETWORK}")
    evaluate.add_argument(
        "--dataset",
        metavar="NAME",
        help='"fashion_mnist", "idx", "folder" or "tfds:NAME" (default: what the network was trained on)',
    )
    evaluate.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder of the data (default: the workdir's; none for embedded data)",
    )
    evaluate.add_argument(
        "--batch-size", type=_positive, default=256, metavar="N", help="images at a time (default: 256)"
    )
    evaluate.add_argument("--limit", type=_positive, metavar="N", help="only the first N test images")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    evaluate.add_argument(
        "--against", metavar="WEIGHTS", help="compiled network: also in how many predictions it agrees with these"
    )
    _compiled_options(evaluate)
    evaluate.set_defaults(run=_evaluate)

    plot = _command(
        commands,
        "plot",
        "draw the plots of a training run again",
        "Draws learning curves, confusion matrix, firing rates, one image's spikes and some predictions into "
        "WORKDIR/plots. Training does this at its end.",
        "spiking-mlp plot runs/demo",
    )
    plot.add_argument("workdir", metavar="WORKDIR", help="folder of a training run")
    plot.set_defaults(run=_plot)
    cli_deploy.add_commands(commands, _command, _positive)
    cli_weights.add_commands(commands, _command, _positive)
    cli_export.add_commands(commands, _command, _positive)
    cli_prepare.add_commands(commands, _command, _positive)
    cli_probe.add_commands(commands, _command, _positive)
    cli_sweep.add_commands(commands, _command, _positive)
    cli_report.add_commands(commands, _command, _positive)
    cli_demo.add_commands(commands, _command, _positive, _run)
    return parser


def _compiled_options(parser) -> None:
    group = parser.add_argument_group("compiled networks")
    group.add_argument("--steps", type=_positive, metavar="N", help="time steps to run (default: all)")
    group.add_argument(
        "--margin", type=_margin, metavar="M", help="stop an image as soon as its best class's mean logit leads by M"
    )


def _command(commands, name, summary, description, examples, note="") -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 79),
        epilog=f"examples:\n  {examples}" + (f"\n\n{textwrap.fill(note, 79)}" if note else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f'"{text}" is not a whole number of at least 1')
    return value


def _margin(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number of at least 0')
    return value


def _predict(chosen: argparse.Namespace) -> None:
    # A mistyped name is answered before anything slow is imported.
    for name in chosen.images:
        if not os.path.exists(name):
            raise InputError(f"there is no image {name}: give the path of an image file")
    from spiking_mlp_jax.data.image import read_image
    from spiking_mlp_jax.data.transforms import fit_image

    def fitted(config, data):
        fitting = config.image_size, config.in_channels, data["resize_mode"], data["eval_resize"]
        return np.stack([fit_image(read_image(name), *fitting) for name in chosen.images])

    taken = None
    if cli_deploy.is_compiled(chosen.weights):
        where, engine = chosen.weights, cli_deploy.open_engine(chosen.weights)
        config, data = engine.description, engine.description.data
        logits, taken = cli_deploy.mean_logits(engine, fitted(config, data), _steps(chosen, config), chosen.margin)
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
    else:
        _refuse_compiled_options(chosen)
        from spiking_mlp_jax.utils.compilation_cache import use_compilation_cache

        use_compilation_cache("auto")
        where, model, meta = _load(chosen.weights)
        config, data = model.config, meta["data"]
        from spiking_mlp_jax.deploy.predict import class_scores

        scores = class_scores(model, fitted(config, data), data["mean"], data["std"])
        if not np.all(np.isfinite(scores)):
            raise InputError(
                f"the network in {where} gives scores that are no numbers: train it again with a lower rate"
            )
    steps = getattr(chosen, "steps", None) or config.time_steps
    meaning = f"softmax of the logits averaged over {steps} time step{'s' * (steps > 1)}"
    if chosen.margin is not None:
        meaning = "softmax of the logits averaged over the time steps that each image took"
    found = []
    for i, (name, score) in enumerate(zip(chosen.images, scores, strict=True)):
        best = np.argsort(-score, kind="stable")[: chosen.top].tolist()
        classes = [{"class": data["class_names"][c], "label": c, "score": float(score[c])} for c in best]
        steps = {} if chosen.margin is None or taken is None else {"steps": int(taken[i])}
        found.append({"image": name, "classes": classes, **steps})
    if chosen.json:
        print(json.dumps({"weights": str(where), "score": meaning, "images": found}, indent=1))
        return
    print(f"scores: {meaning}")
    for entry in found:
        print(entry["image"] + (f"  ({entry['steps']} of {config.time_steps} steps)" if "steps" in entry else ""))
        for place in entry["classes"]:
            print(f"  {100 * place['score']:6.2f} %  {place['class']}")


def _steps(chosen, config) -> int | None:
    if chosen.steps is not None and chosen.steps > config.time_steps:
        raise InputError(f"--steps {chosen.steps} is more than the {config.time_steps} the network was trained for")
    return chosen.steps


def _refuse_compiled_options(chosen: argparse.Namespace) -> None:
    for name in ("steps", "margin", "against"):
        if getattr(chosen, name, None) is not None:
            raise InputError(f"--{name} goes with {NETWORK}, and {chosen.weights} is none")


def _evaluate(chosen: argparse.Namespace) -> None:
    if cli_deploy.is_compiled(chosen.weights):
        return cli_deploy.evaluate(chosen, _steps)
    _refuse_compiled_options(chosen)
    from spiking_mlp_jax.analysis.activity.stream import SPIKES, in_network_order
    from spiking_mlp_jax.data.sources import Chosen, open_source
    from spiking_mlp_jax.models import weights
    from spiking_mlp_jax.train.evaluate import evaluate_source, silent_and_saturated
    from spiking_mlp_jax.train.logging import to_json
    from spiking_mlp_jax.utils.compilation_cache import use_compilation_cache
    from spiking_mlp_jax.utils.progress import tracked

    use_compilation_cache("auto")
    folder, model, meta = _load(chosen.weights)
    data, config = meta["data"], model.config
    dataset, data_dir = chosen.dataset or data["dataset"], chosen.data_dir
    if chosen.dataset is None and data_dir is None:
        data_dir = weights.data_dir(folder)
    source = open_source(dataset, "test", data_dir)
    if len(source.class_names) != config.num_classes:
        raise InputError(
            f"the network in {folder} knows {config.num_classes} classes, but {dataset} has "
            f"{len(source.class_names)}: name its own data with --dataset and --data-dir"
        )
    if list(source.class_names) != data["class_names"]:
        print(
            f"note: the classes of {dataset} have other names than those the network was trained on",
            file=sys.stderr,
        )
    if chosen.limit is not None:
        source = Chosen(source, range(min(chosen.limit, len(source))))
    bad = weights.max_bad_images(folder)
    result = evaluate_source(model, source, data, batch_size=chosen.batch_size, max_bad_images=bad, shown=tracked)
    rates = in_network_order(result.firing_rates, config)
    silent, saturated = silent_and_saturated(rates)
    if chosen.json:
        document = {"weights": str(folder), "dataset": dataset, "class_names": list(source.class_names)}
        document |= {**result.to_dict(), "firing_rates": rates, "silent": silent, "saturated": saturated}
        print(to_json(document, indent=1))
        return
    right = f"{int(np.trace(result.confusion)):,} of {result.images:,} test images"
    print(f"accuracy {100 * result.accuracy:.2f} % ({right}), loss {result.loss:.4f}")
    print("\naccuracy of each class")
    width = max(map(len, source.class_names))
    for name, accuracy, images in zip(
        source.class_names, result.class_accuracy, result.confusion.sum(1).tolist(), strict=True
    ):
        share = "      -  " if accuracy is None else f"{100 * accuracy:6.2f} %"
        print(f"  {name:{width}}  {share}  of {images:,} images")
    print("\nmean firing rate of each layer")
    width = max(len(name.removesuffix(SPIKES)) for name in rates)
    for name, rate in rates.items():
        mark = "  silent (< 0.1 %)" if name in silent else "  saturated (> 95 %)" if name in saturated else ""
        print(f"  {name.removesuffix(SPIKES):{width}}  {100 * rate:6.2f} %{mark}")


def _plot(chosen: argparse.Namespace) -> None:
    from spiking_mlp_jax.analysis.plots import plot_workdir
    from spiking_mlp_jax.utils.compilation_cache import use_compilation_cache

    use_compilation_cache("auto")
    for path in plot_workdir(chosen.workdir):
        print(path)


def _load(where: str) -> tuple[Path, SpikingMLP, dict[str, Any]]:
    from spiking_mlp_jax.models import weights

    folder = weights.find(where)
    model, meta = weights.load(folder)
    if "data" not in meta:
        raise InputError(f'{folder / weights.CONFIG} has no "data", which says how images become inputs: save it again')
    return folder, model, meta


if __name__ == "__main__":
    sys.exit(main())
