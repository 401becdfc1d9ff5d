"""Accuracy against activity: the same training with increasing penalties on firing (`activity_weight`).

    python -m benchmarks.activity runs/activity                                   # the demo network, both measures
    python -m benchmarks.activity runs/activity --rates 0.1 1 --synops            # other weights of the penalty

Each run is a workdir, FOLDER/<measure>_<weight>_<seed> (weight 0: dense_<seed>): the same command resumes, and finished
runs are only read. Accuracy and firing rates are those of the last weights on all test images, so nothing is chosen on
the test set. Prints a markdown table; writes activity.json and activity.png into FOLDER.

Synaptic operations of an image are its spikes times their fan-out (`spiking_mlp_jax.models.topology`), over all time
steps. At the end each network is compiled to int8, and the engines alternate on test images.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.precision import add_options, train
from benchmarks.report import fail, line, make_parser, refusal
from spiking_mlp_jax.analysis.activity.stream import in_network_order
from spiking_mlp_jax.analysis.plots import BLUE, GREY, ORANGE, write
from spiking_mlp_jax.data.sources import open_source, spread
from spiking_mlp_jax.data.transforms import fitted
from spiking_mlp_jax.deploy.compile import compile
from spiking_mlp_jax.deploy.engine import Engine
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.pixels import Pixels
from spiking_mlp_jax.models.topology import dense_operations, fan_out, neuron_counts
from spiking_mlp_jax.train.config import model_config
from spiking_mlp_jax.train.logging import to_json
from spiking_mlp_jax.utils.files import write_whole

ENGINE = "engine_images_per_s"
TIMED_IMAGES, ROUNDS = 512, 15
COLORS = {"rates": BLUE, "synops": ORANGE}
COLUMNS = (
    "penalty | weight | seed | accuracy, % | mean rate, % | synaptic operations, million | of dense, % | "
    "engine, images/s"
)


def synaptic_operations(config: ModelConfig, rates: dict[str, float]) -> float:
    """Synaptic operations of an image, over all time steps, at the given firing rates by layer."""
    counts, fans = neuron_counts(config), fan_out(config)
    return config.time_steps * sum(rates[name] * counts[name] * fans[name] for name in counts)


def measured(config: Any, workdir: Path) -> dict[str, Any]:
    """The row of a finished run."""
    model = model_config(config)
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    rates = in_network_order(evaluation["firing_rates"], model)
    operations = synaptic_operations(model, rates)
    return {
        "activity_measure": config.activity_measure,
        "activity_weight": config.activity_weight,
        "seed": config.seed,
        "step": evaluation["step"],
        "accuracy": evaluation["accuracy"],
        "mean_rate": statistics.mean(rates.values()),
        "firing_rates": rates,
        "synaptic_operations": operations,
        "share_of_dense": operations / dense_operations(model),
    }


def engine_speeds(workdirs: list[Path], data_dir: str | None) -> list[float]:
    """Images/s of each run's compiled network: medians over alternating rounds."""
    engines = [Engine(compile(workdir, data_dir=data_dir)) for workdir in workdirs]
    c = engines[0].description
    source = spread(open_source(c.data["dataset"], "test", data_dir), TIMED_IMAGES)
    images = fitted((source[i]["image"] for i in range(len(source))), c, Pixels.from_data(c.data))
    seconds: list[list[float]] = [[] for _ in engines]
    for number in range(ROUNDS + 1):
        for engine, taken in zip(engines, seconds, strict=True):
            begun = time.perf_counter()
            engine.predict(images)
            if number:  # the first round compiles
                taken.append(time.perf_counter() - begun)
    return [len(images) / statistics.median(taken) for taken in seconds]


def check_overwritten(path: Path) -> None:
    """Refuse to overwrite a file that this command did not write.

    Raises:
        InputError: it is another file.
    """
    try:
        if path.exists():
            [row["activity_weight"] for row in json.loads(path.read_text())["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a file that benchmarks.activity wrote: name another") from error


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Lines of markdown."""
    lines = [f"| {COLUMNS} |", "|---" + "|---:" * COLUMNS.count("|") + "|"]
    for row in rows:
        cells = [
            row["activity_measure"] if row["activity_weight"] else "none",
            f"{row['activity_weight']:g}",
            str(row["seed"]),
            f"{100 * row['accuracy']:.2f}",
            f"{100 * row['mean_rate']:.2f}",
            f"{row['synaptic_operations'] / 1e6:.3f}",
            f"{100 * row['share_of_dense']:.2f}",
            f"{row[ENGINE]:,.0f}",
        ]
        lines.append(line(cells))
    return lines


def linear_fit(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line of text: the engine's time as a linear function of synaptic operations; none below three rows."""
    if len(rows) < 3:
        return []
    counts, times = [row["synaptic_operations"] for row in rows], [1 / row[ENGINE] for row in rows]
    slope, offset = np.polyfit(counts, times, 1)
    return [f"time of an image: {1e6 * offset:.1f} us and {1e12 * slope:.1f} ns for a thousand synaptic operations"]


def curve(rows: list[dict[str, Any]], title: str) -> Figure:
    """Accuracy over synaptic operations and engine speed, a line for each measure."""
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, rows, lambda row: row["synaptic_operations"] / 1e6)
    _draw(right, rows, lambda row: row[ENGINE] / 1e3)
    left.set_xlabel("synaptic operations of an image, millions")
    right.set_xlabel("engine, thousand images a second")
    left.set_ylabel("test accuracy, %")
    figure.suptitle(title)
    if left.get_legend_handles_labels()[0]:
        left.legend(loc="lower right", frameon=False)
    return figure


