import errno
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from spiking_mlp_jax import __version__
from spiking_mlp_jax.cli import train
from spiking_mlp_jax.cli.main import main
from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.models import folder as folder_files
from spiking_mlp_jax.models import weights
from tests.support.random_model import CLASSES, make_data, make_workdir, meta_for, random_model, set_value


@pytest.fixture(scope="module")
def model():
    """A network whose first layer is silent and whose last one always fires."""
    model = random_model(depths=(1,))
    set_value(model, "stages.0.encode.norm.bias", -100)
    set_value(model, "stages.0.blocks.channel.norm.bias", 1e4)
    return model


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A small training run's folder; its data are in workdir/data."""
    return make_workdir(tmp_path_factory.mktemp("run"), random_model(depths=(1,)))


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """Keeps compiled programs out of the user's cache."""
    monkeypatch.setattr("spiking_mlp_jax.utils.compilation_cache.use_compilation_cache", lambda where: None)


def run(capsys, *arguments):
    """(status, stdout, stderr) of a command line."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def expected_scores(model, images):
    """Softmax of the time-mean logits of uint8 images that already have the network's size."""
    inputs = (np.stack(images)[..., None].astype(np.float32) / 255 - 0.25) / 0.5
    logits = np.asarray(model(inputs), np.float64).mean(0)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def save_variants(folder):
    """One 12 x 16 grey picture in many formats; the pixels that the network gets for each."""
    grey = np.random.default_rng(1).integers(0, 256, (12, 16), dtype=np.uint8)
    padded = np.zeros((16, 16), np.uint8)
    padded[2:14] = grey
    picture = Image.fromarray(grey)
    opaque = Image.merge("LA", [picture, Image.new("L", picture.size, 255)])
    pictures = {
        "grey.png": picture,
        "rgb.png": picture.convert("RGB"),
        "rgba.png": opaque.convert("RGBA"),
        "la.png": opaque,
        "grey.bmp": picture,
        "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
    }
    for name, variant in pictures.items():
        variant.save(folder / name)
    return [folder / name for name in pictures], padded


