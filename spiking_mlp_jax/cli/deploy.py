"""The commands of `spiking-mlp` that make and use deployed networks: compile, audit, cost, export-c, and
predict from a file.

Nothing here imports JAX before a command needs it: `predict` with a compiled network runs where it is not installed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spiking_mlp_jax.errors import InputError

if TYPE_CHECKING:
    from spiking_mlp_jax.deploy.engine import Engine
    from spiking_mlp_jax.deploy.network import IntegerNet

WHERE = "a training run's workdir, a weights folder, a shipped network's name, or OWNER/NAME on the Hugging Face Hub"
NETWORK = "a network that `spiking-mlp compile` wrote"


def add_commands(commands, command, positive) -> None:
    """Adds the commands' parsers.

    Args:
        commands: of argparse.
        command: function that makes one with a summary, a description, examples and a note.
        positive: type of whole numbers from 1 on.
    """
    parser = command(
        commands,
        "compile",
        "make an integer network without multiplications",
        "Folds the norms of a trained network into weights and thresholds, rounds them to integers, proves that no sum "
        "can overflow, and writes one file that runs without JAX, from pixels to class scores.",
        "spiking-mlp compile fashion_mnist -o fashion.smlp\n  spiking-mlp compile runs/demo -o demo.smlp --bits 4",
        "Rounding looks at some training images: which inputs of a layer spike together decides how its weights are "
        "rounded. They come from the data that the network was trained on.",
    )
    parser.add_argument("weights", metavar="WORKDIR_OR_WEIGHTS", help=WHERE)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write, such as net.smlp")
    parser.add_argument("--bits", type=int, default=8, metavar="N", help="bits of a weight, 2 to 8 (default: 8)")
    parser.add_argument(
        "--images", type=positive, default=512, metavar="N", help="training images to look at (default: 512)"
    )
    parser.add_argument("--dataset", metavar="NAME", help="data to take them from (default: what it was trained on)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data (default: the workdir's)")
    parser.set_defaults(run=_compile)

    parser = command(
        commands,
        "audit",
        "list every operation of a network and whether it multiplies",
        "Reads the program of a network, operation by operation, and tells for each whether it only accumulates (one "
        "operand is a spike), shifts, adds or compares, or multiplies. The exit status is 0 if nothing multiplies, "
        "else 1.",
        "spiking-mlp audit fashion.smlp\n  spiking-mlp audit fashion_mnist\n  spiking-mlp audit fashion_mnist --folded",
    )
    parser.add_argument("network", metavar="NETWORK", help=f"{NETWORK}; or {WHERE}: its evaluation in floating point")
    parser.add_argument("--folded", action="store_true", help="with weights: the network whose norms are folded away")
    parser.add_argument(
        "--compiled", action="store_true", help="also the machine code that the engine compiles (compiled networks)"
    )
    parser.set_defaults(run=_audit)

    parser = command(
        commands,
        "cost",
        "count a network's operations and estimate its energy",
        "Counts, layer by layer, the operations that test images cause: NeuroBench's Footprint, ConnectionSparsity, "
        "ActivationSparsity and SynapticOperations. Estimates the energy of an image in a 45 nm process, with and "
        "without memory, beside the same network dense and beside one that is not spiking.",
        "spiking-mlp cost fashion_mnist --limit 1000\n  spiking-mlp cost fashion.smlp --json\n"
        "  spiking-mlp cost runs/demo --folded --plot cost.png",
        "Trained weights are counted and priced in float32, a compiled network in integers.",
    )
    parser.add_argument("network", metavar="NETWORK", help=f"{WHERE}; or {NETWORK}")
    parser.add_argument("--folded", action="store_true", help="with weights: the network whose norms are folded away")
    parser.add_argument("--dataset", metavar="NAME", help="data to run on (default: what it was trained on)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data (default: the workdir's)")
    parser.add_argument("--batch-size", type=positive, default=100, metavar="N", help="images at a time (default: 100)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N test images")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--plot", metavar="FILE", help="also draw operations and energy into a PNG file")
    parser.set_defaults(run=_cost)

    parser = command(
        commands,
        "export-c",
        "write a compiled network as one C99 file",
        "Writes one C file with the weights in it, that allocates nothing, uses no floating point and multiplies "
        "nothing, for a microcontroller or a tool that makes hardware of C.",
        "spiking-mlp export-c fashion.smlp -o fashion.c",
    )
    parser.add_argument("network", metavar="NETWORK", help=NETWORK)
    parser.add_argument("-o", "--output", metavar="FILE", help="file to write (default: NETWORK with the ending .c)")
    parser.set_defaults(run=_export_c)


def check_export(output: Path) -> None:
    """Refuses a place to which an exported network cannot be written.

    Raises:
        InputError: it is a folder or in none, or would take the place of a weights folder's file.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"{output} cannot be written: name a file in a folder that exists")
    if (output.parent / "config.json").is_file():
        from spiking_mlp_jax.models.weights import FILES

        if output.name in FILES:
            raise InputError(f"{output} belongs to a weights folder, which would be lost: name another file")


