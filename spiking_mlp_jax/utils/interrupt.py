"""Ctrl-C that lets a training step end, and that does not wait for a library's long computation."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sys
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


@contextlib.contextmanager
def prompt_interrupt(seconds: float = 1.5) -> Iterator[None]:
    """Ends the process with status 130 where Ctrl-C has not ended the block after some seconds.

    Python raises KeyboardInterrupt when the code it runs returns to it, which a compilation or a matrix decomposition
    may do minutes later. Does nothing outside the main thread, and while something else handles SIGINT, as training
    does.

    Args:
        seconds: for an end in the ordinary way.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    ended = threading.Event()

    def watch() -> None:
        # The numbers of the signals, written by Python's handler at once; nothing when the block has ended.
        while number := woken.recv(1):
            if number[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                if ended.wait(seconds):
                    return
                print("stopped", file=sys.stderr, flush=True)
                os._exit(130)

    watcher = threading.Thread(target=watch, daemon=True, name="prompt interrupt")
    before = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        waker.close()
        watcher.join()
        woken.close()


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
