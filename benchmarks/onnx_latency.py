"""The accumulate-only engine beside ONNX Runtime, on the files that `compile` and `export-onnx` write.

    python -m benchmarks.onnx_latency
    python -m benchmarks.onnx_latency cifar10 --data-dir DIR --batches 1 --threads 1

All sides classify the same test images from raw pixels, alternating in one process with the same number of threads;
ONNX Runtime's sleep while others work. Figures are medians over rounds, ratios medians of the rounds' ratios.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import report
from spiking_mlp_jax.cli.options import add_data_dir, positive
from spiking_mlp_jax.errors import InputError

ENGINE = "engine, int8"
COLUMNS = ("batch", "threads", "side", "ms per image", "engine is faster by", "accuracy", "same class as the engine")


def main() -> int:
    args = _parse()
    try:
        for name in args.networks:
            sides, images, labels, size = prepare(name, args.data_dir, args.images)
            print(f"\n**{name}**, {len(images)} test images; {size}\n\n{report.head(COLUMNS)}")
            for threads in args.threads:
                for batch in args.batches:
                    for row in measure(sides, images, labels, batch, threads, args.runs):
                        print(report.line(row), flush=True)
    except (InputError, ModuleNotFoundError) as error:
        return report.fail(error)
    return 0


def prepare(name: str, data_dir: str | None, count: int) -> tuple[dict[str, Any], np.ndarray, np.ndarray, str]:
    """The sides' networks, test images, their classes, and a text with the files' sizes."""
    from spiking_mlp_jax.analysis.samples import take
    from spiking_mlp_jax.deploy import artifact
    from spiking_mlp_jax.deploy.compile import compile
    from spiking_mlp_jax.deploy.fold import fold
    from spiking_mlp_jax.interop.onnx.floating import float_model
    from spiking_mlp_jax.interop.onnx.integer import integer_model
    from spiking_mlp_jax.models import weights

    folder = weights.find(name)
    model, meta = weights.load(folder)
    samples = take(model.config, meta["data"], count, data_dir=data_dir)
    net = compile(folder, data_dir=data_dir)
    floating = float_model(fold(model), pixels=True, data=meta["data"]).SerializeToString()
    integer = integer_model(net).SerializeToString()
    size = f".smlp {artifact.size(net):,}, ONNX float {len(floating):,}, ONNX integer {len(integer):,} bytes"
    sides = {ENGINE: net, "ONNX Runtime, integer": integer, "ONNX Runtime, float": floating}
    return sides, samples.raw, samples.labels, size


def measure(sides, images, labels, batch, threads, runs) -> list[list[str]]:
    """Rows of a table: all sides alternate over the images, `batch` at a time."""
    ready = {side: _runner(what, threads) for side, what in sides.items()}
    batches = [images[i : i + batch] for i in range(0, len(images) // batch * batch, batch)]
    classes = {side: np.concatenate([run(images) for images in batches]) for side, run in ready.items()}
    seconds: dict[str, list[float]] = {side: [] for side in ready}
    for _ in range(runs):
        for side, run in ready.items():
            start = time.perf_counter()
            for some in batches:
                run(some)
            seconds[side].append((time.perf_counter() - start) / (batch * len(batches)))
    rows = []
    for side, took in seconds.items():
        faster = statistics.median(x / engine for x, engine in zip(took, seconds[ENGINE], strict=True))
        correct = np.mean(classes[side] == labels[: len(classes[side])])
        same = np.mean(classes[side] == classes[ENGINE])
        rows.append(
            [
                *(str(batch), str(threads), side, f"{1000 * statistics.median(took):.3f}"),
                *("-" if side == ENGINE else f"{faster:.2f}", f"{100 * correct:.1f} %", f"{100 * same:.1f} %"),
            ]
        )
    return rows


def _runner(what: Any, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from raw pixels to classes."""
    if isinstance(what, bytes):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(what, options, providers=["CPUExecutionProvider"])
        return lambda images: np.asarray(session.run(["logits"], {"images": images})[0]).argmax(1)
    from spiking_mlp_jax.deploy.engine import Engine

    engine = Engine(what, threads=threads)
    return lambda images: engine.predict(images).argmax(1)


def _parse():
    parser = report.make_parser(__doc__, "onnx_latency")
    parser.add_argument("networks", nargs="*", default=["fashion_mnist", "fashion_mnist_sparse"], metavar="NETWORK")
    add_data_dir(parser)
    parser.add_argument("--images", type=positive, default=512, metavar="N", help="test images (default 512)")
    parser.add_argument("--batches", nargs="+", type=positive, default=[1, 64], metavar="B", help="default 1 and 64")
    parser.add_argument("--threads", nargs="+", type=positive, default=[1, 2], metavar="N", help="default 1 and 2")
    parser.add_argument("--runs", type=positive, default=9, metavar="N", help="rounds (default 9)")
    args = parser.parse_args()
    if args.images < max(args.batches):
        parser.error(f"--images must be at least the largest batch, {max(args.batches)}, got {args.images}")
    return args


if __name__ == "__main__":
    sys.exit(main())
