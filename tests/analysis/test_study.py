import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from spiking_mlp_jax.analysis.fields import study as field_study
from spiking_mlp_jax.analysis.fields.gabor import Gabor
from spiking_mlp_jax.analysis.fields.plots import figures
from spiking_mlp_jax.analysis.fields.responses import Units, choose_units, natural_images
from spiking_mlp_jax.analysis.fields.study import CONTROLS, FIT_COLUMNS, KINDS, NETWORKS, Settings, Unfinished
from spiking_mlp_jax.analysis.fields.summary import fit_summary, gabors, higher, summarize, table
from spiking_mlp_jax.cli.main import main
from spiking_mlp_jax.models import weights
from tests.support.random_model import make_workdir, random_model

LAYER = "stage0.block0.channel.spikes"
FIGURES = [
    "covariance",
    "effective_fields",
    "fields_gradient",
    "fields_images",
    "fields_noise",
    "gabor_quality",
    "gabor_shapes",
    "mixing_profiles",
    "separable_fields",
]
SMALL = ("--images", 12, "--noise", 64, "--gradients", 4, "--units", 2, "--covariances", 1, "--least", 2)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("run"), random_model(seed=1, depths=(1,)))


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setattr("spiking_mlp_jax.utils.compilation_cache.use_compilation_cache", lambda where: None)


def run(capsys, *arguments):
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.slow
def test_the_command_from_weights_to_figures_and_again(workdir, tmp_path, capsys, monkeypatch):
    command = ("probe", "receptive-fields", workdir, "-o", tmp_path, *SMALL)
    status, out, err = run(capsys, *command)
    assert status == 0, err
    assert "Share of fields that a Gabor explains" in out
    assert "No Gabors are fitted to the stem's kernels: 4 x 4 pixels" in out
    assert sorted(p.stem for p in tmp_path.glob("*.png")) == FIGURES
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as picture:
            assert np.asarray(picture.convert("L")).std() > 0
    assert not list(tmp_path.rglob("*.tmp"))

    document = json.loads((tmp_path / "receptive_fields.json").read_text())
    assert document["settings"]["layers"] == [LAYER]
    assert list(document["mixing"]) == ["stage0.block0"]
    for name in NETWORKS:
        assert np.shape(document["mixing"]["stage0.block0"][name]["height"]["weights"]) == (4, 4)
        for kind in KINDS:
            entry = document["gabors"][name][LAYER][kind]
            expected = CONTROLS if kind != "gradient" else CONTROLS[:2]
            assert set(entry) & set(CONTROLS) == set(expected if name == "trained" else CONTROLS[:1])
            assert entry["field"]["units"] == len(entry["fits"]["field"]) == 2
    spikes = document["spikes"]["trained"][LAYER]["noise"]
    assert spikes["tested"] == sum(count >= 2 for count in spikes["by_unit"]["spikes"])

    # Done parts are read, a damaged one and those of other settings are measured anew.
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*.npz")}
    assert len(before) == 2 + 6 + 6
    (tmp_path / "parts" / "untrained.noise.gabors.npz").write_bytes(b"PK\x03\x04 cut")
    for name in ("_noise", "_images", "_gradients", "_mixing"):
        monkeypatch.setattr(field_study, name, None)
    status, again, err = run(capsys, *command)
    assert (status, again) == (0, out), err
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*.npz")}
    assert [name for name in before if before[name] != after[name]] == ["untrained.noise.gabors.npz"]
    with pytest.raises(TypeError):  # what is missing would be measured, and cannot be here
        main([str(argument) for argument in (*command, "--seed", 1)])


