"""Who is stuck, and that the run ends."""

import os
import subprocess
import sys
import threading

import pytest

from spiking_mlp_jax.errors import EXIT_LOST, InputError
from spiking_mlp_jax.utils.watchdog import DEADLINES, Watchdog, parse_deadlines


class Board:
    """What processes share."""

    def __init__(self):
        self.texts = {}

    def post(self, name, text):
        self.texts[name] = text

    def read(self):
        return dict(self.texts)


def judge(*places):
    """What is said of processes, each at a phase, step and batch for some seconds."""
    watchdog = Watchdog({}, Board(), 0, len(places), lambda: None)
    watchdog._deadlines = DEADLINES
    return watchdog._judge({i: (*place, held, "f in g.py:1", 0, age) for i, (*place, held, age) in enumerate(places)})


def test_the_one_that_the_others_wait_for():
    assert judge(("stepping", 12, 0, 1790.0, 0.0), ("reading", 12, 0, 890.0, 0.0)) is None
    said = judge(("stepping", 12, 0, 2000.0, 0.0), ("reading", 12, 0, 890.0, 11.0), ("stepping", 13, 0, 2000.0, 0.0))
    assert said is not None and said.count("process") == 1
    assert said.startswith("process 1 of 3 has been reading at step 12 for 901 s (f in g.py:1): that is")
    # It is slow, but within its deadline: the others are not stuck.
    assert judge(("stepping", 12, 0, 5000.0, 0.0), ("compiling", 12, 0, 5000.0, 0.0)) is None
    said = judge(("evaluating", 8, 3, 2000.0, 0.0), ("evaluating", 8, 2, 2000.0, 0.0))
    assert said is not None and said.startswith("process 1 of 2 has been evaluating at step 8")
    said = judge(("restoring", 0, 0, 2000.0, 0.0), ("restoring", 0, 0, 2000.0, 0.0))
    assert said is not None and "process 0 of 2 has been restoring for" in said and "process 1 of 2 has" in said


def test_stuck(capsys):
    """The verdict of one is known to all, whoever is stuck; a phase that is entered again is progress."""
    board, ended = Board(), threading.Semaphore(0)
    deadlines = dict.fromkeys(DEADLINES, 0.2)
    moving = Watchdog(deadlines, board, 0, 2, ended.release)
    stuck = Watchdog(deadlines, board, 1, 2, ended.release)
    stuck.enter("reading", 7)
    done = False
    while not done:
        moving.enter("stepping", 7)
        done = ended.acquire(timeout=0.01)
    assert ended.acquire(timeout=60)
    said = capsys.readouterr().err
    assert said.count("error: process 1 of 2 has been reading at step 7 for 0 s") == 2 and "process 0" not in said


def test_closed_in_time():
    watchdog = Watchdog(dict.fromkeys(DEADLINES, 0.1), Board(), 0, 1, lambda: None)
    watchdog.close()
    assert all(thread.name != "watchdog" or thread.join(60) is None for thread in threading.enumerate())


def test_the_status_of_a_process_that_is_alone(tmp_path):
    code = """if True:
        import threading
        from spiking_mlp_jax.train.runtime import watchdog
        watch = watchdog(dict.fromkeys(("starting", "reading"), 0.3))
        watch.enter("reading", 3)
        threading.Event().wait()
    """
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert done.returncode == EXIT_LOST, done.stderr
    assert "error: process 0 of 1 has been reading at step 3" in done.stderr and "wait in " in done.stderr


@pytest.mark.parametrize(
    "text, message",
    [
        ("read=3", 'no phase "read": did you mean "reading"'),
        ("reading", 'positive seconds, e.g. "reading=60", got "reading"'),
        ("reading=0", "positive seconds"),
        ("reading=nan", "positive seconds"),
        ("reading=1,,stepping=x", 'got "stepping=x"'),
    ],
)
def test_impossible_deadlines(text, message):
    with pytest.raises(InputError, match=message):
        parse_deadlines(text)


def test_deadlines():
    assert parse_deadlines("") == DEADLINES and parse_deadlines("off") == {}
    assert parse_deadlines("reading=60,saving=1e3") == DEADLINES | {"reading": 60.0, "saving": 1000.0}
