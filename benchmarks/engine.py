"""The accumulate-only engine against floating point: this package's jitted evaluation and SpikingJelly's layers.

    python -m benchmarks.engine                       # the shipped network and MLP-SPE-T
    python -m benchmarks.engine --only spe_t --runs 9

All sides have the same network, images and number of threads, run in their own processes and alternate; ratios are
medians over rounds. The integer network's agreement with floating point is printed. The shipped network classifies its
test images. No trained MLP-SPE-T exists here: its weights are random, its statistics those of synthetic images, and its
layers fire at the rates of the trained Fashion-MNIST network (benchmarks/rates.py).
"""

from __future__ import annotations

import dataclasses
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
from benchmarks.report import fail
from benchmarks.worker import IMAGES, WEIGHTS
from spiking_mlp_jax.cli.options import positive, whole

BATCHES = {"fashion_mnist": (32, 128, 512), "spe_t": (1, 4)}
# Runs per round at batch 1, for latency quantiles.
LATENCY_RUNS = {"fashion_mnist": 200, "spe_t": 4}
FLOAT, ENGINE = Side("float, jitted", "ours"), Side("engine", "deployed")
CALIBRATION = 256
COLUMNS = ("batch", "side", "ms per image", "images/s", "engine is faster by", "p50, ms", "p99, ms", "peak memory, GB")


def main() -> int:
    args = _parse()
    missing = compare.missing_peer()
    if missing and not args.no_peer:
        return fail(f"{missing} is not installed: see benchmarks/README.md, or skip the peer with --no-peer")
    refused = report.refusal(Path(args.json))
    if refused:
        return fail(refused)
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
                print(f"\n**{DEPLOYED_CASES[case].title}**\n\n{_summary(facts)}\n", flush=True)
                print(report.head(COLUMNS))
                for batch in args.batches or BATCHES[name]:
                    rows = measure(case, sides, batch, LATENCY_RUNS[name] if batch == 1 else 1, settings, progress)
                    for row in rows:
                        print(report.line(_cells(row, batch)), flush=True)
                    results.add(case, f"inference, B={batch}", batch, [{**facts, **row} for row in rows])
            except compare.BenchmarkError as error:
                return fail(str(error), 1)
            except KeyboardInterrupt:
                return fail(f"stopped; results so far are in {args.json}", 130)
    return 0


def prepare(name: str, folder: Path, progress: compare.Progress) -> dict[str, Any]:
    """Write one network for all sides, its images and the .smlp file; returns how the two networks agree."""
    import jax
    from flax import nnx

    from benchmarks import ours, rates
    from spiking_mlp_jax.data.sources import open_source, spread
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
            source = spread(open_source("fashion_mnist", split), count)
            return np.stack([fit_image(source[i]["image"], config.image_size, 1, "pad", 0) for i in range(count)])

        images, calibration = some("test", 512), some("train", CALIBRATION)
    progress("folding and quantizing")
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
    """Alternate all sides at one batch size, with `runs` per round."""
    settings = dataclasses.replace(settings, batch=batch)
    rows = compare.alternate(case, "inference", sides, settings, progress, runs)
    engine = rows[-1]
    for row in rows:
        row["images_per_s"] = batch / statistics.median(row["seconds"])
        rounds = zip(row["seconds"], engine["seconds"], strict=True)
        row["engine_faster"] = statistics.median(theirs / ours for theirs, ours in rounds)
        each = sorted(second for seconds in row.pop("each") for second in seconds)
        if runs > 1:
            row["p50_ms"], row["p99_ms"] = (1000 * each[min(int(q * len(each)), len(each) - 1)] for q in (0.5, 0.99))
    return rows


def _summary(facts):
    return (
        f".smlp file {facts['artifact_bytes'] / 1e6:.2f} MB, float32 parameters {facts['float_bytes'] / 1e6:.2f} MB. "
        f"The engine's scores equal the reference's; mean logits correlate with floating point by "
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
    parser = report.make_parser(__doc__, "engine")
    parser.add_argument("--only", nargs="+", choices=list(BATCHES), help="networks; default: both")
    parser.add_argument("--runs", type=positive, default=9, help="rounds (default 9)")
    parser.add_argument("--batches", nargs="+", type=positive, metavar="B", help="batch sizes (default: the network's)")
    parser.add_argument("--threads", type=whole(0), default=0, help="cores for each side; 0: all")
    parser.add_argument("--json", default="engine.json", help="where all figures go (default engine.json)")
    parser.add_argument("--no-peer", action="store_true", help="leave SpikingJelly out")
    args = parser.parse_args()
    args.only = args.only and list(dict.fromkeys(args.only))
    return args


if __name__ == "__main__":
    sys.exit(main())
