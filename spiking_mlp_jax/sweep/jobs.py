"""A task of one run, as a process on this machine or as a Slurm job.

"train" trains, or resumes, as train.py does and then writes WORKDIR/measured.json; "time" writes WORKDIR/latency.json.
Exit statuses are train.py's. A message to a task is {"workdir", "config", "test_time_steps", "cores"}: JSON values,
with "cores" null for all.

Processes of this machine do not use submitit's local executor. It starts every job at once, gives a cancelled one a
second to save, does not report how a job died, and lets jobs run on when the sweep is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spiking_mlp_jax.errors import EXIT_INTERRUPTED, InputError
from spiking_mlp_jax.utils.files import write_whole

OUTPUT = {"train": "measured.json", "time": "latency.json"}
LOG, LOCK, SLURM_JOB = "sweep.log", "sweep.lock", "slurm_job.json"
MODULE = "spiking_mlp_jax.sweep.jobs"
# Longer than a predecessor needs for its last step, evaluation and save.
PATIENCE = 120.0


class Process(subprocess.Popen[bytes]):
    """A task in a session of its own, which Ctrl-C does not reach.

    Its standard input stays open as long as the sweep lives. When it closes, the task ends as on SIGTERM, so that
    nobody writes into a workdir that the next command opens.
    """

    def __init__(self, task: str, message: dict[str, Any]):
        with open(Path(message["workdir"]) / LOG, "ab") as log:
            super().__init__(
                [sys.executable, "-m", MODULE, task],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert self.stdin is not None
        # The status and the log of a process that has died at once say why.
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(json.dumps(message).encode() + b"\n")

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        status = super().poll()
        if status is not None and self.stdin is not None:
            self.stdin.close()
        return status


class Slurm:
    """Submits tasks to Slurm through submitit, and finds those that an earlier, killed sweep submitted.

    submitit pickles the submitted function and its arguments into `folder`, which only this program and its jobs
    write. Nothing else is ever unpickled: neither weights nor results.

    Args:
        folder: for submitit's files; on a file system that all nodes see.
        options: "NAME=VALUE" or "NAME", long options of sbatch without their dashes; "time" is required.

    Raises:
        InputError: submitit or Slurm is missing, or an option is malformed.
    """

    def __init__(self, folder: Path, options: Sequence[str]):
        try:
            import submitit
        except ModuleNotFoundError as error:
            raise InputError("--slurm needs submitit: pip install 'spiking-mlp-jax[slurm]'") from error
        given: dict[str, Any] = {}
        for option in options:
            name, equals, value = option.lstrip("-").partition("=")
            given[name.replace("-", "_")] = value if equals else True
        if not isinstance(given.get("time"), str):
            raise InputError("--slurm needs a time limit per job, e.g. --slurm time=4:00:00 partition=gpu")
        try:
            # A job that reaches its time limit is requeued and resumes, as often as it takes.
            self._executor = submitit.SlurmExecutor(folder.absolute(), max_num_timeout=1_000_000)
        except RuntimeError as error:
            raise InputError("--slurm needs Slurm's srun and sbatch on PATH: run it on a login node") from error
        self._executor.update_parameters(
            stderr_to_stdout=True, additional_parameters={"job_name": "spiking-mlp-sweep", **given}
        )

    def start(self, task: str, message: dict[str, Any]) -> SlurmJob:
        """Submits a task, or attaches to its job of an earlier sweep."""
        import submitit

        note = Path(message["workdir"]) / SLURM_JOB
        content = {"task": task, "message": message}
        if note.exists():
            before = json.loads(note.read_text())
            job = submitit.SlurmJob(self._executor.folder, before.pop("job"))
            if before == content:
                return SlurmJob(job, note)
            job.cancel(check=False)
        try:
            job = self._executor.submit(SlurmTask(), task, message)
        except (RuntimeError, OSError) as error:
            raise InputError(f"sbatch rejected the job: {' '.join(str(error).split())}") from error
        write_whole(note, json.dumps({**content, "job": job.job_id}))
        return SlurmJob(job, note)


class SlurmJob:
    """A submitted task with the methods of a subprocess.Popen that a sweep uses."""

    def __init__(self, job: Any, note: Path):
        self._job, self._note = job, note
        self._status: int | str | None = None

    def poll(self) -> int | str | None:
        """The exit status, or Slurm's state of a job that left none; None while it runs or waits."""
        if self._status is None and self._job.done():
            from submitit.core.utils import FailedJobError, UncompletedJobError

            try:
                self._status = int(self._job.result())
            except FailedJobError:
                self._status = 1  # an exception: its traceback is in the log
            except UncompletedJobError:
                self._status = f"Slurm reports {self._job.state}"
            self._note.unlink(missing_ok=True)
        return self._status

    def terminate(self) -> None:
        """Cancels the job: Slurm sends SIGTERM, and SIGKILL after its KillWait of usually 30 seconds."""
        self._job.cancel(check=False)
        self._note.unlink(missing_ok=True)
        self._status = EXIT_INTERRUPTED

    kill = terminate

    def wait(self) -> None:
        """Does not wait: the lock of the workdir holds back a successor."""