def _draw(axes, rows, across):
    for measure, color in COLORS.items():
        runs = [row for row in rows if not row["activity_weight"] or row["activity_measure"] == measure]
        runs.sort(key=across)
        if all(not row["activity_weight"] for row in runs):
            continue
        at = [across(row) for row in runs], [100 * row["accuracy"] for row in runs]
        axes.plot(*at, "o-" if measure == "rates" else "s-", color=color, label=f'activity_measure="{measure}"')
        for x, y, row in zip(*at, runs, strict=True):
            if row["activity_weight"]:
                # Lines that meet keep their labels apart.
                place, side = ((-5, 4), "right") if measure == "rates" else ((5, -11), "left")
                text = f"{row['activity_weight']:g}"
                axes.annotate(text, (x, y), place, textcoords="offset points", color=color, ha=side)
    for row in rows:
        if not row["activity_weight"]:
            at = across(row), 100 * row["accuracy"]
            axes.plot(*at, "D", color=GREY)
            axes.annotate("no penalty", at, (0, 8), textcoords="offset points", color=GREY, ha="center")
    axes.margins(0.1, 0.08)
    axes.grid(alpha=0.3)


def main() -> int:
    parser = make_parser(__doc__, "activity")
    add_options(parser, seeds=1)
    parser.add_argument("--rates", type=float, nargs="*", default=[0.1, 0.3, 1.0, 3.0], metavar="WEIGHT")
    parser.add_argument("--synops", type=float, nargs="*", default=[0.3, 1.0, 3.0, 10.0], metavar="WEIGHT")
    parser.add_argument("--json", type=Path, help="also write the rows here, e.g. docs/runs/activity.json")
    parser.add_argument("--plot", type=Path, help="also write the plot here")
    args = parser.parse_args()
    if min([*args.rates, *args.synops], default=1) <= 0:
        parser.error("weights must be above 0; the run without a penalty is always included")
    files = [args.folder / "activity.json", *([args.json] if args.json else [])]
    plots = [args.folder / "activity.png", *([args.plot] if args.plot else [])]
    settings = [("rates", 0.0), *(("rates", w) for w in args.rates), *(("synops", w) for w in args.synops)]
    settings = list(dict.fromkeys(settings))
    rows, workdirs, model = [], [], None
    try:
        for path in (*files, *plots):
            # The first run creates the runs' folder.
            refused = refusal(path) if path.parent != args.folder or path.parent.exists() else None
            if refused:
                raise InputError(refused)
        for path in files:
            check_overwritten(path)
        for seed in range(args.seeds):
            for measure, weight in settings:
                workdir = args.folder / (f"{measure}_{weight:g}_{seed}" if weight else f"dense_{seed}")
                print(f"{workdir}:", file=sys.stderr, flush=True)
                with contextlib.redirect_stdout(sys.stderr):
                    config = train(args, workdir, seed=seed, activity_measure=measure, activity_weight=weight)
                if config is None:
                    return 130
                model = model_config(config)
                rows.append(measured(config, workdir))
                workdirs.append(workdir)
    except InputError as error:
        return fail(error)
    assert model is not None, "the run without a penalty is always included"
    print("timing the engine", file=sys.stderr)
    for row, speed in zip(rows, engine_speeds(workdirs, args.data_dir), strict=True):
        row[ENGINE] = speed
    document = {
        "config": args.config,
        "dense_synaptic_operations": dense_operations(model),
        "neurons": neuron_counts(model),
        "fan_out": fan_out(model),
        "rows": rows,
    }
    for path in files:
        write_whole(path, to_json(document, indent=1) + "\n")
    figure = curve(rows, f"{args.config}, seed{'s' * (args.seeds > 1)} {', '.join(map(str, range(args.seeds)))}")
    for path in plots:
        write(figure, path)
    print("\n".join([*table(rows), *linear_fit(rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
