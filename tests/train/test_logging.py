"""Metrics for programs and progress for people."""

import errno
import io
import json
import time

import pytest

from spiking_mlp_jax.train import logging
from spiking_mlp_jax.train.logging import Display, Metrics, Speedometer, read_metrics, to_json
from spiking_mlp_jax.utils import progress


def test_lines_past_the_step_are_dropped(tmp_path):
    first = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, step / 3, "train", {"loss": 1 / step, "rates": {"a": 0.5}})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    second = Metrics(tmp_path, 2)
    second.write(3, 1.0, "eval", {"loss": 0.25})
    second.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, 3]
    assert read_metrics(tmp_path)[2] == {"step": 3, "epoch": 1.0, "split": "eval", "loss": 0.25}


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_where_there_is_no_terminal(tmp_path):
    stream = io.StringIO()
    display = Display(stream)
    display.start(0, 100, tmp_path / "log.txt")
    display.say("hello [bold] 12")
    display.step(1, "epoch 1/2", "loss 2")
    display.step(2, "epoch 1/2", "loss 1")
    display.report(2, "epoch 1/2", "loss 1")
    display.close()
    first, second = stream.getvalue().splitlines()
    assert first == "hello [bold] 12"
    assert second.startswith("step 2/100  epoch 1/2  loss 1  ") and second.endswith(" left")
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in log] == [first, second]


def test_a_line_every_few_seconds_whatever_happens(monkeypatch):
    for module in (logging, progress):
        monkeypatch.setattr(module, "REPORT_SECONDS", 0.02)
    stream, doing = io.StringIO(), ["compiling at step 1"]
    display = Display(stream, doing=lambda: doing[0])
    wait_for(lambda: stream.getvalue().count("compiling at step 1, for 0 s since the last line\n") >= 2)
    display.start(0, 100, None)
    display.step(1, "epoch 1/2", "loss 2")
    wait_for(lambda: "step 1/100  epoch 1/2  loss 2" in stream.getvalue())
    display.close()
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    with progress.shown_progress(report_seconds=0.02) as show:
        wait_for(lambda: said.getvalue().startswith("starting\n"))
        show("images", 3, 9)
        wait_for(lambda: said.getvalue().count("images: 3 of 9\n") == 2)
    assert list(progress.tracked("ab", 2)) == ["a", "b"]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    display = Display(stream)
    display.start(0, 100, tmp_path / "log.txt")
    display.step(1, "epoch 1/2", "loss 2")
    display.step(50, "epoch 1/2", "loss 1.25")
    display.report(50, "epoch 1/2", "loss 1.25")
    display.say("evaluated")
    display.close()
    text = stream.getvalue()
    assert "loss 1.25" in text and "left" in text and "evaluated" in text and "step 50/100" not in text
    assert "step 50/100" in (tmp_path / "log.txt").read_text()
    hidden = Display(Terminal(), show=False)
    hidden.start(0, 100, None)
    hidden.step(50, "epoch 1/2", "loss 1.25")
    hidden.report(50, "epoch 1/2", "loss 1.25")
    hidden.say("evaluated")
    hidden.close()
    assert hidden._console.file.getvalue() == ""


def test_the_first_step_is_not_timed(monkeypatch):
    times = iter([100.0, 101.0, 103.0, 200.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    speed = Speedometer(10)
    assert speed.step() is None
    assert speed.step() == 10.0
    assert speed.step() == 6.7
    speed.restart()
    assert speed.step() is None


def test_numbers_that_json_lacks_become_null():
    value = {"a": float("nan"), "b": [float("-inf"), 1.5, None, True], "c": {"d": float("inf")}}
    assert json.loads(to_json(value)) == {"a": None, "b": [None, 1.5, None, True], "c": {"d": None}}


class Full(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stream", ["full", "closed"])
def test_a_display_survives_a_stdout_that_is_full_or_closed(tmp_path, stream):
    file = Full() if stream == "full" else io.StringIO()
    if stream == "closed":
        file.close()
    display = Display(file)
    display.start(0, 10, tmp_path / "log.txt")
    display.say("hello")
    display.report(1, "epoch 1/1", "loss 1")
    display.close()
    assert "hello" in (tmp_path / "log.txt").read_text()
