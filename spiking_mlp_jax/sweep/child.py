"""A process for one run of a sweep: `python -m spiking_mlp_jax.sweep.child train|time`.

The first line on its standard input is JSON: "workdir", "config", "test_time_steps", and "cores", which it shall keep
to (null: all). The pipe stays open as long as the parent lives. When it closes, the parent is gone, and the child ends
as on SIGTERM: the state is saved, and nobody goes on writing into a workdir that the next command opens.

"train" trains, or continues, as train.py does, and then writes WORKDIR/measured.json; "time" writes
WORKDIR/latency.json. Exit statuses are train.py's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spiking_mlp_jax.errors import EXIT_INTERRUPTED, InputError

MEASURED, LATENCY, LOCK = "measured.json", "latency.json", "sweep.lock"
# Longer than a predecessor takes for its last step, evaluation and save.
PATIENCE = 120.0


def main(arguments: list[str]) -> int:
    """Runs one task and returns the exit status."""
    message = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cores = message["cores"]
    if cores is not None and hasattr(os, "sched_setaffinity"):
        # Before JAX starts as many threads as there are cores.
        os.sched_setaffinity(0, cores)
    workdir = Path(message["workdir"])
    try:
        with _alone(workdir):
            return _run(arguments[0], message, workdir)
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return error.exit_code


def _run(task: str, message: dict[str, Any], workdir: Path) -> int:
    from spiking_mlp_jax.sweep.measure import measure, measure_latency
    from spiking_mlp_jax.train.config import default_config
    from spiking_mlp_jax.train.loop import train
    from spiking_mlp_jax.utils.compilation_cache import use_compilation_cache
    from spiking_mlp_jax.utils.storage import write_text

    config: Any = default_config()
    config.update(message["config"])
    if task == "time":
        use_compilation_cache(config.compilation_cache)
        (workdir / LATENCY).unlink(missing_ok=True)
        write_text(workdir / LATENCY, json.dumps(measure_latency(config, workdir)) + "\n")
        return 0
    (workdir / MEASURED).unlink(missing_ok=True)
    result = train(config, workdir)
    if not result.finished:
        return EXIT_INTERRUPTED
    if result.best_accuracy is None:
        raise InputError("no evaluation had a finite loss: take a new workdir and a lower learning rate")
    found = measure(config, workdir, message["test_time_steps"])
    write_text(workdir / MEASURED, json.dumps(found, allow_nan=False) + "\n")
    print("measured", flush=True)
    return 0


def _end_with_parent() -> None:
    # Not through sys.stdin: a thread that waits there keeps the interpreter from shutting down.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """Waits until no other process works in a workdir; the system frees the lock of one that dies."""
    deadline = time.monotonic() + PATIENCE
    with open(workdir / LOCK, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"another process works in {workdir}: end it, or give each machine a --shard of its own"
                    ) from None
                time.sleep(0.1)
        yield


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
