"""The curve of accuracy against activity, from runs that are made up here."""

import json
import os
import sys

import pytest

from benchmarks import activity, precision
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.topology import dense_operations, neuron_counts
from spiking_mlp_jax.train.config import load_config, model_config
from spiking_mlp_jax.train.loop import Result
from tests.support.random_model import make_data, make_workdir, random_model

DEMO = "configs/fashion_mnist.py:demo"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["activity", *map(str, arguments)])
    return activity.main()


@pytest.fixture
def trained(monkeypatch):
    """Runs that fire less the heavier their penalty is, by the folders they are asked for in."""
    asked = []

    def train(config, workdir):
        print("progress")
        asked.append(workdir.name)
        rate = 0.1 / (1 + config.activity_weight)
        rates = dict.fromkeys(sorted(neuron_counts(model_config(config))), rate)
        workdir.mkdir(parents=True, exist_ok=True)
        document = {"step": 936, "accuracy": 0.8 + rate, "firing_rates": rates}
        (workdir / "evaluation.json").write_text(json.dumps(document))
        return Result(936, True, 0.9)

    monkeypatch.setattr(precision, "fit", train)
    monkeypatch.setattr(activity, "engine_speeds", lambda workdirs, data_dir: [1000.0 * len(w.name) for w in workdirs])
    return asked


def test_the_curve_of_a_few_runs(trained, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = [tmp_path / "runs", "--rates", 1, "--synops", 3, "--json", out, "--plot", tmp_path / "out.png"]
    assert run(monkeypatch, *arguments) == 0
    assert trained == ["dense_0", "rates_1_0", "synops_3_0"]
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 6 and "progress" in printed.err
    assert lines[5].startswith("time of an image: ")
    assert lines[2].startswith("| none | 0 | 0 | 90.00 | 10.00 |") and lines[2].endswith("| 10.00 | 7,000 |")
    assert lines[3].startswith("| rates | 1 | 0 | 85.00 | 5.00 |")
    document = json.loads(out.read_text())
    assert out.read_text() == (tmp_path / "runs" / "activity.json").read_text()
    dense = dense_operations(model_config(load_config(DEMO)))
    assert document["dense_synaptic_operations"] == dense
    rows = document["rows"]
    assert rows[2]["synaptic_operations"] == pytest.approx(dense * 0.025) and rows[2]["engine_images_per_s"] == 10_000
    assert (
        list(rows[0]["firing_rates"])
        == list(document["fan_out"])
        == list(neuron_counts(model_config(load_config(DEMO))))
    )
    for file in (tmp_path / "out.png", tmp_path / "runs" / "activity.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    # Over files of its own it writes again.
    assert run(monkeypatch, *arguments) == 0 and json.loads(out.read_text()) == document


def test_a_straight_line_is_found():
    rows = [{"synaptic_operations": n, activity.ENGINE: 1 / (2e-5 + 3e-11 * n)} for n in (1e5, 4e5, 9e5)]
    assert activity.linear_fit(rows) == ["time of an image: 20.0 us and 30.0 ns for a thousand synaptic operations"]
    assert activity.linear_fit(rows[:2]) == []


@pytest.mark.slow
def test_speeds_are_of_each_runs_compiled_network(tmp_path):
    workdir = make_workdir(tmp_path, random_model())
    make_data(workdir / "data", split="train")
    speeds = activity.engine_speeds([workdir, workdir], str(workdir / "data"))
    assert len(speeds) == 2 and min(speeds) > 0


def test_an_interrupted_curve_and_a_mistake_say_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(precision, "fit", lambda config, workdir: Result(5, False, None))
    assert run(monkeypatch, tmp_path) == 130
    assert "stopped: rerun the same command to resume" in capsys.readouterr().err

    def refuse(config, workdir):
        raise InputError("no such data")

    monkeypatch.setattr(precision, "fit", refuse)
    assert run(monkeypatch, tmp_path) == 2
    assert "error: no such data" in capsys.readouterr().err
    for wrong in (["--seeds", 0], ["--rates", 0]):
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, tmp_path, *wrong)


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_outputs_that_cannot_be_written_are_refused_before_anything_is_trained(
    option, trained, monkeypatch, tmp_path, capsys
):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("pipe", "is not a regular file"),
        (".", "is a folder"),
        ("nowhere/out", "there is no folder"),
    ):
        assert run(monkeypatch, tmp_path / "runs", option, tmp_path / name) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "runs" / "activity.png").mkdir(parents=True)
    assert run(monkeypatch, tmp_path / "runs") == 2
    assert "activity.png" in capsys.readouterr().err
    assert not trained


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"rows": 3}'])
def test_a_file_of_something_else_is_left_alone(text, trained, monkeypatch, tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text(text)
    assert run(monkeypatch, tmp_path / "runs", "--json", file) == 2
    assert "is not a file that benchmarks.activity wrote" in capsys.readouterr().err
    assert file.read_text() == text and not trained
