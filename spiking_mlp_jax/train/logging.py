"""What a run reports: metrics for programs, a bar or lines for people, traces for a profiler."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from rich.progress import Progress

from spiking_mlp_jax.train.config import Config
from spiking_mlp_jax.utils.files import Lines, as_path, read_lines
from spiking_mlp_jax.utils.paths import is_remote
from spiking_mlp_jax.utils.progress import REPORT_SECONDS, Tolerant, every, status_bars, status_console, time_left

STARVED = 0.1  # share of the time spent waiting for images above which a run warns


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text in which null stands for NaN and the infinities, which JSON does not have.

    Args:
        value: dicts, lists, strings, numbers and None.
        indent: as for json.dumps.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Metrics:
    """metrics.jsonl, one JSON object a line, and TensorBoard files when tensorboardX is installed.

    In a line, null stands for a number that is not finite.

    Args:
        workdir: the run's folder.
        step: where the run resumes; lines of later steps are dropped, because they will be written again.
        evaluated: False if the evaluation of that step will be written again, too.
    """

    def __init__(self, workdir: str | os.PathLike[str], step: int, evaluated: bool = True):
        path = as_path(workdir) / "metrics.jsonl"
        lines = [line for line in read_lines(path) if _step_of(line) <= step]
        if not evaluated:
            lines = [line for line in lines if (json.loads(line)["step"], json.loads(line)["split"]) != (step, "eval")]
        self._lines = Lines(path, lines)
        self._board: Any = None
        if not is_remote(path) and importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, epoch: float, split: str, values: dict[str, Any]) -> None:
        """Adds a line.

        Args:
            step: steps taken so far.
            epoch: epochs taken so far.
            split: "train" or "eval".
            values: JSON values; the numbers among them go to TensorBoard, too.
        """
        self._lines.add(to_json({"step": step, "epoch": round(epoch, 4), "split": split, **values}))
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Closes the files."""
        if self._board is not None:
            self._board.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without a last line that was cut off."""
    lines = read_lines(as_path(workdir) / "metrics.jsonl")
    return [json.loads(line) for line in lines if _step_of(line) != float("inf")]


def _step_of(line):
    # A killed process can leave half a line, which sorts after all others.
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Speedometer:
    """Images per second over the last 50 steps, without the first after a start, which may compile."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._times: collections.deque[float] = collections.deque(maxlen=51)

    def restart(self) -> None:
        """Forgets what came before a pause."""
        self._times.clear()

    def step(self) -> float | None:
        """Counts a step; images per second, None until that is known."""
        self._times.append(time.monotonic())
        return self.rate

    @property
    def rate(self) -> float | None:
        """Images per second so far, None until that is known."""
        seconds = self._times[-1] - self._times[0] if self._times else 0
        return round((len(self._times) - 1) * self._batch_size / seconds, 1) if seconds > 0 else None