def refuse_compiled(where: str, why: str) -> None:
    """Refuses a compiled network where weights are needed.

    Raises:
        InputError: it is one, which `why` answers, or has its name and is not there.
    """
    if is_compiled(where):
        if not os.path.isfile(where):
            raise InputError(f"there is no file {where}: give a network")
        raise InputError(f"{where} is a compiled network, {why}")


def is_compiled(where: str) -> bool:
    """Whether the user means a compiled network, by its name or its first bytes."""
    if where.endswith(".smlp"):
        return not os.path.isdir(where)
    if not os.path.isfile(where):
        return False
    from spiking_mlp_jax.deploy.artifact import MAGIC

    with open(where, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_engine(where: str) -> Engine:
    """The engine of a compiled network that knows how pictures become pixels.

    Raises:
        InputError: no such file, a damaged one, or one without "data".
    """
    from spiking_mlp_jax.deploy.engine import Engine

    engine = Engine(where)
    if not engine.description.data:
        raise InputError(f"{where} does not say how pictures become pixels: compile it from weights that do")
    return engine


def mean_logits(engine: Engine, images: np.ndarray, steps: int | None, margin: float | None):
    """Mean logits, float64 [B, K], of uint8 images, and the steps that each took, int [B]."""
    most = engine.description.time_steps if steps is None else steps
    if margin is None:
        scores, taken = engine.predict(images, steps), np.full(len(images), most)
    else:
        scores, taken = engine.predict_early(images, margin, steps=steps)
    return scores * engine.score_scale / taken[:, None], taken


def evaluate(chosen: argparse.Namespace, steps_of) -> None:
    """`spiking-mlp evaluate` for a compiled network."""
    import json
    import time

    from spiking_mlp_jax.data.sources import open_source
    from spiking_mlp_jax.data.transforms import fit_image

    engine = open_engine(chosen.weights)
    c, data = engine.description, engine.description.data
    steps = steps_of(chosen, c)
    source = open_source(chosen.dataset or data["dataset"], "test", chosen.data_dir)
    if len(source.class_names) != c.num_classes:
        raise InputError(
            f"{chosen.weights} knows {c.num_classes} classes, but the data have {len(source.class_names)}: name its "
            "own data with --dataset and --data-dir"
        )
    against = _FloatNetwork(chosen.against, c) if chosen.against else None
    count = min(len(source), chosen.limit or len(source))
    fitting = c.image_size, c.in_channels, data["resize_mode"], data["eval_resize"]
    right = agreed = taken = 0
    seconds = 0.0
    for start in range(0, count, chosen.batch_size):
        items = [source[i] for i in range(start, min(start + chosen.batch_size, count))]
        images = np.stack([fit_image(x["image"], *fitting) for x in items])
        if not start:
            engine.predict(images[:1])  # compiles
        begun = time.perf_counter()
        logits, used = mean_logits(engine, images, steps, chosen.margin)
        seconds += time.perf_counter() - begun
        found = logits.argmax(1)
        right += int(np.sum(found == np.array([x["label"] for x in items])))
        taken += int(used.sum())
        if against is not None:
            agreed += int(np.sum(found == against.classes(images)))
    document = {"network": str(chosen.weights), "images": count, "accuracy": right / count}
    document |= {"steps": taken / count, "images_per_second": count / seconds, "threads": engine.threads}
    if against is not None:
        document |= {"against": str(against.folder), "agreement": agreed / count}
    if chosen.json:
        print(json.dumps(document, indent=1))
        return
    print(f"accuracy {100 * right / count:.2f} % ({right:,} of {count:,} test images)")
    print(f"{taken / count:.2f} of {c.time_steps} time steps an image")
    print(f"{count / seconds:,.0f} images/s on {engine.threads} thread{'s' * (engine.threads > 1)}")
    if against is not None:
        print(f"the same class as {against.folder} in floating point: {100 * agreed / count:.2f} %")


class _FloatNetwork:
    """Trained weights, evaluated in floating point, for images of a compiled network."""

    def __init__(self, where: str, c):
        from spiking_mlp_jax.models import weights

        self.folder = folder = weights.find(where)
        self.model, meta = weights.load(folder)
        if "data" not in meta:
            raise InputError(f'{folder} has no "data", which says how images become inputs: save it again')
        config, self.data = self.model.config, meta["data"]
        if (config.image_size, config.in_channels, config.num_classes) != (c.image_size, c.in_channels, c.num_classes):
            raise InputError(f"the network in {folder} takes other images or knows other classes: name its own weights")

    def classes(self, images: np.ndarray) -> np.ndarray:
        from spiking_mlp_jax.deploy.predict import class_scores

        return class_scores(self.model, images, self.data["mean"], self.data["std"]).argmax(1)


def describe(net: IntegerNet) -> str:
    """What a user wants to know of a compiled network, in a line."""
    c = net.description
    narrow = sum(f.word == 16 for f in c.formats.values())
    weights = sum(x.size for name, x in net.arrays.items() if name.endswith(".kernel"))
    return (
        f"{weights:,} weights of {c.bits} bits, {c.time_steps} time steps, potentials of 16 bits at {narrow} of "
        f"{len(c.formats)} places and of 32 at the others"
    )


def _compile(chosen: argparse.Namespace) -> None:
    output = Path(chosen.output)
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"{output} cannot be written: name a file in a folder that exists")
    from spiking_mlp_jax.deploy import artifact
    from spiking_mlp_jax.deploy.compile import compile_weights
    from spiking_mlp_jax.models import weights
    from spiking_mlp_jax.utils.compilation_cache import use_compilation_cache

    use_compilation_cache("auto")
    folder = weights.find(chosen.weights)
    net = compile_weights(folder, chosen.bits, images=chosen.images, dataset=chosen.dataset, data_dir=chosen.data_dir)
    artifact.save(net, output)
    before = weights.tensors_file(folder).stat().st_size
    print(f"{output}: {describe(net)}")
    print(f"{output.stat().st_size:,} bytes; the trained weights are {before:,}")
    print("no sum can overflow, whatever the image; `spiking-mlp audit` lists every operation")


