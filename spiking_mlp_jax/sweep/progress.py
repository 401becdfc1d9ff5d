"""How far a sweep is: a bar for all and one for each run on a terminal, a line a run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_SHOWN = 90  # characters of a run's last line


class SweepProgress:
    """Shows runs as they start, go on and end.

    Args:
        what: of the bar, such as "training".
        work: {key: how much each run takes, in any unit}; the time left is estimated from it.
        console: where to show it; None for the error stream.
    """

    def __init__(self, what: str, work: Mapping[str, float], console: Console | None = None):
        self._console = console or Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._work, self._total = dict(work), sum(work.values()) or 1.0
        self._shares: dict[str, float] = {}
        self._done = self._failed = 0
        self._started = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.fields[status]}"))
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._all = self._bar.add_task(what, total=1.0, status="")
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def started(self, key: str) -> None:
        """A run has started."""
        self._shares[key] = 0.0
        self._tasks[key] = self._bar.add_task(f"  {key}", total=1.0, status="starting")
        self._update()

    def at(self, key: str, share: float, line: str) -> None:
        """A run has got to a share of its way, 0 to 1, and last said a line."""
        self._shares[key] = share
        self._bar.update(self._tasks[key], completed=share, status=line[:_SHOWN])
        self._update()

    def ended(self, key: str, error: str | None) -> None:
        """A run has ended, well or with an error."""
        self._shares[key] = 1.0
        self._done += 1
        self._failed += error is not None
        self._bar.remove_task(self._tasks.pop(key))
        self._update()
        self._console.print(f"{key}: " + ("done" if error is None else f"FAILED: {error}") + f"  ({self._status()})")

    def _update(self) -> None:
        work = sum(self._work[key] * share for key, share in self._shares.items())
        self._bar.update(self._all, completed=work / self._total, status=self._status())

    def _status(self) -> str:
        status = f"{self._done} of {len(self._work)} runs"
        status += f", {self._failed} failed" if self._failed else ""
        hours = (time.monotonic() - self._started) / 3600
        share = sum(self._work[key] * share for key, share in self._shares.items()) / self._total
        if self._done and hours > 0:
            status += f", {self._done / hours:.1f} runs/h"
        if 0 < share < 1 and hours > 0:
            minutes, seconds = divmod(round(3600 * hours * (1 - share) / share), 60)
            status += f", {minutes // 60}:{minutes % 60:02}:{seconds:02} left"
        return status