class Display:
    """The progress of a run: a live bar on a terminal, plain lines elsewhere, and every line in log.txt.

    Without a terminal there is a line at least every 10 s, however long a step or its compilation takes.

    Args:
        stream: where to show it; None for stdout.
        show: False shows nothing.
        doing: says in words what the run is doing, for those lines.
    """

    def __init__(self, stream: TextIO | None = None, show: bool = True, doing: Callable[[], str] = lambda: "running"):
        self._console = status_console(file=Tolerant(stream or sys.stdout), quiet=not show)
        self._doing = doing
        self._log: Lines | None = None
        self._first = self._last = 0
        self._started: float | None = None
        self._shown_at = time.monotonic()
        self._news = ""  # what has happened since the last line
        self._bar: Progress | None = None
        self._reports = contextlib.ExitStack()
        if show:
            self._reports.enter_context(every(REPORT_SECONDS, self._still, self._console.is_terminal))

    def start(self, step: int, last: int, log: str | os.PathLike[str] | None) -> None:
        """Begins to log, and shows the bar.

        Args:
            step: where the run starts.
            last: the step at which the bar is full.
            log: the file to append to, None for none.
        """
        self._log = None if log is None else Lines(log)
        self._last = last
        if not self._console.quiet and self._console.is_terminal:
            self._bar = status_bars(self._console)
            self._task = self._bar.add_task("compiling", total=last, completed=step, status="")
            self._bar.start()

    def say(self, text: str) -> None:
        """Shows a line and logs it."""
        self._show(text)
        self.log(text)

    def log(self, text: str) -> None:
        """Logs a line without showing it."""
        if self._log is not None:
            self._log.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def step(self, step: int, epoch: str, status: str) -> None:
        """Moves the bar.

        Args:
            step: steps taken.
            epoch: e.g. "epoch 2/5".
            status: loss, accuracy and speed, in words.
        """
        if self._started is None:
            # The first step compiles; counting it would spoil the estimate.
            self._started, self._first = time.monotonic(), step
        self._news = f"step {step}/{self._last}  {epoch}  {status}  {self.left(step)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=epoch, status=f"{status}  {self.left(step)}")

    def report(self, step: int, epoch: str, status: str) -> None:
        """A periodic line, which is shown only where there is no bar."""
        line = f"step {step}/{self._last}  {epoch}  {status}  {self.left(step)}"
        if self._bar is None:
            self._show(line)
        self.log(line)

    def left(self, step: int) -> str:
        """The time left, in words; empty until it can be estimated."""
        if self._started is None:
            return ""
        return time_left(time.monotonic() - self._started, step - self._first, self._last - self._first)

    def close(self) -> None:
        """Takes the bar down."""
        self._reports.close()
        if self._bar is not None:
            self._bar.stop()

    def _show(self, line: str) -> None:
        self._console.print(line)
        self._shown_at, self._news = time.monotonic(), ""

    def _still(self) -> None:
        silent = time.monotonic() - self._shown_at
        if silent > 0.9 * REPORT_SECONDS:
            self._console.print(self._news or f"{self._doing()}, for {silent:.0f} s since the last line")
            self._news = ""


