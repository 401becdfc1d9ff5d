"""benchmarks.run_log: what it reads off planted logs and off those of the shipped networks."""

import json

import pytest

from benchmarks import run_log


def train(epoch, speed, share, loss=2.0):
    speeds = {"images_per_second": speed, "data_wait_share": share, "data_wait_seconds": share and share / 10}
    return {"step": int(10 * epoch), "epoch": epoch, "split": "train", "loss": loss, "accuracy": 0.5} | speeds


def evaluated(epoch, accuracy):
    return {"step": int(10 * epoch), "epoch": epoch, "split": "eval", "loss": 1.0, "accuracy": accuracy}


LINES = """2026-01-01 10:00:00 starting: 5 parameters
2026-01-01 10:10:00 step 5/20  epoch 1/2
a line without a time
2026-01-01 10:12:00 interrupted: the same command continues
2026-01-01 18:00:00 resuming at step 6: 5 parameters
2026-01-01 18:30:00 finished at step 20 of 20
""".splitlines()
RECORDS = [
    train(0.5, 100, 0.0, 3.0),
    train(1.0, 300, 0.02, 2.0),
    evaluated(1.0, 0.75),
    train(1.5, 200, 0.04, 1.5),
    evaluated(2.0, 0.7),
]


def test_pauses_do_not_count():
    assert run_log.minutes(LINES) == 42
    assert run_log.minutes([]) == 0


def test_a_row():
    epochs, best, where, median, _, wait, most, minutes = run_log.summary(RECORDS, LINES)
    assert (epochs, best, where, median, wait, most, minutes) == ("2", "75.00", "1", "200", "2.00", "4.0", "42")


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (tmp_path / "log.txt").write_text("\n".join(LINES))
    monkeypatch.setattr("sys.argv", ["run_log", str(tmp_path)])
    assert run_log.main() == 0
    printed = capsys.readouterr().out
    assert "| 75.00 | 1 | 200 |" in printed and "1: 2.50, 2: 1.50" in printed


@pytest.mark.parametrize("records", [[], RECORDS[:2], RECORDS[2:3]])
def test_too_little_is_refused(tmp_path, monkeypatch, capsys, records):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "log.txt").write_text("")
    monkeypatch.setattr("sys.argv", ["run_log", str(tmp_path)])
    assert run_log.main() == 2
    assert "no evaluation, or fewer than two lines" in capsys.readouterr().err


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run_log", str(tmp_path)])
    assert run_log.main() == 2
    assert str(tmp_path) in capsys.readouterr().err
