"""Waiting for data counts only where the devices have nothing else to do."""

import threading

import pytest

from spiking_mlp_jax.train import logging
from spiking_mlp_jax.train.logging import DataWait


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


class Outputs:
    """Outputs of a step that ends when told to."""

    def __init__(self):
        self.event = threading.Event()

    def block_until_ready(self):
        assert self.event.wait(60)
        return self

    def end(self, wait):
        self.event.set()
        wait._ended.result(60)  # the thread has read the clock


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(logging, "time", clock)
    return clock


def started(clock):
    """A clock that runs: the first batch, however long it took, is not counted."""
    wait, outputs = DataWait(), Outputs()

    def slow():
        clock.now += 50
        yield 0

    assert wait.next(slow()) == 0
    assert wait.so_far() == (None, None)
    wait.dispatched(outputs)
    return wait, outputs


def test_blocking_while_the_step_runs_costs_nothing(clock):
    wait, outputs = started(clock)

    def batches():
        clock.now += 3
        yield 1

    assert wait.next(batches()) == 1
    clock.now += 1
    assert wait.so_far() == (0.0, 0.0)
    outputs.end(wait)


def test_only_what_is_after_the_steps_end_counts(clock):
    wait, outputs = started(clock)

    def batches():
        clock.now += 3
        outputs.end(wait)
        clock.now += 1
        yield 1

    wait.next(batches())
    clock.now += 4
    assert wait.so_far() == (1 / 8, 1.0)


def test_all_blocking_counts_where_the_step_had_ended(clock):
    wait, outputs = started(clock)
    outputs.end(wait)
    clock.now += 2  # the host's own work

    def batches():
        clock.now += 3
        yield 1
        clock.now += 1
        yield 2

    iterator = batches()
    wait.next(iterator)
    clock.now += 1
    wait.pause()
    clock.now += 1000  # an evaluation
    wait.next(iterator)
    assert wait.so_far() == (4 / 5, 2.0)
    wait.clear()
    assert wait.so_far() == (None, None)
    clock.now += 10
    wait.next(iter([3]))
    assert wait.so_far() == (0.0, 0.0)


def test_a_failed_step_has_ended(clock):
    wait, outputs = started(clock)
    outputs.end(wait)

    class Failed:
        def block_until_ready(self):
            raise RuntimeError("the step's own error")

    wait.dispatched(Failed())
    assert wait._ended is not None and wait._ended.result(60) == clock.now