def _audit(chosen: argparse.Namespace) -> int:
    from spiking_mlp_jax.deploy.audit import audit

    if is_compiled(chosen.network):
        if chosen.folded:
            raise InputError("a compiled network has no norms left: --folded goes with weights")
        from spiking_mlp_jax.deploy import artifact

        net = artifact.load(chosen.network)
        c = net.description
        report = audit(net, np.zeros((1, c.image_size, c.image_size, c.in_channels), np.uint8))
        print(report)
        if not chosen.compiled:
            return 0 if report.ok else 1
        from spiking_mlp_jax.deploy.engine import Engine
        from spiking_mlp_jax.deploy.engine.machine_code import check

        compiled = check(Engine(net))
        print(compiled)
        return 0 if report.ok and compiled.ok else 1
    if chosen.compiled:
        raise InputError(f"--compiled goes with {NETWORK}")
    from spiking_mlp_jax.models import weights

    model, _ = weights.load(weights.find(chosen.network))
    c = model.config
    run: Any = model
    if chosen.folded:
        from spiking_mlp_jax.deploy.fold import fold

        run = fold(model)
    report = audit(lambda x: run(x), np.zeros((1, c.image_size, c.image_size, c.in_channels), np.float32))
    print(report)
    return 0 if report.ok else 1


