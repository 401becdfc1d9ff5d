"""This package against the same network built from SpikingJelly's layers, and each with its own peak memory.

    python -m benchmarks                              # everything on the CPU, about 45 minutes on two cores
    python -m benchmarks --only spe_t fashion_mnist   # some cases, see --list
    python -m benchmarks --gpu                        # mixed precision on a GPU

Every side runs in a process of its own, with equal weights. Before anything is timed, logits in training and evaluation
mode, loss and every gradient are compared in float64. Then the sides take turns, one run each; the table has medians,
and the ratio is the median of each turn's. A markdown table goes to the output, progress to the errors, and everything
measured into a JSON file.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from benchmarks import compare, report, worker
from benchmarks.cases import CASES, CPU_SIDES, GPU_CASES, GPU_SIDES, QUICK_CASES

# The C library then keeps freed memory for the next step; as it is, each step asks the system for it again.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 34),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
}


def main() -> int:
    args = _parse()
    cases = QUICK_CASES if args.quick else GPU_CASES if args.gpu else CASES
    if args.list:
        print("\n".join(f"{name:<20}{case.title}" for name, case in cases.items()))
        return 0
    unknown = [name for name in args.only or () if name not in cases]
    if unknown:
        return _fail(f'there is no case "{unknown[0]}": the known ones are {", ".join(cases)}')
    missing = [name for name in ("torch", "spikingjelly") if importlib.util.find_spec(name) is None]
    if missing and not args.no_peer:
        return _fail(
            f"{missing[0]} is not installed: benchmarks/README.md says how, or --no-peer measures this package alone"
        )
    if args.gpu and not compare.jax_has_gpu():
        return _fail("JAX sees no GPU here: run without --gpu, or install JAX for the GPU (pip install 'jax[cuda12]')")
    if args.gpu and not args.no_peer and not compare.torch_has_gpu():
        return _fail("PyTorch sees no GPU here: install its CUDA build, or --no-peer measures this package alone")
    refused = report.refusal(Path(args.json))
    if refused:
        return _fail(refused)
    environment = {**os.environ, **(KEEP_MEMORY if args.allocator == "keep" else {})}
    if args.gpu:
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # or the peak is whatever was preallocated
    else:
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # A cached program would make the compile time meaningless.
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    names = list(dict.fromkeys(args.only or cases))
    results = report.Results(vars(args), args.json)
    failures = []
    try:
        for number, name in enumerate(names, 1):
            progress = compare.Progress(f"[{number}/{len(names)}] {name}")
            try:
                _measure(name, cases[name], args, environment, results, progress)
            except compare.BenchmarkError as error:
                progress(f"error: {error}")
                failures.append(str(error))
    except KeyboardInterrupt:
        kept = f"what was measured until now is in {args.json}" if results.rows else "nothing was measured"
        return _fail(f"stopped; {kept}", 130)
    finally:
        print(results.table({**CASES, **GPU_CASES, **QUICK_CASES}))
    return _fail("; ".join(failures), 1) if failures else 0


def _measure(name, case, args, environment, results, progress):
    with tempfile.TemporaryDirectory() as folder:
        settings = compare.Settings(Path(folder), args.threads, args.runs, args.batch, environment)
        compare.write_weights(name, settings, progress)
        if not args.no_peer:
            ours = [side for side in _sides(args, "train") if side.module == "ours"]
            results.compared[name] = compare.compare_outputs(name, ours, settings, progress)
        for task in dict.fromkeys(args.tasks or CPU_SIDES):
            sides = _sides(args, task)
            groups = [sides]
            if case.in_pairs:
                groups = [[side] for side in sides] if args.no_peer else [[sides[0], side] for side in sides[1:]]
            for group in groups:
                turns = compare.take_turns(name, task, group, settings, progress)
                for turn in turns:
                    del turn["each"]
                results.add(name, task, args.batch or case.batch, turns)


def _sides(args, task):
    sides = (GPU_SIDES if args.gpu else CPU_SIDES)[task]
    return [side for side in sides if side.module == "ours" or not args.no_peer]


def _parse():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="CASE", help="cases to run, see --list")
    parser.add_argument("--tasks", nargs="+", choices=list(CPU_SIDES), help="default: both")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each side (default 5)")
    parser.add_argument("--threads", type=int, default=0, help="cores for each side; 0: all")
    parser.add_argument("--batch", type=int, default=0, help="images in a batch; 0: the case's own")
    parser.add_argument(
        "--allocator",
        choices=("default", "keep"),
        default="default",
        help="keep: all sides' C library keeps freed memory (glibc's variables, see benchmarks/README.md)",
    )
    parser.add_argument("--json", default="benchmarks.json", help="where all figures go (default benchmarks.json)")
    parser.add_argument("--no-peer", action="store_true", help="measure this package alone, without torch")
    parser.add_argument("--gpu", action="store_true", help="the paper's networks in mixed precision on a GPU")
    parser.add_argument("--quick", action="store_true", help="a tiny network, to see that everything works")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    args = parser.parse_args()
    for name, least in (("runs", 1), ("threads", 0), ("batch", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, but it is {getattr(args, name)}")
    cores = worker.cores()
    if args.threads > cores:
        parser.error(f"--threads must be at most {cores}, the cores this process may use, but it is {args.threads}")
    if args.quick and args.gpu:
        parser.error("--quick and --gpu exclude each other")
    return args


def _fail(message: str, status: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
