"""Progress of long work on stderr: bars with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


def tracked(items: Iterable[Item], count: int, what: str = "evaluating") -> Iterator[Item]:
    """The items as they come, with a bar that disappears at the end; nothing is shown without a terminal.

    Args:
        items: anything to iterate over.
        count: the number of items.
        what: the bar's description.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, what, total=count, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def shown_progress(unit: str = "", report_seconds: float = 30.0) -> Iterator[Callable[[str, float, float], None]]:
    """A function that shows the progress of any number of tasks.

    Args:
        unit: what is counted, e.g. "images"; "GB" is shown with a decimal. With one, finished tasks get a line, too.
        report_seconds: between lines without a terminal.

    Yields:
        function of a task's name, the amount done, and the total; threads may call it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}")
    interval = 0.1 if console.is_terminal else report_seconds
    digits = 1 if unit.startswith("GB") else 0
    lock, last = threading.Lock(), time.monotonic()
    tasks, started = {}, {}
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:

        def show(what: str, done: float, of: float) -> None:
            nonlocal last
            now = time.monotonic()
            with lock:
                if what not in tasks:
                    tasks[what], started[what] = bars.add_task(what, total=of, status=""), (now, done)
                elif now - last < interval and done < of:
                    return
                due = now - last >= interval
                last = now if due else last
                start, before = started[what]
                rate = (done - before) / (now - start) if now > start else 0.0
                status = f"{done:,.{digits}f} of {of:,.{digits}f} {unit}".rstrip()
                status += f", {rate:,.{max(digits, int(rate < 10))}f}/s" if rate else ""
                bars.update(tasks[what], completed=done, status=status)
                if not console.is_terminal and (due or (unit and done >= of)):
                    left = f", {time_left((of - done) / rate)}" if rate and done < of else ""
                    console.print(f"{what}: {status}{left}")

        yield show


def time_left(seconds: float) -> str:
    """A duration for a status line.

    Examples:
        >>> time_left(75), time_left(3605)
        ('1:15 left', '1:00:05 left')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}:{minutes:02}" if hours else f"{minutes}") + f":{seconds:02} left"
