"""Ctrl-C that lets the step it falls into end."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any


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
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _notice(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.since = True, time.monotonic()
