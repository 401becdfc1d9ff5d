"""The accumulate-only engine against floating point: this package's jitted evaluation and SpikingJelly's layers.

    python -m benchmarks.engine                       # the shipped network and MLP-SPE-T
    python -m benchmarks.engine --only spe_t --runs 9

All sides have the same network, the same images and as many threads, run in processes of their own and take turns;
ratios are medians over the turns. The integer network is the quantised one, whose agreement with floating point is
printed. The shipped network classifies its test images. No trained MLP-SPE-T exists here: its weights are random, its
statistics those of synthetic images, and its layers fire at the rates of the trained Fashion-MNIST network
(benchmarks/rates.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import compare, report
from benchmarks.cases import DEPLOYED_CASES, PEER, Side
from benchmarks.deployed import NETWORK
from benchmarks.worker import IMAGES, WEIGHTS

BATCHES = {"fashion_mnist": (32, 128, 512), "spe_t": (1, 4)}
# Runs at batch 1 a turn, for the quantiles of the latency.
LATENCY_RUNS = {"fashion_mnist": 200, "spe_t": 4}
FLOAT, ENGINE = Side("float, jitted", "ours"), Side("engine", "deployed")
CALIBRATION = 256
COLUMNS = ("batch", "side", "ms per image", "images/s", "engine is faster by", "p50, ms", "p99, ms", "peak memory, GB")


def main() -> int:
    args = _parse()
    missing = [name for name in ("torch", "spikingjelly") if importlib.util.find_spec(name) is None]
    if missing and not args.no_peer:
        return _fail(f"{missing[0]} is not installed: benchmarks/README.md says how, or --no-peer leaves it out")
    refused = report.refusal(Path(args.json))
    if refused:
        return _fail(refused)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    sides = [*([] if args.no_peer else [PEER]), FLOAT, ENGINE]
    results = report.Results({**vars(args), "allocator": "default"}, args.json)
    for name in args.only or list(BATCHES):
        progress = compare.Progress(name)
        case = f"deployed_{name}"
        with tempfile.TemporaryDirectory() as folder:
            settings = compare.Settings(Path(folder), args.threads, args.runs, 0, environment)
            try:
                facts = prepare(name, settings.folder, progress)
                print(f"\n**{DEPLOYED_CASES[case].title}**\n\n{_sentence(facts)}\n", flush=True)
                print(report.line(COLUMNS) + "\n" + report.line(["---"] * len(COLUMNS)))
                for batch in args.batches or BATCHES[name]:
                    rows = measure(case, sides, batch, LATENCY_RUNS[name] if batch == 1 else 1, settings, progress)
                    for row in rows:
                        print(report.line(_cells(row, batch)), flush=True)
                    results.add(case, f"inference, B={batch}", batch, [{**facts, **row} for row in rows])
            except compare.BenchmarkError as error:
                return _fail(str(error), 1)
            except KeyboardInterrupt:
                return _fail(f"stopped; what was measured until now is in {args.json}", 130)
    return 0


def prepare(name: str, folder: Path, progress: compare.Progress) -> dict[str, Any]:
    """Writes one network for all sides, its images, and the artifact; says how the two agree."""
    import jax
    from flax import nnx

    from benchmarks import ours, rates
    from spiking_mlp_jax.data.sources import open_source
    from spiking_mlp_jax.data.transforms import fit_image
    from spiking_mlp_jax.deploy import artifact, reference
    from spiking_mlp_jax.deploy.fold import fold
    from spiking_mlp_jax.deploy.quantize import quantize
    from spiking_mlp_jax.interop import official
    from spiking_mlp_jax.models import weights
    from spiking_mlp_jax.models.pixels import normalize

    config = DEPLOYED_CASES[f"deployed_{name}"].config
    progress("the network")
    if name == "spe_t":
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        images = calibration = rates.synthetic_images(8, config.image_size, 3)
        model = ours.initial_model(config, seed=0)
        fired = rates.set_rates(model, normalize(images[:2], mean, std))
        progress(f"layers fire at {100 * min(fired.values()):.1f} to {100 * max(fired.values()):.1f} %")
    else:
        model, meta = weights.load(weights.find("fashion_mnist"))
        mean, std = meta["data"]["mean"], meta["data"]["std"]

        def some(split, count):
            source = open_source("fashion_mnist", split)
            return np.stack([fit_image(source[i]["image"], config.image_size, 1, "pad", 0) for i in range(count)])

        images, calibration = some("test", 512), some("train", CALIBRATION)
    progress("folding and quantising")
    folded = fold(model, tuple(mean), tuple(std))
    net = quantize(folded, calibration)
    artifact.save(net, folder / NETWORK)
    np.savez(folder / WEIGHTS, allow_pickle=False, **official.state_dict(model))
    np.savez(folder / IMAGES, allow_pickle=False, images=images, mean=np.array(mean), std=np.array(std))
    some_images = images[:64]
    floating = np.asarray(jax.jit(lambda f, x: f(x))(folded, normalize(some_images, mean, std))).mean(0)
    integer = reference.run(net, some_images).sum(0)
    from spiking_mlp_jax.deploy.engine import Engine

    if not np.array_equal(Engine(net).predict(some_images), integer):
        raise compare.BenchmarkError("the engine's scores are not the reference's: nothing was timed")
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return {
        "agreement": float(np.mean(integer.argmax(1) == floating.argmax(1))),
        "correlation": float(np.corrcoef(integer.ravel(), floating.ravel())[0, 1]),
        "artifact_bytes": (folder / NETWORK).stat().st_size,
        "float_bytes": 4 * parameters,
    }


def measure(case, sides, batch, runs, settings, progress) -> list[dict[str, Any]]:
    """Turns of all sides at one batch size, `runs` a turn."""
    settings = compare.dataclasses.replace(settings, batch=batch)
    rows = compare.take_turns(case, "inference", sides, settings, progress, runs)
    engine = rows[-1]
    for row in rows:
        row["images_per_s"] = batch / statistics.median(row["seconds"])
        turns = zip(row["seconds"], engine["seconds"], strict=True)
        row["engine_faster"] = statistics.median(theirs / ours for theirs, ours in turns)
        each = sorted(second for turn in row.pop("each") for second in turn)
        if runs > 1:
            row["p50_ms"], row["p99_ms"] = (1000 * each[min(int(q * len(each)), len(each) - 1)] for q in (0.5, 0.99))
    return rows


def _sentence(facts):
    return (
        f"Artifact {facts['artifact_bytes'] / 1e6:.2f} MB, float32 parameters {facts['float_bytes'] / 1e6:.2f} MB. The "
        f"engine's scores are the reference's bits; mean logits correlate with floating point by "
        f"{facts['correlation']:.3f}, and {100 * facts['agreement']:.1f} % of the images get the same class."
    )


def _cells(row, batch):
    def shown(name):
        return f"{row[name]:.2f}" if name in row else "-"

    return [
        str(batch),
        row["side"],
        f"{1000 / row['images_per_s']:.2f}",
        f"{row['images_per_s']:,.0f}",
        "-" if row["side"] == ENGINE.title else f"{row['engine_faster']:.2f}",
        shown("p50_ms"),
        shown("p99_ms"),
        f"{row['peak_bytes'] / 1e9:.2f}",
    ]


def _parse():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(BATCHES), help="networks; default: both")
    parser.add_argument("--runs", type=int, default=9, help="turns (default 9)")
    parser.add_argument("--batches", nargs="+", type=int, metavar="B", help="batch sizes instead of the networks' own")
    parser.add_argument("--threads", type=int, default=0, help="cores for each side; 0: all")
    parser.add_argument("--json", default="engine.json", help="where all figures go (default engine.json)")
    parser.add_argument("--no-peer", action="store_true", help="leave SpikingJelly out")
    args = parser.parse_args()
    for least, values, name in (
        (1, [args.runs], "runs"),
        (0, [args.threads], "threads"),
        (1, args.batches or [], "batches"),
    ):
        if values and min(values) < least:
            parser.error(f"--{name} must be at least {least}, but it is {min(values)}")
    args.only = args.only and list(dict.fromkeys(args.only))
    return args


def _fail(message: str, status: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
