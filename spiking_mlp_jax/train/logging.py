"""What a run tells while it runs: metrics for programs, a bar or lines for people."""

from __future__ import annotations

import collections
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from spiking_mlp_jax.utils.storage import Lines, as_path, is_remote, read_lines


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text in which null stands for NaN and the infinities, numbers that JSON does not have.

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
        step: the step a run resumes at; lines of later steps are dropped, because they will be written again.
        evaluated: False when the evaluation of that step will be written again, too.
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
    """The lines of a run's metrics.jsonl; a last line that was cut off is left out."""
    lines = read_lines(epath.Path(workdir) / "metrics.jsonl")
    return [json.loads(line) for line in lines if _step_of(line) != float("inf")]


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


def _step_of(line):
    # A killed process can leave half a line; it counts as written after everything.
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Display:
    """The progress of a run: a live bar on a terminal, plain lines elsewhere, and every line in log.txt.

    Args:
        log: the file to append to, None for none.
        first: step the run starts at.
        last: step it ends at.
        stream: where to show it.
        show: False shows nothing.
    """

    def __init__(
        self,
        log: str | os.PathLike[str] | None,
        first: int,
        last: int,
        stream: TextIO | None = None,
        show: bool = True,
    ):
        self._console = Console(
            file=stream or sys.stdout, highlight=False, markup=False, soft_wrap=True, quiet=not show
        )
        self._log = None if log is None else Lines(log)
        self._first, self._last = first, last
        self._started: float | None = None
        self._bar = None
        if show and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("compiling", total=last, completed=first, status="")
            self._bar.start()

    def say(self, text: str) -> None:
        """Shows a line and logs it."""
        self._console.print(text)
        self.log(text)

    def log(self, text: str) -> None:
        """Logs a line without showing it."""
        if self._log is not None:
            self._log.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def step(self, step: int, epoch: str, status: str) -> None:
        """Moves the bar.

        Args:
            step: steps taken.
            epoch: such as "epoch 2/5".
            status: loss, accuracy and speed, in words.
        """
        if self._started is None:
            # The first step compiles; counting it would spoil the estimate.
            self._started, self._first = time.monotonic(), step
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=epoch, status=f"{status}  {self.left(step)}")

    def report(self, step: int, epoch: str, status: str) -> None:
        """A periodic line, which is shown only where there is no bar."""
        line = f"step {step}/{self._last}  {epoch}  {status}  {self.left(step)}"
        if self._bar is None:
            self._console.print(line)
        self.log(line)

    def left(self, step: int) -> str:
        """The time left, in words; empty until it can be estimated."""
        done = step - self._first
        if self._started is None or done <= 0:
            return ""
        seconds = round((time.monotonic() - self._started) / done * (self._last - step))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return (f"{hours}:{minutes:02}" if hours else f"{minutes}") + f":{seconds:02} left"

    def close(self) -> None:
        """Takes the bar down."""
        if self._bar is not None:
            self._bar.stop()
