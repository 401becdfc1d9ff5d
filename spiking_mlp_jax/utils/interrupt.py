"""Ctrl-C that lets the step it falls into end."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from typing import Any, TypeVar

Item = TypeVar("Item")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def out_of_reach(items: Iterable[Item], workers: int) -> Iterator[Item]:
    """The same items, from worker processes that no SIGINT or SIGTERM reaches.

    Ctrl-C and schedulers signal a whole group of processes. The trainer then takes a last step, or ends its evaluation,
    and needs the workers that read images for that.

    Args:
        items: what starts its workers when the first item is asked for.
        workers: how many; 0: none, and nothing is done.
    """
    if not workers:
        yield from items
        return
    # When it starts, this process of Python's own lets the signals through again.
    resource_tracker.ensure_running()
    # A new process inherits what its parent's thread holds back. The parent gets it afterwards.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        iterator = iter(items)
        first = list(itertools.islice(iterator, 1))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield from first
    yield from iterator


class StopRequest:
    """Notices SIGINT and SIGTERM instead of dying of them; the second one raises KeyboardInterrupt.

    Attributes:
        requested: whether one has come.
        since: when, by time.monotonic.
    """

    def __init__(self):
        self.requested = False
        self.since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread and lets only that thread handle them.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _notice(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.since = True, time.monotonic()
