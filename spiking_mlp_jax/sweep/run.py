"""Runs of a sweep as processes: so many at a time, each in its own session, stopped and continued together.

A crash of one does not take the others. Ctrl-C reaches this process alone, which asks each child once to save and end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from spiking_mlp_jax.errors import EXIT_INTERRUPTED, EXIT_NONFINITE, EXIT_STORAGE
from spiking_mlp_jax.sweep.plan import Run
from spiking_mlp_jax.sweep.results import run_folder
from spiking_mlp_jax.train.config import to_dict
from spiking_mlp_jax.utils.interrupt import StopRequest

LOG = "sweep.log"
CHILD = "spiking_mlp_jax.sweep.child"
_POLL_SECONDS = 0.2
_TAIL_BYTES = 4096
_AT_STEP = re.compile(rb"step (\d+)/(\d+)")


class Watcher(Protocol):
    """Is told what happens; see `sweep.progress`."""

    def started(self, key: str) -> None:
        """A run was started."""

    def at(self, key: str, share: float, line: str) -> None:
        """A run has got so far, a share from 0 to 1, and its log's last line is this."""

    def ended(self, key: str, error: str | None) -> None:
        """A run has ended, with an error if it failed."""


@dataclasses.dataclass
class _Child:
    run: Run
    process: subprocess.Popen[bytes]
    slot: int
    log_file: Path
    start: int  # of this process's part of the log


def run_all(
    task: str,
    runs: Sequence[Run],
    workdir: Path,
    test_time_steps: Sequence[int],
    workers: int,
    stop: StopRequest,
    watcher: Watcher,
    ended: Callable[[Run, str | None], str | None],
) -> bool:
    """Runs a task of each run, at most `workers` at a time, until all have ended or a stop is requested.

    The cores this process may use are shared out: each worker keeps to its own, so that the threads of one do not get
    in the others' way.

    Args:
        task: "train" or "time", see `sweep.child`.
        runs: in the order in which they are started.
        workdir: of the sweep.
        test_time_steps: for the measurement after the training.
        workers: from 1 on.
        stop: set by a signal; the second signal raises KeyboardInterrupt, at which all children are killed.
        watcher: shown to the user.
        ended: called with each run that has ended by itself, and its error, None if all went well; returns the error
            that is shown.

    Returns:
        whether all ended by themselves.
    """
    waiting, children = list(runs), list[_Child]()
    free, groups, told = list(range(workers)), _core_groups(workers), False
    try:
        while children or (waiting and not stop.requested):
            while waiting and free and not stop.requested:
                slot = free.pop(0)
                run = waiting.pop(0)
                watcher.started(run.key)
                children.append(_start(task, run, workdir, test_time_steps, groups[slot], slot))
            if stop.requested and not told:
                told = True
                for child in children:
                    child.process.send_signal(signal.SIGTERM)
            time.sleep(_POLL_SECONDS)
            for child in list(children):
                status = child.process.poll()
                _look(child, watcher)
                if status is None:
                    continue
                children.remove(child)
                _close(child)
                free.append(child.slot)
                # What ends after a stop is continued by the next command, whatever its status.
                if child.process.returncode == 0 or not stop.requested:
                    watcher.ended(child.run.key, ended(child.run, _error(child)))
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
            _close(child)
    return not waiting and not stop.requested


def _start(task, run, workdir, test_time_steps, cores, slot) -> _Child:
    folder = run_folder(workdir, run)
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / LOG
    message = {"workdir": str(folder), "config": to_dict(run.config), "cores": cores}
    message["test_time_steps"] = list(test_time_steps)
    with open(log_file, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", CHILD, task],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        child = _Child(run, process, slot, log_file, log.tell())
    assert process.stdin is not None
    # A child that has died at once says why by its status and its log.
    with contextlib.suppress(BrokenPipeError):
        # The pipe stays open: the child ends when it closes.
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()
    return child


def _close(child: _Child) -> None:
    if child.process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            child.process.stdin.close()


def _look(child: _Child, watcher: Watcher) -> None:
    tail = _tail(child)
    steps = _AT_STEP.findall(tail)
    share = int(steps[-1][0]) / max(int(steps[-1][1]), 1) if steps else 0.0
    watcher.at(child.run.key, share, _last_line(tail))


def _tail(child: _Child) -> bytes:
    size = os.path.getsize(child.log_file)
    with open(child.log_file, "rb") as file:
        file.seek(max(child.start, size - _TAIL_BYTES))
        return file.read()


def _last_line(tail: bytes) -> str:
    lines = [line.strip() for line in tail.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _error(child: _Child) -> str | None:
    """Why a child failed, in a line; None if it did not."""
    status = child.process.returncode
    if status == 0:
        return None
    tail = _tail(child)
    # What libraries say while the process ends comes after the error.
    said = [line for line in tail.decode(errors="replace").splitlines() if line.startswith("error: ")]
    last = said[-1].strip() if said else _last_line(tail)
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}" + (f"; it last said: {_last_line(tail)}" if tail.strip() else "")
    if status == EXIT_INTERRUPTED:
        return "interrupted by a signal from outside; the same command continues it"
    what = {EXIT_NONFINITE: "loss not finite: ", EXIT_STORAGE: "could not write: "}.get(status, "")
    return f"{what}{last.removeprefix('error: ')}" if last else f"exit status {status}"


def _core_groups(workers: int) -> list[list[int] | None]:
    """The cores of each worker; None where all may use all, as where this system cannot tell."""
    if workers == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * workers
    cores = sorted(os.sched_getaffinity(0))
    if workers >= len(cores):
        return [[cores[slot % len(cores)]] for slot in range(workers)]
    return [cores[slot * len(cores) // workers : (slot + 1) * len(cores) // workers] for slot in range(workers)]