def test_interrupted_nothing_half_written_stays(workdir, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(field_study, "_estimate", lambda *_: 75.0)
    monkeypatch.setattr(field_study, "_gradients", lambda *_: {f"field {LAYER}": np.eye(4)})
    monkeypatch.setattr(field_study, "_noise", stop)
    status, _, err = run(capsys, "probe", "receptive-fields", workdir, "-o", tmp_path, *SMALL)
    assert (status, err) == (130, "estimated: 1:15 left; rerun the same command to resume\nstopped\n")
    assert os.listdir(tmp_path / "parts") == ["trained.gradient.npz"]


@pytest.mark.parametrize("part", ["gradients", "noise", "images", "images in their span", "Gabors"])
def test_an_interrupted_part_resumes_where_it_was(part, tmp_path, monkeypatch):
    monkeypatch.setattr(field_study, "SAVE_SECONDS", 0)
    spanned = part.endswith("span")
    model, count = random_model(seed=1, depths=(1,)), 200 if spanned else 300  # pixels: 256
    settings = Settings(channels=2, noise=400, images=count, gradients=300, covariances=1, least=2, batch_size=100)
    source = Planted(np.random.default_rng(0).integers(0, 256, (count, 16, 16, 1), np.uint8))
    data = {"mean": [0.25], "std": [0.5], "resize_mode": "resize", "eval_resize": 0}
    groups = [choose_units(model.config, LAYER, channels=2)]

    def images(count, batch_size=40 if spanned else 100):
        return natural_images(source, model.config, data, count, seed=0, batch_size=batch_size)

    def measure(kept, progress):
        if part == "gradients":
            return field_study._gradients(model, groups, images, settings, kept, part, progress)
        if part == "noise":
            return field_study._noise(model, groups, settings, kept, part, progress)
        if part == "Gabors":
            fields = [field for batch in images(4) for field in batch.normalised[..., 0]]
            jobs = {"noise": fields, "small": [np.zeros((4, 4))]}
            return field_study._fits(jobs, kept, part, progress)
        return field_study._images(model, groups, images, data, settings, kept, part, progress)

    shown = []

    def stop(what, done, total):
        shown.append(done)
        if len(shown) == 3:
            raise KeyboardInterrupt

    whole = measure(Unfinished(), lambda *_: None)
    file = tmp_path / "part.npz"
    with pytest.raises(KeyboardInterrupt):
        measure(Unfinished(file, "key"), stop)
    assert Unfinished(file, "another key").done == 0
    kept, shown = Unfinished(file, "key"), []
    assert kept.done > 0
    again = measure(kept, lambda what, done, total: shown.append(done) if what == part else None)
    assert min(shown) >= kept.done
    assert list(again) == list(whole)
    for name, values in whole.items():
        np.testing.assert_array_equal(again[name], values)


@pytest.mark.slow
def test_the_command_in_colour_at_64_pixels_stops_and_resumes(tmp_path, capsys):
    model = random_model(seed=1, depths=(1,), image_size=64, patch_size=8, in_channels=3)
    command = ["probe", "receptive-fields", make_workdir(tmp_path / "run", model), "-o", tmp_path / "out"]
    command = [str(x) for x in (*command, "--images", 12, "--units", 1, "--gradients", 4, "--least", 2)]
    program = [sys.executable, "-m", "spiking_mlp_jax", *command]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        while not first.stderr.readline().startswith("estimated: "):
            assert first.poll() is None
        first.send_signal(signal.SIGINT)
        assert first.stderr.read().endswith("stopped\n")
    assert first.returncode == 130
    status, _, err = run(capsys, *command)
    assert status == 0, err
    document = json.loads((tmp_path / "out" / "receptive_fields.json").read_text())
    assert document["settings"]["noise"] == 120
    assert document["settings"]["batch_size"] == 64
    assert not list(tmp_path.rglob("*.unfinished.npz"))


@pytest.mark.parametrize(
    "options, message",
    [
        (("--layer", "stage0.block0.chanel.spikes"), 'no layer "stage0.block0.chanel.spikes": did you mean'),
        (("--layer", "stage0.block0.channel.potential"), "is not a layer of spikes"),
        (("--images", 5), "at least 10 images, got 5"),
        (("--seed", -1), "--seed must be at least 0 and below 2**31, got -1"),
        (("--contrast", 0), "must be a positive number"),
        (("--units", 0), "whole number"),
        (("--data-dir", "/nowhere"), "/nowhere"),
    ],
)
def test_bad_input_is_one_sentence(workdir, tmp_path, capsys, options, message):
    status, out, err = run(capsys, "probe", "receptive-fields", workdir, "-o", tmp_path, *options)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_covariances_beside_strong_and_weak_averages():
    # The strong average of one unit is projected out, so that it has an eigenvalue less than the other.
    config = random_model(depths=(1,)).config
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3000, config.image_size, config.image_size, config.in_channels))
    group = Units(LAYER, (0, 0), (3, 5), grid=4, patch=4)
    windows = field_study._Windows([group], config, Settings(covariances=2))
    edge = images[:, :2, :8].mean((1, 2, 3))
    counts = np.stack([edge > edge.std(), rng.random(3000) < 0.2], 1).astype(np.int64)
    windows.add(images, [counts])
    found = windows.found(keep=1.0)
    values = found[f"eigenvalues {LAYER}"]
    assert np.isfinite(values).sum(1).tolist() == [values.shape[1] - 1, values.shape[1]]
    assert found[f"channel {LAYER}"].tolist() == [0, 1]


@pytest.mark.slow
def test_other_images_are_measured_anew(tmp_path):
    # As many images as before, and one too many for a batch: nothing of the first study is taken for the second's.
    model, found = random_model(seed=1, depths=(1,)), []
    settings = Settings(channels=1, noise=16, images=11, gradients=1, covariances=1, shifts=1, least=1, batch_size=10)
    for shade in (40, 90):
        rng = np.random.default_rng(shade)
        source = Planted(rng.integers(0, 2 * shade, (12, 16, 16, 1), np.uint8))
        data = {"mean": [0.25], "std": [0.5], "resize_mode": "resize", "eval_resize": 0}
        found.append(field_study.study(model, data, source, settings, tmp_path / "kept"))
    field = f"field {LAYER}"
    assert not np.array_equal(found[0]["trained/gradient"][field], found[1]["trained/gradient"][field])