def _cost(chosen: argparse.Namespace) -> None:
    if is_compiled(chosen.network) and chosen.folded:
        raise InputError("a compiled network has no norms left: --folded goes with weights")
    if chosen.plot and (os.path.isdir(chosen.plot) or not Path(chosen.plot).parent.is_dir()):
        raise InputError(f"{chosen.plot} cannot be written: name a file in a folder that exists")
    import json

    from spiking_mlp_jax.data.sources import open_source
    from spiking_mlp_jax.data.transforms import fit_image
    from spiking_mlp_jax.deploy.cost import cost
    from spiking_mlp_jax.utils.compilation_cache import use_compilation_cache

    use_compilation_cache("auto")
    net: Any
    data_dir = chosen.data_dir
    if is_compiled(chosen.network):
        from spiking_mlp_jax.deploy import artifact

        where, net = chosen.network, artifact.load(chosen.network)
        c, data = net.description, net.description.data
        if not data:
            raise InputError(f"{where} does not say how pictures become pixels: compile it from weights that do")
    else:
        from spiking_mlp_jax.deploy.fold import fold
        from spiking_mlp_jax.models import weights

        where = weights.find(chosen.network)
        model, meta = weights.load(where)
        if "data" not in meta:
            raise InputError(f'{where / weights.CONFIG} has no "data", which says how images become inputs')
        c, data, net = model.config, meta["data"], fold(model) if chosen.folded else model
        if data_dir is None and chosen.dataset is None:
            data_dir = weights.data_dir(where)
    source = open_source(chosen.dataset or data["dataset"], "test", data_dir)
    count = min(len(source), chosen.limit or len(source))
    fitting = c.image_size, c.in_channels, data["resize_mode"], data["eval_resize"]
    batches = (
        np.stack([fit_image(source[i]["image"], *fitting) for i in range(at, min(at + chosen.batch_size, count))])
        for at in range(0, count, chosen.batch_size)
    )
    found = cost(net, batches)
    if chosen.plot:
        from spiking_mlp_jax.analysis.network_plots import plot_cost

        plot_cost(found, chosen.plot)
    if chosen.json:
        print(json.dumps({"weights": str(where), **found.to_dict()}, indent=1))
        return
    print(found)
    if chosen.plot:
        print(f"\n{chosen.plot}")


def _export_c(chosen: argparse.Namespace) -> None:
    if not is_compiled(chosen.network):
        raise InputError(f"{chosen.network} is not {NETWORK}: compile it first")
    from spiking_mlp_jax.deploy import artifact
    from spiking_mlp_jax.deploy.c import export_c

    output = Path(chosen.output) if chosen.output else Path(chosen.network).with_suffix(".c")
    if output.exists() and output.samefile(chosen.network):
        raise InputError(f"{output} is the network itself, which the C file would replace: give another -o")
    memory = export_c(artifact.load(chosen.network), output)
    print(f"{output}: {memory.constants:,} bytes of constants, {memory.ram:,} bytes of RAM")
    sys.stdout.flush()
    print(f"try it: cc -std=c99 -O2 -DSMLP_MAIN {output} -o {output.stem}", file=sys.stderr)
