"""The command `sweep`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from spiking_mlp_jax.cli.options import add_command, path_type, positive
from spiking_mlp_jax.errors import EXIT_INTERRUPTED, InputError
from spiking_mlp_jax.utils.paths import output_folder, real_path


def add_commands(commands) -> None:
    """Add the parser to the subparsers of `spiking-mlp`."""
    parser = add_command(
        commands,
        "sweep",
        "train variations of an experiment with several seeds and compare them",
        "Trains every run of a sweep file with every seed, each in its own process or Slurm job; measures accuracy, "
        "synaptic operations, accuracy with other numbers of time steps and, at the end and one at a time, latency; "
        "writes a table and figures into DIR/tables. The same command resumes after a stop or a kill.",
        "spiking-mlp sweep configs/sweeps/time_steps.py --workdir runs/ablations --workers 2\n"
        "  spiking-mlp sweep configs/sweeps/norm.py --workdir runs/ablations --slurm time=4:00:00 partition=gpu\n"
        "  spiking-mlp sweep configs/sweeps/norm.py --workdir runs/ablations --shard 1/3 --seeds 0,1\n"
        "  spiking-mlp sweep configs/sweeps/norm.py --workdir runs/ablations --collect copied/from/other/machine",
        "--config.NAME=VALUE sets a field of the experiment in all runs. Sweeps with the same DIR share the runs that "
        "have the same name and configuration. Exit statuses: 0 all done, 1 a run failed (with --collect: or is "
        "missing), 2 bad input, 75 stopped (rerun to resume).",
    )
    parser.add_argument("sweep", metavar="SWEEP", help="Python file with a function get_sweep, as in configs/sweeps")
    parser.add_argument("--workdir", metavar="DIR", type=path_type, required=True, help="folder of all that it writes")
    parser.add_argument(
        "--workers", metavar="N", type=positive, help="trainings at a time (default: 1; with --slurm: all)"
    )
    parser.add_argument(
        "--slurm",
        metavar="NAME=VALUE",
        nargs="*",
        help="submit each run as a Slurm job with these long options of sbatch, e.g. time=4:00:00 partition=gpu "
        "gpus_per_node=1; DIR must be on a shared file system",
    )
    parser.add_argument("--shard", metavar="I/N", type=_shard, default=(1, 1), help="train part I of N, from 1")
    parser.add_argument("--seeds", metavar="S,S", type=_seeds, help="seeds, e.g. 0,1,2 (default: the file's)")
    parser.add_argument(
        "--collect",
        metavar="DIR",
        nargs="*",
        type=path_type,
        help="train nothing; gather results of DIR... and --workdir",
    )
    parser.add_argument("--retime", action="store_true", help="measure latency again, of all finished runs here")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their status")
    parser.set_defaults(run=_sweep, overrides=[])


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f'"{text}" is not a shard, e.g. 1/3, 2/3 or 3/3')
    return index, count


def _seeds(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f'"{text}" is not a list of seeds, e.g. 0,1,2')
    return tuple(map(int, text.split(",")))


def _sweep(chosen: argparse.Namespace) -> int:
    from spiking_mlp_jax.sweep import run
    from spiking_mlp_jax.sweep.plan import load_sweep, shard
    from spiking_mlp_jax.sweep.results import gather
    from spiking_mlp_jax.utils.files import system_error

    workdir, others = real_path(chosen.workdir), [real_path(folder) for folder in chosen.collect or []]
    output_folder(workdir, "--workdir")
    sweep = load_sweep(chosen.sweep, chosen.overrides, chosen.seeds)
    for folder in others:
        if not (folder / "results").is_dir():
            raise InputError(f"{folder} has no folder results; give the --workdir of another shard, or a copy of it")
    found = gather(sweep, [workdir, *others])
    runs = shard(sweep, *chosen.shard)
    if chosen.dry_run:
        _list(sweep, runs, found)
        return 0
    try:
        if chosen.collect is None:
            if not run.run_sweep(sweep, runs, workdir, found, chosen.workers, chosen.slurm, chosen.retime):
                print("stopped; rerun the same command to resume", file=sys.stderr)
                return EXIT_INTERRUPTED
            found = gather(sweep, [workdir])
        incomplete = _compare(sweep, found, workdir)
    except OSError as error:
        raise system_error(error, workdir) from error
    failed = any("error" in found.get(one.key, {}) for one in runs)
    return 1 if failed or (chosen.collect is not None and incomplete) else 0


def _compare(sweep, found, workdir) -> list[str]:
    """Write tables and figures and print the table; returns what is incomplete."""
    from spiking_mlp_jax.sweep import plots, table
    from spiking_mlp_jax.utils.files import write_whole

    # Several sweeps may share a workdir, and with it runs.
    folder = workdir / "tables" / Path(sweep.file).stem
    folder.mkdir(parents=True, exist_ok=True)
    rows = table.rows(sweep, found)
    text = table.to_markdown(sweep, rows, found)
    files = {
        "runs.csv": table.runs_csv(sweep, found),
        "table.csv": table.to_csv(sweep, rows),
        "time_steps.csv": table.matrix_csv(sweep, rows),
        "table.md": text,
    }
    for name, content in files.items():
        write_whole(folder / name, content)
    print(text)
    for path in [*(folder / name for name in files), *plots.plot_sweep(sweep, rows, folder)]:
        print(path)
    incomplete = table.incomplete(rows)
    for line in incomplete:
        print(f"warning: {line}", file=sys.stderr)
    return incomplete


def _list(sweep, runs, found) -> None:
    for run in runs:
        result = found.get(run.key, {"status": "to do"})
        status = result["status"] + (", not timed" if result["status"] == "done" and "latency" not in result else "")
        fields = ", ".join(f"{k}={v}" for k, v in zip(sweep.varied, sweep.values[run.name], strict=True))
        print(f"{run.key:24} {status:16} {fields}")
    print(f"{len(runs)} of {len(sweep.runs)} runs, {len(sweep.names)} names, seeds {', '.join(map(str, sweep.seeds))}")