class DataWait:
    """Measures how long training is held up by waiting for batches.

    A step is dispatched and runs on its own: while the devices work, blocking on the iterator costs nothing. What
    costs is the part of it after the previous step has ended, so a thread notes when that was. With synchronous
    dispatch this is all of the blocking. The first step, in which everything starts up, is not counted.
    """

    def __init__(self):
        # Its thread is not a daemon: Python would end it inside the runtime when the process exits, which aborts.
        self._observer = concurrent.futures.ThreadPoolExecutor(1)
        self._ended: concurrent.futures.Future[float] | None = None
        self._running_since: float | None = None
        self._waited = self._total = 0.0
        self._steps = 0

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch."""
        called = time.monotonic()
        with jax.profiler.TraceAnnotation("wait for data"):
            batch = next(batches)
        if self._ended is None:
            return batch
        if self._running_since is None:
            self._running_since = called
        # While the previous step is running nobody has waited.
        if self._ended.done():
            self._waited += max(0.0, time.monotonic() - max(called, self._ended.result()))
        self._steps += 1
        return batch

    def dispatched(self, outputs: Any) -> None:
        """To be called with small outputs of a step as soon as it has been dispatched."""
        self._ended = self._observer.submit(_end, outputs)

    def pause(self) -> None:
        """Stops the clock until the next batch: an evaluation is not training time."""
        if self._running_since is not None:
            self._total += time.monotonic() - self._running_since
            self._running_since = None

    def so_far(self) -> tuple[float | None, float | None]:
        """Share of the time spent waiting, 0 to 1, and its seconds a step, since `clear`; None: not known yet."""
        total = self._total + (0.0 if self._running_since is None else time.monotonic() - self._running_since)
        if not self._steps or total <= 0:
            return None, None
        return round(min(1.0, self._waited / total), 4), round(self._waited / self._steps, 6)

    def clear(self) -> None:
        """Starts over, after a line of metrics."""
        if self._running_since is not None:
            self._running_since = time.monotonic()
        self._waited = self._total = 0.0
        self._steps = 0


def _end(outputs):
    # A step that failed has ended, too; fetching its outputs raises the error.
    with contextlib.suppress(Exception):
        jax.block_until_ready(outputs)
    return time.monotonic()


class Report:
    """Sums the metrics of steps and reports their means every `log_every` steps.

    Args:
        config: the experiment.
        epoch_steps: steps an epoch.
        schedule: function of the number of steps taken to the learning rate.
        display: shows each step and logs each line.
        metrics: gets each line as well, None in processes that write nothing.
        window: sums since the last line, from `empty_window` or a checkpoint; it is updated in place, so that a
            checkpoint holds it and a resumed run writes the same lines.

    Attributes:
        data_wait: fetches the batches and sees every dispatched step.
    """

    def __init__(
        self,
        config: Config,
        epoch_steps: int,
        schedule: Callable[[int], Any],
        display: Display,
        metrics: Metrics | None,
        window: dict[str, float],
    ):
        self._config, self._epoch_steps, self._schedule = config, epoch_steps, schedule
        self._display, self._metrics, self._window = display, metrics, window
        self.data_wait = DataWait()
        self._speedometer = Speedometer(config.batch_size)
        self._warned = False

    @staticmethod
    def empty_window(config: Config) -> dict[str, float]:
        """Sums over no steps."""
        names = ["steps", "loss", "accuracy", "grad_norm", *(["activity"] if config.activity_weight else [])]
        return dict.fromkeys(names, 0.0) | {"steps": 0} | ({"skipped": 0} if config.on_nonfinite == "skip" else {})

    def pause(self) -> None:
        """Stops the clocks: evaluating and saving, which come now, are not training time."""
        self.data_wait.pause()
        self._speedometer.restart()

    def step(self, step: int, values: dict[str, float], sound: bool, timed: bool, ends: bool) -> None:
        """Counts a step.

        Args:
            step: its number.
            values: its metrics.
            sound: False if the step was skipped; then it does not count in the means.
            timed: whether time has passed since the last one. The last step before a pause is counted right after the
                one before it.
            ends: whether the window ends with it.
        """
        window = self._window
        if sound:
            for name, value in {"steps": 1, **values}.items():
                window[name] += value
        else:
            window["skipped"] += 1
        speed = self._speedometer.step() if timed else self._speedometer.rate
        count = window["steps"] or np.nan  # all may have been skipped
        means = {name: window[name] / count for name in values}
        share, waited = self.data_wait.so_far()
        epoch = f"epoch {-(-step // self._epoch_steps)}/{self._config.epochs}"
        status = f"loss {means['loss']:.4f}  accuracy {100 * means['accuracy']:.1f} %"
        status += f"  activity {means['activity']:.4f}" if "activity" in means else ""
        status += "" if speed is None else f"  {speed:.0f} images/s"
        status += "" if share is None else f"  data wait {100 * share:.0f} %"
        self._display.step(step, epoch, status)
        if not ends:
            return
        self._display.report(step, epoch, status)
        if self._metrics is not None:
            means |= {"skipped": window["skipped"]} if "skipped" in window else {}
            means["learning_rate"] = float(np.asarray(self._schedule(step - 1)))
            means |= {"images_per_second": speed, "data_wait_share": share, "data_wait_seconds": waited}
            self._metrics.write(step, step / self._epoch_steps, "train", means)
        window.update(dict.fromkeys(window, 0))
        self.data_wait.clear()
        if share is not None and share > STARVED and not self._warned:
            self._warned = True
            self._display.say(
                f"warning: {100 * share:.0f} % of the time since the last line was spent waiting for images: raise "
                f"workers, which is {self._config.workers}, or give the images a faster disk or a cheaper preparation"
            )


class Profiler:
    """Traces the steps of one window, at most once, for TensorBoard's profiler or Perfetto.

    Args:
        window: first and last, from `parse_window`; None: traces nothing.
        folder: where the trace goes.
        say: reports where the trace is.
    """

    def __init__(self, window: tuple[int, int] | None, folder: str | os.PathLike[str], say: Callable[[str], None]):
        self._window, self._folder, self._say = window, os.fspath(folder), say
        self._tracing = False

    def between_steps(self, step: int, state: Any) -> None:
        """Starts or ends the trace when it is time.

        Args:
            step: steps taken so far.
            state: arrays of the last step, awaited so that the trace holds complete steps.
        """
        if self._window is None:
            return
        first, last = self._window
        if step >= last:
            self.close(state)
        elif step >= first and not self._tracing:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def close(self, state: Any = None) -> None:
        """Ends a trace that is still running."""
        if not self._tracing:
            return
        self._tracing, self._window = False, None
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        self._say(f"a trace of the steps is in {self._folder}")
