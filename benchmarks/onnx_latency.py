"""The accumulate-only engine beside ONNX Runtime, on the files that `compile` and `export-onnx` write.

    python -m benchmarks.onnx_latency
    python -m benchmarks.onnx_latency cifar10 --data-dir DIR --batches 1 --threads 1

All sides classify the same test images from raw pixels, in one process and in turns; each has as many threads, and
those of ONNX Runtime sleep while others work. A figure is the median over the turns, a ratio the median over the turns'
ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import report
from spiking_mlp_jax.errors import InputError

ENGINE = "engine, int8"
COLUMNS = ("batch", "threads", "side", "ms per image", "engine is faster by", "right", "same class as the engine")


def main() -> int:
    args = _parse()
    try:
        for name in args.networks:
            sides, images, labels, size = prepare(name, args.data_dir, args.images)
            print(f"\n**{name}**, {len(images)} test images; {size}\n\n{report.line(COLUMNS)}")
            print(report.line(["---"] * len(COLUMNS)))
            for threads in args.threads:
                for batch in args.batches:
                    for row in measure(sides, images, labels, batch, threads, args.runs):
                        print(report.line(row), flush=True)
    except (InputError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(name: str, data_dir: str | None, count: int) -> tuple[dict[str, Any], np.ndarray, np.ndarray, str]:
    """The sides' files, made from one network; its test images and their classes; the files' sizes in words."""
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
    """Rows of a table: turns of all sides over the images, `batch` at a time."""
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
        right = np.mean(classes[side] == labels[: len(classes[side])])
        same = np.mean(classes[side] == classes[ENGINE])
        rows.append(
            [
                *(str(batch), str(threads), side, f"{1000 * statistics.median(took):.3f}"),
                *("-" if side == ENGINE else f"{faster:.2f}", f"{100 * right:.1f} %", f"{100 * same:.1f} %"),
            ]
        )
    return rows


def _runner(what: Any, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function of raw pixels that gives classes."""
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
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.onnx_latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("networks", nargs="*", default=["fashion_mnist", "fashion_mnist_sparse"], metavar="NETWORK")
    parser.add_argument(
        "--data-dir", metavar="DIR", help="folder of the network's data, if they are not in the package"
    )
    parser.add_argument("--images", type=int, default=512, metavar="N", help="test images (default 512)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64], metavar="B", help="default 1 and 64")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N", help="default 1 and 2")
    parser.add_argument("--runs", type=int, default=9, metavar="N", help="turns (default 9)")
    args = parser.parse_args()
    for name, values in (("runs", [args.runs]), ("batches", args.batches), ("threads", args.threads)):
        if min(values) < 1:
            parser.error(f"--{name} must be at least 1, but it is {min(values)}")
    if args.images < max(args.batches):
        parser.error(f"--images must be at least the largest batch, {max(args.batches)}, but it is {args.images}")
    return args


if __name__ == "__main__":
    sys.exit(main())
