"""How long the devices have nothing to do because the next batch is not there."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax


class DataWait:
    """Measures the waiting for batches that holds up training.

    A step is dispatched and runs on its own: while the devices work, blocking on the iterator costs nothing. What
    costs is the part of it after the previous step has ended, so a thread notes when that was. With synchronous
    dispatch this is all of the blocking. The first step is left out, for which everything has to start up.
    """

    def __init__(self):
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
        # While the previous step is not over nobody has waited.
        if self._ended.done():
            self._waited += max(0.0, time.monotonic() - max(called, self._ended.result()))
        self._steps += 1
        return batch

    def dispatched(self, outputs: Any) -> None:
        """To be called with small outputs of a step as soon as it has been dispatched."""
        self._ended = concurrent.futures.Future()
        # No daemon: Python would end it inside the runtime when the process exits, which aborts.
        threading.Thread(target=_note_end, args=(outputs, self._ended)).start()

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
        """Begins anew, after a line of metrics."""
        if self._running_since is not None:
            self._running_since = time.monotonic()
        self._waited = self._total = 0.0
        self._steps = 0


def _note_end(outputs, ended):
    # A step that failed has ended too; whoever fetches its outputs hears why.
    with contextlib.suppress(Exception):
        jax.block_until_ready(outputs)
    ended.set_result(time.monotonic())
