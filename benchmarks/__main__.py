"""Speed and memory of this package against the same network built from SpikingJelly's layers.

    python -m benchmarks                              # everything on the CPU, about 45 minutes on two cores
    python -m benchmarks --only spe_t fashion_mnist   # some cases, see --list
    python -m benchmarks --gpu                        # mixed precision on a GPU

Every side runs in its own process, with equal weights. Before anything is timed, logits in training and evaluation
mode, loss and every gradient are compared in float64. Then the sides alternate, one run each. The table has medians
over rounds; a ratio is the median of the rounds' ratios. The markdown table goes to stdout, progress to stderr, all
figures into a JSON file.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from benchmarks import compare, report, worker
from benchmarks.cases import CASES, CPU_SIDES, GPU_CASES, GPU_SIDES, QUICK_CASES
from benchmarks.report import fail
from spiking_mlp_jax.cli.options import positive, whole

# Makes glibc keep freed memory for the next step; by default each step asks the system for it again.
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
        return fail(f'there is no case "{unknown[0]}": the known ones are {", ".join(cases)}')
    missing = compare.missing_peer()
    if missing and not args.no_peer:
        return fail(f"{missing} is not installed: see benchmarks/README.md, or use --no-peer")
    if args.gpu and not compare.jax_has_gpu():
        return fail("JAX sees no GPU here: run without --gpu, or install JAX for the GPU (pip install 'jax[cuda12]')")
    if args.gpu and not args.no_peer and not compare.torch_has_gpu():
        return fail("PyTorch sees no GPU here: install its CUDA build, or --no-peer measures this package alone")
    refused = report.refusal(Path(args.json))
    if refused:
        return fail(refused)
    environment = {**os.environ, **(KEEP_MEMORY if args.allocator == "keep" else {})}
    if args.gpu:
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # else the peak is the preallocation
    else:
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # Cached programs would make compile times meaningless.
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
        saved = f"results so far are in {args.json}" if results.rows else "nothing was measured"
        return fail(f"stopped; {saved}", 130)
    finally:
        print(results.table({**CASES, **GPU_CASES, **QUICK_CASES}))
    return fail("; ".join(failures), 1) if failures else 0


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
                rows = compare.alternate(name, task, group, settings, progress)
                for row in rows:
                    del row["each"]
                results.add(name, task, args.batch or case.batch, rows)


def _sides(args, task):
    sides = (GPU_SIDES if args.gpu else CPU_SIDES)[task]
    return [side for side in sides if side.module == "ours" or not args.no_peer]


def _parse():
    parser = report.make_parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="CASE", help="cases to run, see --list")
    parser.add_argument("--tasks", nargs="+", choices=list(CPU_SIDES), help="default: both")
    parser.add_argument("--runs", type=positive, default=5, help="timed runs of each side (default 5)")
    parser.add_argument("--threads", type=whole(0), default=0, help="cores for each side; 0: all")
    parser.add_argument("--batch", type=whole(0), default=0, help="images per batch; 0: the case's own")
    parser.add_argument(
        "--allocator",
        choices=("default", "keep"),
        default="default",
        help="keep: glibc keeps freed memory on all sides (see benchmarks/README.md)",
    )
    parser.add_argument("--json", default="benchmarks.json", help="where all figures go (default benchmarks.json)")
    parser.add_argument("--no-peer", action="store_true", help="measure this package alone, without torch")
    parser.add_argument("--gpu", action="store_true", help="the paper's networks in mixed precision on a GPU")
    parser.add_argument("--quick", action="store_true", help="a tiny network, to check that everything works")
    parser.add_argument("--list", action="store_true", help="list the cases")
    args = parser.parse_args()
    cores = worker.cores()
    if args.threads > cores:
        parser.error(f"--threads must be at most {cores}, the cores of this process, got {args.threads}")
    if args.quick and args.gpu:
        parser.error("--quick and --gpu exclude each other")
    return args


if __name__ == "__main__":
    sys.exit(main())
