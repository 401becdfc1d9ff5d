"""Accuracy, speed and duration of training runs, from their log.txt and metrics.jsonl.

    python -m benchmarks.run_log docs/runs/cifar10_one_step docs/runs/cifar10

A folder is a workdir or holds these two files of one. Pauses before a resumption do not count.
"""

from __future__ import annotations

import datetime
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import fail, head, line, make_parser
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.train.logging import read_metrics

HEADER = (
    "run",
    "epochs",
    "best test accuracy, %",
    "in epoch",
    "images/s, median",
    "fastest tenth",
    "waiting for data, %",
    "most in a window, %",
    "minutes",
)
STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (\S+)")
STARTS = ("starting", "resuming")


def minutes(lines: Iterable[str]) -> float:
    """Wall-clock training time, from the lines of a log.txt."""
    seconds, last = 0.0, None
    for text in lines:
        if found := STAMP.match(text):
            now = datetime.datetime.fromisoformat(found[1])
            if last is not None and found[2] not in STARTS:
                seconds += (now - last).total_seconds()
            last = now
    return seconds / 60


def summary(records: Sequence[dict[str, Any]], lines: Iterable[str]) -> list[str]:
    """The cells of a run's row, without its name.

    Args:
        records: of metrics.jsonl.
        lines: of log.txt.

    Raises:
        InputError: the run was never evaluated, or too short for its speed to be known.
    """
    train = [x for x in records if x["split"] == "train" and x.get("images_per_second") and "data_wait_seconds" in x]
    tests = [x for x in records if x["split"] == "eval"]
    if len(train) < 2 or not tests:
        raise InputError("no evaluation, or fewer than two lines with images/s")
    best = max(tests, key=lambda x: x["accuracy"])
    speeds = [x["images_per_second"] for x in train]
    shares = [x["data_wait_share"] for x in train if x["data_wait_share"] is not None]
    return [
        f"{max(x['epoch'] for x in records):.0f}",
        f"{100 * best['accuracy']:.2f}",
        f"{best['epoch']:.0f}",
        f"{statistics.median(speeds):.0f}",
        f"{statistics.quantiles(speeds, n=10)[-1]:.0f}",
        f"{100 * statistics.fmean(shares):.2f}",
        f"{100 * max(shares):.1f}",
        f"{minutes(lines):.0f}",
    ]


def main() -> int:
    parser = make_parser(__doc__, "run_log")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    rows, curves = [], []
    for folder in parser.parse_args().folders:
        try:
            records = read_metrics(folder)
            rows.append([folder.name, *summary(records, (folder / "log.txt").read_text("utf-8").splitlines())])
        except (InputError, OSError) as error:
            return fail(f"{folder}: {error}")
        epochs: dict[int, list[float]] = {}
        for record in records:
            if record["split"] == "train":
                # The line at the end of an epoch belongs to it.
                epochs.setdefault(int(-(-record["epoch"] // 1)), []).append(record["loss"])
        means = ", ".join(f"{epoch}: {statistics.fmean(losses):.2f}" for epoch, losses in epochs.items())
        curves.append(f"{folder.name}, mean training loss of each epoch's lines: {means}")
    print("\n".join([head(HEADER), *map(line, rows), "", *curves]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
