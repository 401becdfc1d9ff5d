"""Ends a run that has stopped making progress, and names the process that is stuck, what it is doing, and where."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Protocol

from spiking_mlp_jax.errors import InputError, nearest

# Seconds that each phase may last without progress, in the order of a step: of processes at the same step, the one in
# the earliest phase is the one that the others wait for.
DEADLINES = {
    "starting": 1800.0,
    "restoring": 1800.0,
    "reading": 900.0,
    "compiling": 7200.0,
    "stepping": 1800.0,
    "evaluating": 1800.0,
    "saving": 1800.0,
}
MOST_SECONDS = 5.0  # between two looks

Place = tuple[str, int, int]  # phase, step, batch of an evaluation


class Board(Protocol):
    """Where the processes of a run leave short texts for each other."""

    def post(self, name: str, text: str) -> None:
        """Leaves a text, in place of an older one of the same name."""

    def read(self) -> dict[str, str]:
        """All texts by name."""
        ...


def parse_deadlines(text: str) -> dict[str, float]:
    """The seconds that each phase may last without progress.

    Args:
        text: "" for DEADLINES, "off" for none, or those that differ, e.g. "reading=60,restoring=300"; in seconds.

    Raises:
        InputError: it is none of these.
    """
    if text == "off":
        return {}
    found = dict(DEADLINES)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in DEADLINES:
            raise InputError(f'deadlines names no phase "{name}": {nearest(name, DEADLINES)}')
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1
        if not 0 < found[name] < 1e9:
            raise InputError(f'deadlines needs positive seconds, e.g. "{name}=60", got "{part}"')
    return found


class Watchdog:
    """Follows what every process of a run is doing; a thread looks a few times within the shortest deadline.

    Only the processes that are furthest behind can be stuck: all others wait for them.

    Args:
        deadlines: from `parse_deadlines`; empty watches nothing.
        board: shared by the processes.
        index: this process's.
        count: how many there are.
        end: ends this process at once; called from a thread.
    """

    def __init__(self, deadlines: dict[str, float], board: Board, index: int, count: int, end: Callable[[], None]):
        self._deadlines, self._board, self._index, self._count, self._end = deadlines, board, index, count, end
        self._place: Place = ("starting", 0, 0)
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._seconds = min([MOST_SECONDS, *(deadline / 4 for deadline in deadlines.values())])
        if deadlines:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def enter(self, phase: str, step: int, batch: int = 0) -> None:
        """Says what this process does from now on.

        Args:
            phase: of DEADLINES.
            step: steps begun.
            batch: batches done of an evaluation.
        """
        self._place = phase, step, batch

    @property
    def doing(self) -> str:
        """The present phase in words."""
        phase, step, batch = self._place
        return phase + (f" at step {step}" if step else "") + (f", batch {batch}" if batch else "")

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()

    def _watch(self) -> None:
        place, held, last = None, 0.0, time.monotonic()
        seen: dict[str, tuple[str, float]] = {}  # of each process what it posted last, and how long ago
        for count in itertools.count():
            if self._closed.wait(self._seconds):
                return
            # A process that was stopped (Ctrl-Z), and this thread with it, has not been stuck for all that time.
            now = time.monotonic()
            passed, last = min(now - last, 2 * self._seconds), now
            held = held + passed if place is self._place else 0.0
            place = self._place
            try:
                self._board.post(str(self._index), json.dumps([*place, held, self._frame(), count]))
                texts = self._board.read()
            except Exception:
                return
            verdict = texts.pop("verdict", None)
            for name, text in texts.items():
                old, age = seen.get(name, (None, 0.0))
                seen[name] = text, 0.0 if text != old else age + passed
            if verdict is None:
                verdict = self._judge({int(name): (*json.loads(text), age) for name, (text, age) in seen.items()})
                if verdict is not None:
                    self._board.post("verdict", verdict)
            if verdict is not None and not self._closed.is_set():
                # All must have read it when the first connection closes; process 0, which holds the board, goes last.
                threading.Timer((2 if self._index else 3) * self._seconds, self._end).start()
                print(f"error: {verdict}", file=sys.stderr, flush=True)
                return

    def _judge(self, states: dict[int, tuple]) -> str | None:
        """What is stuck, from place, seconds, frame, counter and age by process; None: nothing is."""
        order = list(DEADLINES)
        keys = {i: (step, order.index(phase), batch) for i, (phase, step, batch, *_) in states.items()}
        behind = [index for index in sorted(keys) if keys[index] == min(keys.values())]
        stuck, late = [], False
        for index in behind:
            phase, step, _, held, frame, _, age = states[index]
            late |= held + age > self._deadlines[phase]
            doing = f"{phase} at step {step}" if step else phase
            stuck.append(f"process {index} of {self._count} has been {doing} for {held + age:.0f} s ({frame})")
        if not late:
            return None
        return (
            f"{'; '.join(stuck)}: that is longer than its deadline, and the run ends; rerun the same command to resume "
            "from the last checkpoint, or set deadlines"
        )

    def _frame(self) -> str:
        """Where the main thread is: its innermost calls."""
        frames = itertools.islice(traceback.walk_stack(sys._current_frames().get(self._main)), 5)
        return " < ".join(
            f"{frame.f_code.co_name} in {os.path.basename(frame.f_code.co_filename)}:{line}" for frame, line in frames
        )
