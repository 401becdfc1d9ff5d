"""Accuracy of training in bfloat16 against float32, over a few seeds.

    python -m benchmarks.precision runs/precision                                       # the demo network, 3 seeds
    python -m benchmarks.precision runs/precision --config configs/fashion_mnist.py --seeds 1 --data-dir DIR

Each run is a workdir, FOLDER/<dtype>_<seed>: the same command resumes, and finished runs are only read. Accuracy is
that of the last weights on all test images, so nothing is chosen on the test set.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import fail, make_parser
from spiking_mlp_jax.cli.options import add_data_dir, positive, whole
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.train.config import load_config
from spiking_mlp_jax.train.loop import fit

DTYPES = ("float32", "bfloat16")


def add_options(parser, seeds: int) -> None:
    """Add the options of a benchmark that trains."""
    parser.add_argument("folder", type=Path, help="folder of the runs")
    parser.add_argument("--config", default="configs/fashion_mnist.py:demo")
    add_data_dir(parser, default="the config's")
    parser.add_argument("--seeds", type=positive, default=seeds, help=f"runs of each setting (default {seeds})")
    parser.add_argument("--max-steps", type=whole(0), default=0, help="stop each run after this many steps; 0: never")


def train(args, workdir: Path, **fields: Any) -> Any:
    """Train `args.config` with some fields changed, or resume it; returns the config, None if the run was stopped.

    Raises:
        InputError: an impossible config, or as `fit`.
    """
    config: Any = load_config(args.config)
    config.update(max_steps=args.max_steps, **fields)
    if args.data_dir:
        config.data_dir = args.data_dir
    if fit(config, workdir).finished:
        return config
    print("stopped: rerun the same command to resume", file=sys.stderr)
    return None


def final_accuracy(workdir: Path) -> float:
    """Test accuracy, in percent, after a run's last step."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return 100 * [record["accuracy"] for record in records if record["split"] == "eval"][-1]


def main() -> int:
    parser = make_parser(__doc__, "precision")
    add_options(parser, seeds=3)
    args = parser.parse_args()
    accuracy: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    try:
        for seed in range(args.seeds):
            for dtype in DTYPES:
                workdir = args.folder / f"{dtype}_{seed}"
                if train(args, workdir, seed=seed, dtype=dtype) is None:
                    return 130
                accuracy[dtype].append(final_accuracy(workdir))
    except InputError as error:
        return fail(error)
    table = Table(title=f"{args.config}: test accuracy after the last step, %")
    for column in ("seed", *DTYPES, "difference"):
        table.add_column(column, justify="right")
    pairs = list(zip(*accuracy.values(), strict=True))
    for seed, (full, half) in enumerate(pairs):
        table.add_row(str(seed), f"{full:.2f}", f"{half:.2f}", f"{half - full:+.2f}")
    full, half = (statistics.mean(values) for values in accuracy.values())
    table.add_row("mean", f"{full:.2f}", f"{half:.2f}", f"{half - full:+.2f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
