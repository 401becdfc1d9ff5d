"""The processes of a comparison: their outputs compared, their runs alternated."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import PEER, Side
from benchmarks.worker import OUTPUTS, WEIGHTS

TOLERANCE = 1e-8
ROUNDING = 1e-11  # what is zero in exact arithmetic stays below this
PAUSE = 0.2  # seconds between runs, until the other side's threads sleep
ROOT = Path(__file__).parents[1]


class BenchmarkError(RuntimeError):
    """A side failed, or the sides disagree."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Shared by all processes of a case: folder for arrays, cores (0: all), timed runs, batch size, environment."""

    folder: Path
    threads: int
    runs: int
    batch: int
    environment: dict[str, str]


class Progress:
    """Progress on stderr, with the time since the case began."""

    def __init__(self, title: str):
        self.title, self.start = title, time.perf_counter()

    def __call__(self, what: str) -> None:
        seconds = time.perf_counter() - self.start
        print(f"{self.title}  {int(seconds) // 60}:{int(seconds) % 60:02d}  {what}", file=sys.stderr, flush=True)


class Worker:
    """A process that runs one side; `worker.py` describes the protocol."""

    def __init__(self, case: str, do: str, side: Side, settings: Settings):
        self.title = f"{side.title} ({case}, {do})"
        specification = dict(
            do=do,
            case=case,
            module=side.module,
            overrides=side.overrides,
            keep_memory=side.keep_memory,
            threads=settings.threads,
            batch=settings.batch,
            folder=str(settings.folder),
        )
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  (closed by `close`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(specification)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**settings.environment, **side.environment},
            cwd=ROOT,
        )

    def answer(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            BenchmarkError: the process ended instead.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        self.errors.seek(0)
        said = [text for text in self.errors.read().splitlines() if text.strip()]
        why = said[-1] if said else "no message (killed because memory ran out?)"
        raise BenchmarkError(f"{self.title} ended with status {status}: {why}")

    def ask(self, what: str) -> dict[str, Any]:
        """Send a line and return the answer; errors as `answer`."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{what}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the process ended; `answer` reports why
        return self.answer()

    def close(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def missing_peer() -> str | None:
    """The package that the peer needs and that is not installed, if any."""
    return next((name for name in ("torch", "spikingjelly") if importlib.util.find_spec(name) is None), None)


def jax_has_gpu() -> bool:
    """Whether JAX finds a GPU; another process asks, so that this one does not hold it."""
    return _true("import jax, sys; sys.exit(jax.default_backend() != 'gpu')")


def torch_has_gpu() -> bool:
    """Whether PyTorch finds a GPU, likewise."""
    return _true("import sys, torch; sys.exit(not torch.cuda.is_available())")


def _true(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def write_weights(case: str, settings: Settings, progress: Progress) -> None:
    """Write random weights for all sides, under the official names."""
    progress("random weights")
    _finish(case, "weights", Side("ours", "ours"), settings)
    assert (settings.folder / WEIGHTS).is_file()


def compare_outputs(case: str, sides: list[Side], settings: Settings, progress: Progress) -> float:
    """Compare logits, loss and gradients of our sides with the peer's, in float64.

    Sides that differ only in memory handling or neuron backend are compared once: kernels have no float64, so XLA runs
    the neurons here.

    Returns:
        the largest difference, relative to each array's largest entry.

    Raises:
        BenchmarkError: they are not the same network.
    """

    def outputs(side):
        progress(f"outputs of {side.title} in float64")
        _finish(case, "outputs", side, settings)
        with np.load(settings.folder / OUTPUTS, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    expected, worst, seen = outputs(PEER), 0.0, []
    for side in sides:
        overrides = {**side.overrides, "neuron_backend": "xla"}
        if overrides not in seen:
            seen.append(overrides)
            values = outputs(dataclasses.replace(side, overrides=overrides, keep_memory=False))
            worst = max(worst, largest_difference(values, expected))
    progress(f"outputs agree within {worst:.0e}")
    return worst


def largest_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest difference of equally named arrays, relative to each array's largest entry.

    Arrays that are zero up to rounding, e.g. the gradient of a bias before a norm, need only be so on both sides.

    Raises:
        BenchmarkError: other names, or a difference above TOLERANCE; the array is named.
    """
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise BenchmarkError(f"only one side has {odd[0]}: they are not the same network")
    worst = 0.0
    for name, expected in theirs.items():
        size = float(np.max(np.abs(expected)))
        relative = float(np.max(np.abs(ours[name] - expected))) / max(size, ROUNDING / TOLERANCE)
        # Not "above", which a NaN never is.
        if not relative <= TOLERANCE:
            raise BenchmarkError(f"the sides differ by {relative:.1e} in {name}: nothing was timed")
        worst = max(worst, relative if size > ROUNDING else 0.0)
    return worst


def alternate(
    case: str, task: str, sides: list[Side], settings: Settings, progress: Progress, runs: int = 1
) -> list[dict[str, Any]]:
    """Run all sides alternately; all are alive at once, and each waits while another runs.

    Returns:
        for each side: its title, "seconds" of every round (the median of its `runs`), "each" run's seconds, and the
        facts it reported.

    Raises:
        BenchmarkError: a side failed.
    """
    workers: list[Worker] = []
    try:
        results = []
        for side in sides:
            progress(f"{task}: starting {side.title}")
            workers.append(Worker(case, task, side, settings))
            results.append({"side": side.title, "seconds": [], "each": [], **workers[-1].answer()})
        for number in range(settings.runs):
            for worker, result in zip(workers, results, strict=True):
                time.sleep(PAUSE)
                answer = worker.ask(f"run {runs}")
                result["seconds"].append(answer["seconds"])
                result["each"].append(answer["each"])
            times = ", ".join(f"{result['side']} {result['seconds'][-1]:.3f} s" for result in results)
            progress(f"{task}: round {number + 1} of {settings.runs}: {times}")
        for worker, result in zip(workers, results, strict=True):
            result.update(worker.ask("stop"))
            result.pop("ready", None)
        return results
    finally:
        for worker in workers:
            worker.close()


def _finish(case, do, side, settings):
    worker = Worker(case, do, side, settings)
    try:
        worker.answer()
    finally:
        worker.close()
