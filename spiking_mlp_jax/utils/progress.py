"""Progress of long work on stderr: bars with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Item = TypeVar("Item")


REPORT_SECONDS = 10.0  # between two lines without a terminal


def tracked(items: Iterable[Item], count: int, what: str = "evaluating") -> Iterator[Item]:
    """The items as they come, with their progress on stderr, see `shown_progress`.

    Args:
        items: anything to iterate over.
        count: the number of items.
        what: the bar's description.
    """
    with shown_progress() as show:
        show(what, 0, count)
        for done, item in enumerate(items):
            yield item
            show(what, done + 1, count)


@contextmanager
def shown_progress(unit: str = "", report_seconds: float = REPORT_SECONDS) -> Iterator[Callable[..., None]]:
    """A function that shows the progress of any number of tasks.

    On a terminal there are bars; elsewhere a line every few seconds, whether there is progress or not.

    Args:
        unit: what is counted, e.g. "images"; "GB" is shown with a decimal. With one, finished tasks get a line, too.
        report_seconds: between lines without a terminal.

    Yields:
        function of a task's name, the amount done, and the total; threads may call it.
    """
    from rich.progress import TimeRemainingColumn

    console = status_console(stderr=True)
    digits = 1 if unit.startswith("GB") else 0
    lock, last = threading.Lock(), 0.0
    tasks, started = {}, {}
    latest = "starting"

    def report() -> None:
        with lock:
            console.print(latest)

    with status_bars(console, TimeRemainingColumn()) as bars, every(report_seconds, report, console.is_terminal):

        def show(what: str, done: float, of: float) -> None:
            nonlocal last, latest
            now = time.monotonic()
            with lock:
                if what not in tasks:
                    tasks[what], started[what] = bars.add_task(what, total=of, status=""), (now, done)
                elif now - last < 0.1 and done < of:
                    return
                last = now
                start, before = started[what]
                rate = (done - before) / (now - start) if now > start else 0.0
                status = f"{done:,.{digits}f} of {of:,.{digits}f} {unit}".rstrip()
                status += f", {rate:,.{max(digits, int(rate < 10))}f}/s" if rate else ""
                bars.update(tasks[what], completed=done, status=status)
                left = f", {time_left(now - start, done - before, of - before)}" if rate and done < of else ""
                latest = f"{what}: {status}{left}"
                if not console.is_terminal and unit and done >= of:
                    console.print(latest)

        yield show


@contextmanager
def every(seconds: float, report: Callable[[], None], terminal: bool) -> Iterator[None]:
    """Calls a function every few seconds from a thread, until the block ends; does nothing with a terminal."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            report()

    if not terminal:
        threading.Thread(target=repeat, daemon=True, name="progress").start()
    try:
        yield
    finally:
        ended.set()


class Tolerant:
    """A stream that drops what cannot be written: a closed pipe or a full disk behind stdout must not end a run."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes, if it can."""
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None:
                encoding = self._stream.encoding or "utf-8"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flushes, if it can."""
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def status_console(**options: Any) -> Console:
    """A console that prints lines as they are: no colours, markup or line breaks; `options` are rich's."""
    from rich.console import Console

    return Console(highlight=False, markup=False, soft_wrap=True, **options)


def status_bars(console: Console, *columns: Any) -> Progress:
    """Bars between a description and a field `status`, then further columns; they show only on a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn

    first = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}")
    return Progress(*first, *columns, console=console, disable=not console.is_terminal)


def time_left(elapsed: float, done: float, total: float) -> str:
    """The time left at the pace so far, for a status line; "" before anything is done.

    Args:
        elapsed: seconds that the part done so far took.
        done: that part.
        total: all of the work, in the same unit.

    Examples:
        >>> time_left(25, 1, 4), time_left(3605, 50, 100)
        ('1:15 left', '1:00:05 left')
    """
    if done <= 0:
        return ""
    minutes, seconds = divmod(round(elapsed * (total - done) / done), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}:{minutes:02}" if hours else f"{minutes}") + f":{seconds:02} left"