class SlurmTask:
    """A task as submitit calls it on a node."""

    def __call__(self, task: str, message: dict[str, Any]) -> int:
        """Runs the task and returns its exit status; at the time limit saves and requeues the job."""
        with open(Path(message["workdir"]) / LOG, "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        limit, requeue = [], signal.getsignal(signal.SIGUSR2)

        def save(*_):
            limit.append(True)
            # Preemption may have sent SIGTERM before; a second one would not let the trainer save.
            request = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
            if not getattr(request, "requested", False):
                os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(signal.SIGUSR2, save)
        status = run_task(task, message)
        if status == EXIT_INTERRUPTED:
            if limit and callable(requeue):
                requeue(signal.SIGUSR2, None)  # submitit's handler, which does not return
            # Without a result: Slurm's state says whether the job was cancelled or will run again.
            sys.exit(EXIT_INTERRUPTED)
        return status

    def checkpoint(self, task: str, message: dict[str, Any]) -> Any:
        """What submitit submits when it requeues a job."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, task, message)


def run_task(task: str, message: dict[str, Any]) -> int:
    """Runs a task in this process and returns the exit status; prints the message of bad input."""
    workdir = Path(message["workdir"])
    if message["cores"] is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, message["cores"])
    # JAX and numba count the cores when they are imported.
    from spiking_mlp_jax.sweep.measure import measure, measure_latency
    from spiking_mlp_jax.train.config import default_config
    from spiking_mlp_jax.train.loop import fit
    from spiking_mlp_jax.utils.compilation_cache import use_compilation_cache

    config: Any = default_config()
    config.update(message["config"])
    try:
        with _alone(workdir):
            (workdir / OUTPUT[task]).unlink(missing_ok=True)
            if task == "time":
                use_compilation_cache(config.compilation_cache)
                found = measure_latency(config, workdir)
            else:
                result = fit(config, workdir)
                if not result.finished:
                    return EXIT_INTERRUPTED
                if result.best_accuracy is None:
                    raise InputError("no evaluation had a finite loss; use a new workdir and a lower learning rate")
                found = measure(config, workdir, message["test_time_steps"])
            write_whole(workdir / OUTPUT[task], json.dumps(found, allow_nan=False) + "\n")
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        return error.exit_code
    return 0


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """Waits until no other process works in a workdir. The system frees the lock of a process that dies."""
    deadline = time.monotonic() + PATIENCE
    with open(workdir / LOCK, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"another process works in {workdir}; stop it, or give each machine its own --shard"
                    ) from None
                time.sleep(0.1)
        yield


def _end_with_parent() -> None:
    # Not through sys.stdin: a thread that waits there keeps the interpreter from shutting down.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    message = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        sys.exit(run_task(sys.argv[1], message))
    except KeyboardInterrupt:
        sys.exit(130)