def test_predict_prints_the_scores_of_any_kind_of_image(capsys, workdir, tmp_path):
    files, padded = save_variants(tmp_path)
    status, out, err = run(capsys, "predict", workdir, *files, "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["weights"] == str(workdir / "weights")
    assert document["score"] == "softmax of the logits averaged over 2 time steps"
    assert [entry["image"] for entry in document["images"]] == [str(file) for file in files]
    scores = expected_scores(weights.load(workdir / "weights")[0], [padded])[0]
    order = np.argsort(-scores)
    for entry in document["images"]:
        assert [place["label"] for place in entry["classes"]] == order.tolist()
        assert [place["class"] for place in entry["classes"]] == [CLASSES[c] for c in order]
        assert [place["score"] for place in entry["classes"]] == pytest.approx(scores[order].tolist(), abs=1e-5)


def test_predict_of_many_images_is_that_of_each(capsys, workdir, tmp_path):
    # More than one chunk, the last one filled up.
    rng = np.random.default_rng(2)
    images = [rng.integers(0, 256, (16, 16), dtype=np.uint8) for _ in range(35)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    files = [tmp_path / f"{i}.png" for i in range(35)]
    status, out, _ = run(capsys, "predict", workdir / "weights", *files, "--json")
    assert status == 0
    found = np.zeros((35, 3))
    for i, entry in enumerate(json.loads(out)["images"]):
        for place in entry["classes"]:
            found[i, place["label"]] = place["score"]
    np.testing.assert_allclose(found, expected_scores(weights.load(workdir / "weights")[0], images), atol=1e-5)


def test_predict_as_text_with_a_shipped_network(capsys, workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_files, "PRETRAINED", workdir.parent / "shipped")
    model, meta = weights.load(workdir / "weights")
    weights.save(workdir.parent / "shipped" / "pets", model, meta)
    # A photo much larger than the network's images, upright only through its EXIF orientation.
    photo = Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "photo.jpg", exif=exif)
    status, out, err = run(capsys, "predict", "pets", tmp_path / "photo.jpg", "--top", "2")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "scores: softmax of the logits averaged over 2 time steps"
    assert lines[1] == str(tmp_path / "photo.jpg")
    assert len(lines) == 4
    for line in lines[2:]:
        number, percent, name = line.split()
        assert percent == "%"
        assert 0 <= float(number) <= 100
        assert name in CLASSES


def test_evaluate_agrees_with_predict(capsys, workdir):
    status, out, err = run(capsys, "evaluate", workdir, "--batch-size", "5", "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    source = open_source("folder", "test", workdir / "data")
    records = [source[i] for i in range(len(source))]
    model, _ = weights.load(workdir / "weights")
    predicted = expected_scores(model, [record["image"][..., 0] for record in records]).argmax(1)
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, ([record["label"] for record in records], predicted), 1)
    assert document["confusion"] == confusion.tolist()
    assert document["images"] == 12
    assert document["accuracy"] == pytest.approx(np.trace(confusion) / 12)
    assert document["class_accuracy"] == pytest.approx((np.diag(confusion) / 4).tolist())
    assert document["class_names"] == list(CLASSES)
    layers = [name.removeprefix("stage0.") for name in document["firing_rates"]]
    assert layers == [
        "encode.spikes",
        "block0.token.height.spikes",
        "block0.token.width.spikes",
        "block0.token.spikes",
        "block0.channel.hidden.spikes",
        "block0.channel.spikes",
    ]


def test_evaluate_as_text_names_silent_and_saturated_layers(capsys, model, workdir, tmp_path):
    weights.save(tmp_path, model, meta_for(model))
    data = ("--dataset", "folder", "--data-dir", workdir / "data")
    # Five of twelve images, evenly spaced: two birds, a cat, two dogs.
    status, out, err = run(capsys, "evaluate", tmp_path, *data, "--limit", "5")
    assert (status, err) == (0, "")
    assert "of 5 test images" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert [lines[name].split()[-2] for name in ("bird", "cat", "dog")] == ["2", "1", "2"]
    assert lines["stage0.encode"].split()[1:3] == ["0.00", "%"]
    assert lines["stage0.encode"].endswith("silent (< 0.1 %)")
    assert lines["stage0.block0.channel"].endswith("100.00 %  saturated (> 95 %)")


def test_plot_prints_its_files(capsys, workdir):
    confusion = {"step": 20, "confusion": np.eye(3).tolist(), "firing_rates": {"stage0.encode.spikes": 0.5}}
    (workdir / "evaluation.json").write_text(json.dumps(confusion))
    status, out, err = run(capsys, "plot", workdir)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 5
    for line in out.splitlines():
        assert os.path.getsize(line) > 1000


def test_other_class_names_are_refused_or_taken_on_request(capsys, model, workdir, tmp_path):
    weights.save(tmp_path, model, meta_for(model, class_names=["x", "y", "z"]))
    words = "evaluate", tmp_path, "--dataset", "folder", "--data-dir", workdir / "data", "--limit", "1"
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert 'other data: class 0 is "x" there, "bird" now; class 1 is' in err
    status, out, err = run(capsys, *words, "--allow-other-data")
    assert status == 0
    assert "bird" in out
    assert 'note: other data than the training run\'s: class 0 is "x" there, "bird" now' in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["predict", "{run}", "{tmp}/missing.png"], "there is no image"),
        (["predict", "{run}", "{tmp}"], "is a directory"),
        (["predict", "{run}", "{tmp}/text.png"], "text.png"),
        (["predict", "{run}", "{tmp}/cut.png"], "cut.png"),
        (["predict", "{run}", "{tmp}/good.png", "{tmp}/empty.png"], "empty.png"),
        (["predict", "{tmp}", "{tmp}/good.png"], "holds no model.safetensors"),
        (["predict", "{tmp}/good.png", "{tmp}/good.png"], "is a file"),
        (["predict", "pest", "{tmp}/good.png"], 'did you mean "pets"'),
        (["predict", "{tmp}/bare", "{tmp}/good.png"], 'no "data"'),
        (["predict", "{tmp}/sick", "{tmp}/good.png"], "contains NaN or inf"),
        (["predict", "{run}"], "required: IMAGE"),
        (["predict", "{run}", "{tmp}/good.png", "--top", "0"], "at least 1"),
        (["evaluate", "{run}", "--dataset", "fashion_mnist"], "has 3 classes, but fashion_mnist has 10"),
        (["evaluate", "{run}", "--dataset", "fashion-mnist"], "fashion-mnist"),
        (["evaluate", "{run}", "--data-dir", "{tmp}/nowhere"], "nowhere"),
        (["evaluate", "{run}", "--limit", "x"], "--limit"),
        (["plot", "{tmp}"], "weights"),
        (["predicts"], "invalid choice: 'predicts'"),
        (["--jsonn"], "--jsonn"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, workdir, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(folder_files, "PRETRAINED", tmp_path / "shipped")
    model, meta = weights.load(workdir / "weights")
    weights.save(tmp_path / "shipped" / "pets", model, meta)
    weights.save(tmp_path / "bare", model, {})
    set_value(model, "head.bias", np.nan)
    weights.save(tmp_path / "sick", model, meta)
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_text("")
    Image.new("L", (16, 16)).save(tmp_path / "good.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:150])
    arguments = [argument.format(run=workdir, tmp=tmp_path) for argument in arguments]
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message.lower() in err.lower()


WORDS = ["predict", "evaluate", "plot", "--top", "--json", "--help", "--version", "-1", "0", "--limit", "nowhere"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=3).filter(lambda text: "\0" not in text), max_size=5))
def test_any_command_line_is_answered(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert status in (0, 2)
    assert (err.startswith("error: ") and err.count("\n") == 1) if status else out


def test_help_explains_itself(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert run(capsys)[1] == out
    for command in ("predict", "evaluate", "plot"):
        assert command in out
        status, text, _ = run(capsys, command, "--help")
        assert status == 0
        assert f"examples:\n  spiking-mlp {command}" in text
        assert max(map(len, text.splitlines())) <= 80
    assert run(capsys, "--version") == (0, f"spiking-mlp-jax {__version__}\n", "")


def test_interrupt(capsys, monkeypatch, tmp_path):
    def interrupt(where):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "find", interrupt)
    assert run(capsys, "evaluate", "x") == (130, "", "stopped\n")


def test_reader_that_goes_away():
    read, write = os.pipe()
    os.close(read)
    # Unbuffered, argparse would meet the closed pipe itself, and ignore it.
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "spiking_mlp_jax.cli.main", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_names_that_the_terminal_cannot_show(workdir, tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\xe9.png"
    Image.new("L", (16, 16)).save(tmp_path / "good.png")
    os.rename(tmp_path / "good.png", name)
    done = subprocess.run(
        [sys.executable, "-m", "spiking_mlp_jax.cli.main", "predict", workdir, name],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert b"\\udcff\\udce9.png" in done.stdout


def test_classes_of_a_data_set_that_lies_elsewhere_now(capsys, workdir, tmp_path):
    data = make_data(tmp_path / "moved", per_class=1)
    status, out, _ = run(capsys, "evaluate", workdir, "--data-dir", data)
    assert status == 0
    assert "of 3 test images" in out


def test_options_come_from_a_flagfile(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("spiking_mlp_jax.train.runtime.join", lambda *_: None)
    monkeypatch.setattr("spiking_mlp_jax.train.runtime.leave", lambda: None)
    file = tmp_path / "flags"
    file.write_text("--config=fashion_mnist:demo\n# a comment\n--config.dry_run=True\n--config.time_steps=3\n")
    status, out, err = run(capsys, "train", f"--flagfile={file}", "--config.time_steps=2")
    assert status == 0 and not err and "parameters" in out
    words = "--config=fashion_mnist:demo", "--config.dry_run=True", "--config.time_steps=2"
    assert out == run(capsys, "train", *words)[1]
    status, _, err = run(capsys, "train", "--flagfile", tmp_path / "none")
    assert status == 2 and err.startswith("error: --flagfile cannot be read") and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_full_stdout_is_status_4(workdir):
    command = [sys.executable, "-m", "spiking_mlp_jax", "evaluate", str(workdir), "--limit", "2"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 4, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the output could not be written (No space left on device)")


def test_a_long_command_says_that_it_runs(capfd, monkeypatch):
    said = ""

    def long(_):
        nonlocal said
        deadline = time.monotonic() + 60
        while said.count("plot: running for 0 s\n") < 2:
            said += capfd.readouterr().err
            assert time.monotonic() < deadline

    monkeypatch.setattr("spiking_mlp_jax.cli.main.REPORT_SECONDS", 0.02)
    monkeypatch.setattr("spiking_mlp_jax.cli.predict._plot", long)
    assert main(["plot", "run"]) == 0


def test_a_full_disk_is_one_message(capsys):
    """Threads of other libraries fail, too."""
    hooks = threading.excepthook, sys.unraisablehook, sys.excepthook

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    with train._one_message():
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        sys.excepthook(RuntimeError, RuntimeError("Event loop is closed"), None)
    assert capsys.readouterr().err == ""
    assert hooks == (threading.excepthook, sys.unraisablehook, sys.excepthook)
