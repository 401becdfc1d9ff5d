"""Traces of some training steps, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax

from spiking_mlp_jax.errors import InputError


def parse_window(text: str) -> tuple[int, int] | None:
    """First and last of "A:B", as the steps taken when the trace starts and when it ends; None for "".

    Raises:
        InputError: it is neither.
    """
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise InputError(
            f'profile_steps must be "A:B" with A below B, such as "10:15" for the five steps after the tenth, '
            f"but it is {text!r}"
        )
    return int(first), int(last)


def check_window(text: str, last: int) -> None:
    """Refuses a window that a run never reaches.

    Args:
        text: as `parse_window` reads it.
        last: the run's last step.

    Raises:
        InputError: the window begins where the run has ended.
    """
    window = parse_window(text)
    if window is not None and window[0] >= last:
        raise InputError(f'profile_steps "{text}" begins after the run\'s last step, {last}: name earlier steps')


def annotate(step: int) -> jax.profiler.StepTraceAnnotation:
    """A context that marks a step in a trace; outside a trace it costs next to nothing."""
    return jax.profiler.StepTraceAnnotation("train", step_num=step)


class Profiler:
    """Traces the steps of one window, at most once.

    Args:
        window: as `parse_window` reads it.
        folder: where the trace goes.
        say: told where the trace lies.
    """

    def __init__(self, window: str, folder: str | os.PathLike[str], say: Callable[[str], None]):
        self._window = parse_window(window)
        self._folder, self._say = os.fspath(folder), say
        self._tracing = False

    def between_steps(self, step: int, state: Any) -> None:
        """Starts or ends the trace where it is time.

        Args:
            step: steps taken so far.
            state: arrays of the last step, awaited so that the trace holds whole steps.
        """
        if self._window is None:
            return
        first, last = self._window
        if step >= last:
            self.close(state)
        elif step >= first and not self._tracing:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def close(self, state: Any = None) -> None:
        """Ends a trace that is still going on."""
        if not self._tracing:
            return
        self._tracing, self._window = False, None
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        self._say(f"a trace of the steps is in {self._folder}")
