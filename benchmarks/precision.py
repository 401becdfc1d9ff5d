"""What computing in bfloat16 costs in accuracy: the same training in float32 and bfloat16, over a few seeds.

    python -m benchmarks.precision runs/precision                                       # the demo network, 3 seeds
    python -m benchmarks.precision runs/precision --config configs/fashion_mnist.py --seeds 1 --data-dir DIR

Each run is an ordinary workdir, FOLDER/<dtype>_<seed>: an interrupted command goes on where it was, a finished run is
only read. The accuracy is that of the last weights on all test images, so nothing is chosen on the test set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.train.config import load_config
from spiking_mlp_jax.train.loop import fit

DTYPES = ("float32", "bfloat16")


def final_accuracy(workdir: Path) -> float:
    """Test accuracy, in percent, after a run's last step."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return 100 * [record["accuracy"] for record in records if record["split"] == "eval"][-1]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the runs are kept")
    parser.add_argument("--config", default="configs/fashion_mnist.py:demo")
    parser.add_argument("--data-dir", help="as in train.py's --config.data_dir")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each dtype")
    parser.add_argument("--max-steps", type=int, default=0, help="stop each run after so many steps; 0: train all")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, but it is {args.seeds}")
    accuracy: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    try:
        for seed in range(args.seeds):
            for dtype in DTYPES:
                config: Any = load_config(args.config)
                config.update(seed=seed, dtype=dtype, max_steps=args.max_steps)
                if args.data_dir:
                    config.data_dir = args.data_dir
                workdir = args.folder / f"{dtype}_{seed}"
                if not fit(config, workdir).finished:
                    print("stopped: the same command goes on from here", file=sys.stderr)
                    return 130
                accuracy[dtype].append(final_accuracy(workdir))
    except InputError as error:
        print("error:", error, file=sys.stderr)
        return 2
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
