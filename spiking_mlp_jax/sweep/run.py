"""Trains, measures and times the runs of a sweep: limited in number, stopped and resumed together.

A crash of one run does not take the others. Ctrl-C reaches this process alone, which asks each job once to save and
end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TaskID

from spiking_mlp_jax.errors import EXIT_INTERRUPTED, EXIT_NONFINITE, EXIT_STORAGE
from spiking_mlp_jax.sweep.jobs import LOG, OUTPUT, Process, Slurm, SlurmJob
from spiking_mlp_jax.sweep.plan import Run, Sweep
from spiking_mlp_jax.sweep.results import AGAIN, run_folder, write_result
from spiking_mlp_jax.train.config import to_dict
from spiking_mlp_jax.utils.files import read_json
from spiking_mlp_jax.utils.interrupt import StopRequest
from spiking_mlp_jax.utils.progress import REPORT_SECONDS, every, status_bars, status_console, time_left

Start = Callable[[str, dict[str, Any]], Process | SlurmJob]
_POLL_SECONDS = 0.2
_TAIL_BYTES = 4096
_SHOWN = 90  # characters of a run's last line
_AT_STEP = re.compile(r"step (\d+)/(\d+)")


def run_sweep(
    sweep: Sweep,
    runs: Sequence[Run],
    workdir: Path,
    found: Mapping[str, Mapping[str, Any]],
    workers: int | None = None,
    slurm: Sequence[str] | None = None,
    retime: bool = False,
) -> bool:
    """Trains the runs that have no result and then times those without latency, one at a time.

    Args:
        sweep: the sweep.
        runs: those of this machine.
        workdir: of the sweep; each result is written there when its run ends.
        found: {Run.key: result}, from `results.gather`.
        workers: trainings at a time; None: 1, or with Slurm all.
        slurm: None for processes on this machine; else options of sbatch, see `jobs.Slurm`.
        retime: measure the latency of all finished runs here again.

    Returns:
        False if a signal stopped it; the same call resumes.
    """
    results = dict(found)
    start = Process if slurm is None else Slurm(workdir / "slurm", slurm).start

    def done(run):
        return results.get(run.key, {}).get("status") == "done"

    def ended(task, run, error):
        document: dict[str, Any] = {"status": "failed", "error": error} if error else {"status": "done"}
        if task == "time":
            # A failed timing does not discard what was measured before.
            document |= {"status": "done", "measured": results[run.key]["measured"]}
        if error is None:
            part = "measured" if task == "train" else "latency"
            document[part] = read_json(run_folder(workdir, run) / OUTPUT[task], AGAIN)
        results[run.key] = document
        write_result(workdir, run, document)

    with StopRequest() as stop:
        for task in OUTPUT:
            if task == "train":
                todo = [run for run in runs if not done(run)]
                work, limit = {run.key: run.config.epochs * run.config.time_steps for run in todo}, workers
            else:
                here = [run for run in runs if done(run) and run_folder(workdir, run).is_dir()]
                todo = [run for run in here if retime or "latency" not in results[run.key]]
                work, limit = dict.fromkeys((run.key for run in todo), 1), 1
            if not todo:
                continue
            workdir.mkdir(parents=True, exist_ok=True)  # before the announcement, so that a failure is one line
            what = {"train": "training", "time": "timing"}[task]
            print(f"{what} {len(todo)} of {len(runs)} runs in {workdir}", file=sys.stderr)
            limit = limit or (1 if slurm is None else len(todo))
            with SweepProgress(what, work) as progress:
                report = lambda run, error, task=task: ended(task, run, error)  # noqa: E731
                if not run_all(task, todo, workdir, sweep.test_time_steps, limit, stop, progress, report, start):
                    return False
    return True


@dataclasses.dataclass
class _Running:
    run: Run
    job: Process | SlurmJob
    slot: int
    log: Path
    start: int  # of this job's part of the log


def run_all(
    task: str,
    runs: Sequence[Run],
    workdir: Path,
    test_time_steps: Sequence[int],
    workers: int,
    stop: StopRequest,
    progress: SweepProgress,
    ended: Callable[[Run, str | None], None],
    start: Start = Process,
) -> bool:
    """Runs a task of each run, at most `workers` at a time, until all have ended or a stop is requested.

    Processes of this machine share its cores: each worker keeps to its own, so that their threads do not compete.

    Args:
        task: "train" or "time", see `sweep.jobs`.
        runs: in the order in which they are started.
        workdir: of the sweep.
        test_time_steps: for the measurement after the training.
        workers: from 1 on.
        stop: set by a signal; the second signal raises KeyboardInterrupt, at which all jobs are killed.
        progress: where to show it.
        ended: called with each run that has ended by itself, and its error, None for success.
        start: starts a job from a task and a message.

    Returns:
        whether all ended by themselves.
    """
    waiting, running = list(runs), list[_Running]()
    groups = _core_groups(workers) if start is Process else [None] * workers
    free, asked = list(range(workers)), False
    try:
        while running or (waiting and not stop.requested):
            while waiting and free and not stop.requested:
                run, slot = waiting.pop(0), free.pop(0)
                folder = run_folder(workdir, run).absolute()
                folder.mkdir(parents=True, exist_ok=True)
                message = {"workdir": str(folder), "config": to_dict(run.config), "cores": groups[slot]}
                message["test_time_steps"] = list(test_time_steps)
                size = os.path.getsize(folder / LOG) if (folder / LOG).exists() else 0
                progress.started(run.key)
                running.append(_Running(run, start(task, message), slot, folder / LOG, size))
            if stop.requested and not asked:
                asked = True
                for one in running:
                    one.job.terminate()
            time.sleep(_POLL_SECONDS)
            for one in list(running):
                status, lines = one.job.poll(), _tail(one)
                _look(one, lines, progress)
                if status is None:
                    continue
                running.remove(one)
                free.append(one.slot)
                # A run that ends after a stop is resumed by the next command, whatever its status.
                if status == 0 or not stop.requested:
                    error = _error(status, lines)
                    ended(one.run, error)
                    progress.ended(one.run.key, error)
    finally:
        for one in running:
            one.job.kill()
            one.job.wait()
            one.job.poll()
    return not waiting and not stop.requested


def _tail(one: _Running) -> list[str]:
    """The last lines that a job has logged."""
    if not one.log.exists():
        return []
    with open(one.log, "rb") as file:
        file.seek(max(one.start, one.log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _look(one: _Running, lines: list[str], progress: SweepProgress) -> None:
    steps = _AT_STEP.findall("\n".join(lines))
    share = int(steps[-1][0]) / max(int(steps[-1][1]), 1) if steps else 0.0
    progress.at(one.run.key, share, lines[-1] if lines else "")


def _error(status: int | str, lines: list[str]) -> str | None:
    """Why a job failed, in one line; None if it did not."""
    if status == 0:
        return None
    last = lines[-1] if lines else ""
    if isinstance(status, str) or status < 0:
        why = status if isinstance(status, str) else f"killed by {signal.Signals(-status).name}"
        why += " (out of memory?)" if status == -signal.SIGKILL else ""
        return why + (f"; its last line: {last}" if last else "")
    if status == EXIT_INTERRUPTED:
        return "interrupted by a signal from outside; rerun the same command to resume"
    # Libraries may log after the error, while the process ends.
    errors = [line for line in lines if line.startswith("error: ")]
    what = {EXIT_NONFINITE: "loss not finite: ", EXIT_STORAGE: "could not write: "}.get(status, "")
    message = (errors[-1] if errors else last).removeprefix("error: ")
    return what + message if message else f"exit status {status}"


def _core_groups(workers: int) -> list[list[int] | None]:
    """The cores of each worker; None for all, also where the system does not report them."""
    if workers == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * workers
    cores = sorted(os.sched_getaffinity(0))
    if workers >= len(cores):
        return [[cores[slot % len(cores)]] for slot in range(workers)]
    return [cores[slot * len(cores) // workers : (slot + 1) * len(cores) // workers] for slot in range(workers)]


class SweepProgress:
    """A bar for the sweep and one for each run on a terminal, a line for each finished run elsewhere.

    Args:
        what: title of the sweep's bar, e.g. "training".
        work: {key: cost of the run, in any unit}; the time left is estimated from it.
        console: where to show it; None for stderr.
    """

    def __init__(self, what: str, work: Mapping[str, float], console: Console | None = None):
        self._console = console or status_console(stderr=True)
        self._work, self._total = dict(work), sum(work.values()) or 1.0
        self._shares: dict[str, float] = {}
        self._done = self._failed = 0
        self._started = time.monotonic()
        self._bar = status_bars(self._console)
        self._all = self._bar.add_task(what, total=1.0, status="")
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, str] = {}  # the last one of each run
        self._reports = contextlib.ExitStack()

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        self._reports.enter_context(every(REPORT_SECONDS, self._report, self._console.is_terminal))
        return self

    def __exit__(self, *_) -> None:
        self._reports.close()
        self._bar.stop()

    def _report(self) -> None:
        for key, line in sorted(self._lines.items()):
            self._console.print(f"{key}: {line}")

    def started(self, key: str) -> None:
        """A run has started."""
        self._tasks[key] = self._bar.add_task(f"  {key}", total=1.0, status="starting")
        self.at(key, 0.0, "starting")

    def at(self, key: str, share: float, line: str) -> None:
        """A run has done a share of its steps, 0 to 1, and this is the last line of its log."""
        self._shares[key], self._lines[key] = share, line[:_SHOWN]
        self._bar.update(self._tasks[key], completed=share, status=line[:_SHOWN])
        self._update()

    def ended(self, key: str, error: str | None) -> None:
        """A run has ended, with an error or without."""
        self._shares[key] = 1.0
        self._done += 1
        self._failed += error is not None
        self._bar.remove_task(self._tasks.pop(key))
        self._lines.pop(key)
        status = self._update()
        self._console.print(f"{key}: " + ("done" if error is None else f"FAILED: {error}") + f"  ({status})")

    def _update(self) -> str:
        share = sum(self._work[key] * share for key, share in self._shares.items()) / self._total
        status = f"{self._done} of {len(self._work)} runs"
        status += f", {self._failed} failed" if self._failed else ""
        elapsed = time.monotonic() - self._started
        if self._done and elapsed > 0:
            status += f", {3600 * self._done / elapsed:.1f} runs/h"
        if 0 < share < 1 and elapsed > 0:
            status += f", {time_left(elapsed, share, 1.0)}"
        self._bar.update(self._all, completed=share, status=status)
        return status
