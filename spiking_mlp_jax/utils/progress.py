"""How far long work is, shown on stderr: bars with rate and time left, or lines now and then without a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


def tracked(items: Iterable[Item], count: int, what: str = "evaluating") -> Iterator[Item]:
    """The items as they come, with a bar that goes away at the end; nothing is shown without a terminal.

    Args:
        items: anything to iterate over.
        count: how many there are.
        what: the bar's description.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, what, total=count, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def shown_progress(report_seconds: float = 30.0) -> Iterator[Callable[[str, float, float], None]]:
    """A function that shows how far things are: bars with rate and time left, or lines now and then without a terminal.

    Args:
        report_seconds: between lines where there is no terminal.

    Yields:
        function of what is going on, how much of it is done, and of how much.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    tasks, started = {}, {}
    last = time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:

        def show(what: str, done: float, of: float) -> None:
            nonlocal last
            now = time.monotonic()
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of, rate="")
                started[what] = now, done
            start, before = started[what]
            rate = (done - before) / (now - start) if now > start else 0.0
            text = f"{rate:,.1f}/s" if rate else ""
            bars.update(tasks[what], completed=done, rate=text)
            if not console.is_terminal and now - last >= report_seconds:
                last = now
                left = f", {(of - done) / rate:,.0f} s left" if rate else ""
                console.print(f"{what}: {done:,.0f} of {of:,.0f} {text}{left}".rstrip())

        yield show
