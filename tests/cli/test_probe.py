"""The command `spiking-mlp probe activity`, on a small run's folder."""

import json
import os

import numpy as np
import pytest

from spiking_mlp_jax.analysis import plots
from spiking_mlp_jax.analysis.activity import measure as activity
from spiking_mlp_jax.analysis.activity import plots as activity_plots
from spiking_mlp_jax.analysis.activity.rates import rates as activity_rates
from spiking_mlp_jax.analysis.samples import drawn
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from tests.cli.test_main import no_cache, run
from tests.support.random_model import CLASSES, make_workdir, random_model

FIGURES = ["rates_by_step", "token_maps", "channel_rates", "spike_trains", "membrane", "accuracy_per_step"]
__all__ = ["no_cache"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A small training run's folder with 12 test images; its data are in workdir/data."""
    return make_workdir(tmp_path_factory.mktemp("run"), random_model(depths=(1,)))


def test_files_and_table(capsys, workdir, tmp_path):
    out_folder = tmp_path / "new" / "activity"
    status, out, err = run(capsys, "probe", "activity", workdir, "-o", out_folder, "--batch-size", "5")
    assert (status, err) == (0, "")
    files = [f"{name}.png" for name in [*FIGURES, "similarity", "raster"]] + ["activity.json"]
    assert sorted(os.listdir(out_folder)) == sorted(files)
    assert out.splitlines()[-len(files) :] == [str(out_folder / file) for file in files]
    document = json.loads((out_folder / "activity.json").read_text())
    model, _ = weights.load(workdir / "weights")
    pixels = [np.asarray(plots.open_source("folder", "test", workdir / "data")[i]["image"]) for i in range(12)]
    images = (np.stack(pixels).astype(np.float32) / 255 - 0.25) / 0.5
    rates = activity_rates(model, images).layer
    assert {name: layer["rate"] for name, layer in document["layers"].items()} == pytest.approx(rates, abs=1e-6)
    assert document["network"] == str(workdir)
    assert document["images"] == 12
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("stage0")}
    assert list(lines) == [name.removesuffix(".spikes") for name in rates]
    for name, rate in rates.items():
        row = lines[name.removesuffix(".spikes")]
        assert float(row[1]) == pytest.approx(100 * rate, abs=0.006)
        assert float(row[3]) == pytest.approx(100 * document["layers"][name]["dead_neurons"], abs=0.06)
        assert float(row[5]) == pytest.approx(100 * document["layers"][name]["saturated_neurons"], abs=0.06)
    status, evaluated, _ = run(capsys, "evaluate", workdir, "--json")
    last = next(line.split() for line in out.splitlines() if line.startswith("    2 "))
    assert float(last[1]) == pytest.approx(100 * json.loads(evaluated)["accuracy"], abs=0.006)


def test_images_are_drawn_at_random_and_each_once():
    class Numbers:
        class_names = CLASSES

        def __len__(self):
            return 100

        def __getitem__(self, index):
            return index

    draws = [drawn(Numbers(), 30, seed) for seed in (0, 0, 1)]
    found = [[chosen[i] for i in range(len(chosen))] for chosen in draws]
    assert len(set(found[0])) == 30
    assert found[0] == found[1] != found[2]
    assert max(found[0]) > 50 and found[0] != sorted(found[0])
    assert len(drawn(Numbers(), 1000, 0)) == 100


def test_what_is_stopped_leaves_nothing(capsys, workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(activity, "measure", interrupted)
    assert run(capsys, "probe", "activity", workdir) == (130, "", "stopped\n")
    assert os.listdir(tmp_path) == []


def test_json_comes_last(tmp_path, monkeypatch):
    def full(figure, path):
        raise InputError("No space left on device")

    monkeypatch.setattr(activity_plots, "write", full)
    with pytest.raises(InputError, match="No space left"):
        activity_plots.save(tmp_path, {"a": plots.Figure()}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{run}", "--images", "0"], "whole number of at least 1"),
        (["{run}", "--seed", "-1"], 'must be a whole number of at least 0, got "-1"'),
        (["{run}", "--dead", "2"], "number from 0 to 1, got"),
        (["{run}", "--dead", "0.5", "--saturated", "0.5"], "must be below --saturated"),
        (["{run}", "--features", "pixels"], "invalid choice"),
        (["{run}", "-o", "{tmp}/file"], "is not a folder"),
        (["{run}", "--data-dir", "{tmp}/nowhere"], "nowhere"),
        (["{run}", "--dataset", "fashion_mnist"], "has 3 classes, but fashion_mnist has 10"),
        (["{tmp}/bare"], 'no "data"'),
        (["nowhere"], "nowhere"),
        ([], "required: NETWORK"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, workdir, tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    weights.save(tmp_path / "bare", weights.load(workdir / "weights")[0], {})
    arguments = [argument.format(run=workdir, tmp=tmp_path) for argument in arguments]
    status, out, err = run(capsys, "probe", "activity", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(capsys, "probe")
    assert status == 0
    assert "activity" in out
    status, out, _ = run(capsys, "probe", "activity", "--help")
    assert status == 0
    assert "examples:\n  spiking-mlp probe activity fashion_mnist" in out
    assert max(map(len, out.splitlines())) <= 80