class Planted:
    """Images as a source of data."""

    class_names = ("a",)

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": 0}


@pytest.mark.slow
def test_a_layer_that_no_pixel_moves(tmp_path, capsys):
    # So steep a surrogate has no slope at nearly any potential; spikes are there all the same.
    model = random_model(depths=(1, 1), surrogate="rectangle", surrogate_alpha=1e5)
    status, out, err = run(
        capsys, "probe", "receptive-fields", make_workdir(tmp_path / "run", model), "-o", tmp_path / "fields", *SMALL
    )
    assert status == 0, err
    document = json.loads((tmp_path / "fields" / "receptive_fields.json").read_text())
    assert None in document["effective_fields"]["trained"].values()
    assert "| -   " in out
    assert len(list((tmp_path / "fields").glob("*.png"))) == len(FIGURES)


@pytest.mark.parametrize("command", ["receptive-fields", "activity"])
def test_weights_that_are_not_finite(workdir, tmp_path, capsys, command):
    model, meta = weights.load(workdir / "weights")
    model.stages[0].encode.conv.kernel[...] = np.nan
    weights.save(tmp_path / "broken", model, meta)
    status, out, err = run(capsys, "probe", command, tmp_path / "broken", "-o", tmp_path / "out")
    assert (status, out) == (2, "")
    assert "stages.0.encode.conv.kernel" in err and "NaN or inf" in err
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(workdir, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    status, _, err = run(capsys, "probe", "receptive-fields", workdir, "-o", file)
    assert (status, err.count("\n")) == (2, 1)
    assert "is not a folder" in err
    status, _, err = run(capsys, "probe", "receptive-fields", workdir, "-o", file / "below", *SMALL)
    assert (status, err) == (2, f"error: {file} is not a folder: name another with -o\n")
    assert run(capsys, "probe", "receptive-fields", "no_such_net", "-o", tmp_path)[0] == 2
    status, out, _ = run(capsys, "probe")
    assert status == 0
    assert "receptive-fields" in out


def row(gabor):
    return [getattr(gabor, name) for name in FIT_COLUMNS]


def test_summary_of_fits():
    good = Gabor(1, 2, 0.5, 0.2, 0.1, 3, 4.5, 1.0, explained=0.9)
    blob = Gabor(1, 2, 0.5, 0.01, 0.0, 3, 3, 1.0, explained=0.6)
    poor = Gabor(1, 2, 0.5, 0.2, 0.1, 3, 3, 1.0, explained=0.3)
    missing = [np.nan] * len(FIT_COLUMNS)
    fits = np.array([row(good), missing, row(blob), row(poor)])
    assert gabors(fits) == [good, None, blob, poor]
    found = fit_summary(fits)
    assert (found["units"], found["fitted"], found["median_r2"]) == (4, 3, 0.6)
    assert found["explained"] == pytest.approx(2 / 3)
    assert found["oriented"] == pytest.approx(1 / 3)
    assert (found["nx"], found["aspect"]) == pytest.approx((0.6, 1.5))
    assert fit_summary(np.array([missing]))["explained"] is None
    # Of 6 orders of two pairs one has both of the first above both of the second.
    worse = np.array([row(poor), row(dataclasses.replace(poor, explained=0.2))])
    assert higher(fits[[0, 2]], worse) == pytest.approx(1 / 6)
    assert higher(fits[[0, 1]], fits) is None


def test_tables_and_figures_where_no_unit_fired():
    """All that can be missing is missing: units without spikes, covariances, fits."""
    config = random_model(depths=(1,)).config
    nothing = np.full((2, 16, 16, 1), np.nan)
    part = {f"{name} {LAYER}": nothing for name in ("field", "control")}
    part |= {f"{name} {LAYER}": np.full(2, np.nan) for name in ("signal", "p")} | {f"spikes {LAYER}": np.zeros(2)}
    fits = {f"{c} {LAYER}": np.full((2, len(FIT_COLUMNS)), np.nan) for c in CONTROLS} | {f"colour {LAYER}": np.zeros(2)}
    parts = {"mixing": {f"{n} {axis} stage0.block0": np.eye(4) for n in NETWORKS for axis in ("height", "width")}}
    for name in NETWORKS:
        parts[f"{name}/gradient"] = {f"field {LAYER}": np.ones((2, 16, 16, 1)), f"map {LAYER}": np.ones((16, 16))}
        parts |= {f"{name}/{kind}": part for kind in KINDS[:2]} | {f"{name}/{kind}/gabors": fits for kind in KINDS}
    document = summarize(parts, config, Settings(), [LAYER])
    assert document["spikes"]["trained"][LAYER]["noise"]["tested"] == 0
    assert document["covariance"]["trained"][LAYER]["noise"] is None
    assert "0/0" in table(document)
    assert sorted(figures(parts, config, [LAYER])) == FIGURES
