"""One process of a comparison: one side of a case, with its own memory and threads.

    python -m benchmarks.worker SPECIFICATION

The parent writes lines to stdin and reads lines of JSON from stdout. SPECIFICATION is JSON: `do` is "weights" (write
random weights), "outputs" (write the values that the sides must agree on) or a task; `case`, `module`, `overrides`,
`keep_memory`, `threads`, `batch` and `folder` are its settings. For a task, "run N" is answered with the seconds of
each of N runs and their median, "stop" with facts about the process. Images in the folder replace random ones.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path

# Few, because float64 takes twice the memory.
COMPARED_IMAGES = 2
WEIGHTS, OUTPUTS, IMAGES = "weights.npz", "outputs.npz", "images.npz"


def cores() -> int:
    """Number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(specification: str) -> None:
    given = json.loads(specification)
    if given["threads"] and hasattr(os, "sched_setaffinity"):
        # Both sides size their thread pools by the available cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given["threads"]])
    # Output of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(**values):
        print(json.dumps(values), file=answers, flush=True)

    import numpy as np

    from benchmarks.cases import CASES, DEPLOYED_CASES, GPU_CASES, QUICK_CASES

    case = {**CASES, **GPU_CASES, **QUICK_CASES, **DEPLOYED_CASES}[given["case"]]
    if given["keep_memory"]:
        # As the trainer does.
        importlib.import_module("jax").config.update("jax_cpu_enable_async_dispatch", False)
    config = dataclasses.replace(case.config, **given["overrides"])
    folder = Path(given["folder"])
    side = importlib.import_module(f"benchmarks.{given['module']}")
    # As many as JAX uses, regardless of OMP_NUM_THREADS.
    threads = given["threads"] or cores()
    if given["module"] == "theirs":
        importlib.import_module("torch").set_num_threads(threads)
    if given["do"] == "weights":
        np.savez(folder / WEIGHTS, allow_pickle=False, **side.initial_state(config, seed=0))
        return answer(done=True)

    def read():
        with np.load(folder / WEIGHTS, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    random = np.random.default_rng(0)
    batch = given["batch"] or case.batch
    shape = (batch, config.image_size, config.image_size, config.in_channels)
    images, labels = random.normal(size=shape), random.integers(0, config.num_classes, batch)
    if (folder / IMAGES).is_file():
        images = _images(folder / IMAGES, batch)
    if given["do"] == "outputs":
        # Computed in float64: rounding would flip spikes of potentials near the threshold.
        config = dataclasses.replace(config, dtype="float32")
        values = side.outputs(config, read, images[:COMPARED_IMAGES], labels[:COMPARED_IMAGES])
        np.savez(folder / OUTPUTS, allow_pickle=False, **values)
        return answer(done=True)
    if given["module"] == "deployed":
        # The engine takes raw pixels.
        images = _images(folder / IMAGES, batch, raw=True)
        read = folder / side.NETWORK
    run, facts = getattr(side, {"train": "training", "inference": "inference"}[given["do"]])(
        config, read, images, labels
    )
    if given["keep_memory"]:
        importlib.import_module("spiking_mlp_jax.utils.memory").keep_freed_memory()
    run()  # warm-up
    answer(ready=True, **facts)
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        seconds = []
        for _ in range(int(line.partition(" ")[2] or 1)):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        answer(seconds=statistics.median(seconds), each=seconds)
    answer(peak_bytes=_peak_bytes(), threads=threads, **side.device_facts())


def _peak_bytes():
    """Peak resident memory of this process."""
    try:
        # On Linux, getrusage includes the parent's peak from before exec.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


def _images(path, batch, raw=False):
    """A batch of the images in a file, normalized or raw, repeated if there are too few."""
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        images = np.resize(file["images"], (batch, *file["images"].shape[1:]))
        return images if raw else (images / 255 - file["mean"]) / file["std"]


if __name__ == "__main__":
    main(sys.argv[1])
