"""The command `spiking-mlp sweep`: trains variations of an experiment with several seeds and compares them."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiking_mlp_jax.errors import EXIT_INTERRUPTED, InputError

if TYPE_CHECKING:
    from spiking_mlp_jax.sweep.plan import Run, Sweep


def add_commands(commands, command, positive) -> None:
    """Adds the command's parser.

    Args:
        commands: of argparse.
        command: function that makes one with a summary, a description, examples and a note.
        positive: type of whole numbers from 1 on.
    """
    parser = command(
        commands,
        "sweep",
        "train variations of an experiment with several seeds and compare them",
        "Trains every run of a sweep file with every seed, each in a process of its own, measures accuracy, synaptic "
        "operations, accuracy with other numbers of time steps and, at the end and one at a time, latency, and writes "
        "a table and figures into DIR/tables. The same command goes on where it was stopped or killed.",
        "spiking-mlp sweep configs/sweeps/time_steps.py --workdir runs/ablations --workers 2\n"
        "  spiking-mlp sweep configs/sweeps/norm.py --workdir runs/ablations --shard 1/3 --seeds 0,1\n"
        "  spiking-mlp sweep configs/sweeps/norm.py --workdir runs/ablations --collect copied/from/other/machine",
        "--config.NAME=VALUE sets a field of the experiment in all runs. Sweeps that share a DIR share the runs that "
        "have one name and one configuration. Exit statuses: 0 all done, 1 a run failed (with --collect: or is "
        "missing), 2 bad input, 75 stopped and to be continued.",
    )
    parser.add_argument("sweep", metavar="SWEEP", help="Python file with a function get_sweep, as in configs/sweeps")
    parser.add_argument("--workdir", metavar="DIR", type=Path, required=True, help="folder for everything it writes")
    parser.add_argument("--workers", metavar="N", type=positive, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--shard", metavar="I/N", type=_shard, default=(1, 1), help="train part I of N, from 1")
    parser.add_argument("--seeds", metavar="S,S", type=_seeds, help="seeds, such as 0,1,2 (default: the file's)")
    parser.add_argument(
        "--collect", metavar="DIR", nargs="*", type=Path, help="train nothing; gather results of DIR... and --workdir"
    )
    parser.add_argument("--retime", action="store_true", help="measure latency again, of all finished runs here")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what is done of them")
    parser.set_defaults(run=_sweep, overrides=[])


def take_overrides(chosen: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """Takes --config.NAME=VALUE from the arguments that argparse left over, and returns the others."""
    if chosen.command != "sweep":
        return list(rest)
    chosen.overrides = [x for x in rest if re.match(r"--(no)?config\.", x)]
    return [x for x in rest if x not in chosen.overrides]


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f'"{text}" is no part of a whole, such as 1/3, 2/3 or 3/3')
    return index, count


def _seeds(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f'"{text}" is no list of seeds, such as 0,1,2')
    return tuple(map(int, text.split(",")))


def _sweep(chosen: argparse.Namespace) -> int:
    from spiking_mlp_jax.sweep import results
    from spiking_mlp_jax.sweep.plan import load_sweep, shard
    from spiking_mlp_jax.utils.storage import storage_error

    if chosen.workdir.exists() and not chosen.workdir.is_dir():
        raise InputError(f"{chosen.workdir} is a file: give a folder as --workdir")
    sweep = load_sweep(chosen.sweep, chosen.overrides, chosen.seeds)
    others = chosen.collect or []
    for folder in others:
        if not (folder / "results").is_dir():
            raise InputError(f"{folder} holds no folder results: give the --workdir of another shard, or a copy of it")
    found = results.gather(sweep, [chosen.workdir, *others])
    runs = shard(sweep, *chosen.shard)
    if chosen.dry_run:
        _list(sweep, runs, found)
        return 0
    try:
        if chosen.collect is None:
            if not _execute(sweep, runs, found, chosen):
                print("stopped: the same command continues with what is missing", file=sys.stderr)
                return EXIT_INTERRUPTED
            found = results.gather(sweep, [chosen.workdir])
        return _tell(sweep, runs, found, chosen)
    except OSError as error:
        if (full := storage_error(error, chosen.workdir)) is None:
            raise
        raise full from error


def _execute(sweep: Sweep, runs: list[Run], found, chosen) -> bool:
    """Trains and then times what is missing of a shard; False when it was stopped."""
    from spiking_mlp_jax.sweep import child, results
    from spiking_mlp_jax.sweep.progress import SweepProgress
    from spiking_mlp_jax.sweep.run import run_all
    from spiking_mlp_jax.utils.interrupt import StopRequest

    workdir = chosen.workdir
    found = dict(found)

    def trained(run: Run, error: str | None) -> str | None:
        return ended(run, error, "measured", child.MEASURED)

    def timed(run: Run, error: str | None) -> str | None:
        return ended(run, error, "latency", child.LATENCY)

    def ended(run, error, part, file):
        document: dict[str, Any] = {"status": "failed", "error": error} if error else {"status": "done"}
        if part == "latency":
            # What was measured before stays, whatever comes of this.
            document |= {"status": "done", "measured": found[run.key]["measured"]}
        if error is None:
            document[part] = results.read_json(results.run_folder(workdir, run) / file)
        found[run.key] = document
        results.write_result(workdir, run, document)
        return error

    def missing(task):
        if task == "train":
            return [run for run in runs if found.get(run.key, {}).get("status") != "done"]
        done = [run for run in runs if found.get(run.key, {}).get("status") == "done"]
        here = [run for run in done if results.run_folder(workdir, run).is_dir()]
        return [run for run in here if chosen.retime or "latency" not in found[run.key]]

    with StopRequest() as stop:
        for task, what, workers, end in (("train", "training", chosen.workers, trained), ("time", "timing", 1, timed)):
            todo = missing(task)
            if not todo:
                continue
            print(f"{what} {len(todo)} of {len(runs)} runs in {workdir}", file=sys.stderr)
            work = {run.key: run.config.epochs * run.config.time_steps if task == "train" else 1 for run in todo}
            with SweepProgress(what, work) as progress:
                if not run_all(task, todo, workdir, sweep.test_time_steps, workers, stop, progress, end):
                    return False
    return True


def _tell(sweep: Sweep, runs: list[Run], found, chosen) -> int:
    """Writes tables and figures, prints the table, and returns the exit status."""
    from spiking_mlp_jax.sweep import plots, table
    from spiking_mlp_jax.sweep.plan import output_folder
    from spiking_mlp_jax.utils.storage import write_text

    folder = output_folder(chosen.workdir, sweep.file)
    folder.mkdir(parents=True, exist_ok=True)
    rows = table.rows(sweep, found)
    text = table.to_markdown(sweep, rows, found)
    write_text(folder / "table.md", text)
    write_text(folder / "table.csv", table.to_csv(sweep, rows))
    write_text(folder / "runs.csv", table.runs_csv(sweep, found))
    write_text(folder / "time_steps.csv", table.matrix_csv(sweep, rows))
    print(text)
    for path in [*sorted(folder.glob("*.csv")), folder / "table.md", *plots.plot_sweep(sweep, rows, folder)]:
        print(path)
    incomplete = table.incomplete(rows)
    for line in incomplete:
        print(f"warning: {line}", file=sys.stderr)
    failed = any("error" in found.get(run.key, {}) for run in runs)
    return 1 if failed or (chosen.collect is not None and incomplete) else 0


def _list(sweep: Sweep, runs: list[Run], found) -> None:
    for run in runs:
        result = found.get(run.key, {"status": "to do"})
        status = result["status"] + (", not timed" if result["status"] == "done" and "latency" not in result else "")
        fields = ", ".join(f"{k}={v}" for k, v in zip(sweep.varied, sweep.values[run.name], strict=True))
        print(f"{run.key:24} {status:16} {fields}")
    print(f"{len(runs)} of {len(sweep.runs)} runs, {len(sweep.names)} names, seeds {', '.join(map(str, sweep.seeds))}")
