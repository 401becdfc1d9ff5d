"""Folders to share: what is in them, that every command takes them, and that changed ones are refused."""

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from spiking_mlp_jax import ModelConfig, SpikingMLP, classify
from spiking_mlp_jax.cli import main as cli
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop.hub import model_card, save_pretrained, write_card
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.utils.files import verify
from tests.support.random_model import random_model

FILES = ("README.md", "SHA256SUMS", "config.json", "model.safetensors")
FIELDS = dict(image_size=8, in_channels=1, num_classes=3, patch_size=2, dim=3, depths=(1, 1), time_steps=2)
CONFIG = ModelConfig(**FIELDS)
DATA = {"dataset": "folder", "resize_mode": "pad", "eval_resize": 0, "mean": [0.5], "std": [0.25]}
META = {"data": {**DATA, "class_names": ["a", "b", "c"]}, "result": {"accuracy": 0.75, "images": 40}}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setattr("spiking_mlp_jax.utils.compilation_cache.use_compilation_cache", lambda where: None)


@pytest.fixture(scope="module")
def model():
    return random_model(**FIELDS)


@pytest.fixture
def shared(tmp_path, model):
    folder = tmp_path / "shared"
    save_pretrained(folder, model, META, name="tiny", license="mit", repo="me/tiny")
    return folder


def head_of(text):
    return yaml.safe_load(text.split("---\n")[1])


def run(capsys, *words):
    status = cli.main([str(word) for word in words])
    return status, *capsys.readouterr()


def test_what_is_in_the_folder(shared, model):
    assert tuple(sorted(path.name for path in shared.iterdir())) == FILES
    again = SpikingMLP.from_pretrained(shared)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    model.eval()
    np.testing.assert_array_equal(again(images), model(images))
    assert again.pixels.class_names == ("a", "b", "c")
    for line in (shared / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((shared / name).read_bytes()).hexdigest() == digest
    if shutil.which("sha256sum"):
        done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=shared, capture_output=True, check=False)
        assert done.returncode == 0 and done.stdout.count(b": OK") == 3


def test_the_card(shared):
    text = (shared / "README.md").read_text()
    head = head_of(text)
    # As the Hub reads it.
    (read,) = ModelCard(text).data.eval_results
    assert (read.task_type, read.metric_type, read.metric_value) == ("image-classification", "accuracy", 0.75)
    assert head["license"] == "mit" and head["pipeline_tag"] == "image-classification"
    (entry,) = head["model-index"]
    assert entry["name"] == "tiny"
    (result,) = entry["results"]
    assert result["metrics"][0]["value"] == 0.75 and result["dataset"]["split"] == "test"
    assert "75.00 % of 40 test images with T = 2" in text
    assert "hf download me/tiny --local-dir tiny" in text
    for command in ("predict tiny", "evaluate tiny --data-dir DIR", "compile tiny --data-dir DIR"):
        assert f"spiking-mlp {command}" in text
    for name in ("model.safetensors", "config.json"):
        assert hashlib.sha256((shared / name).read_bytes()).hexdigest() in text
    assert (
        "10.1109/TNNLS.2024.3394837" in text and '["a", "b", "c"]' in text and "Licence of these weights: mit" in text
    )


def test_commands_on_a_card_are_understood():
    for name in weights.pretrained_names():
        text = (weights.pretrained_path(name) / "README.md").read_text()
        found = re.findall(r"^spiking-mlp (.*?)(?: +#.*)?$", text, re.M)
        assert {line.split()[0] for line in found} == {"predict", "evaluate", "compile"}
        for line in found:
            cli.make_parser().parse_args(line.split())


@pytest.mark.parametrize("name", weights.pretrained_names())
def test_shipped_folders_are_what_the_code_writes(name, tmp_path):
    folder = weights.pretrained_path(name)
    assert tuple(sorted(path.name for path in folder.iterdir())) == FILES
    copy = tmp_path / name
    copy.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folder / file, copy / file)
    write_card(copy)
    for file in FILES:
        assert (copy / file).read_bytes() == (folder / file).read_bytes()


def test_every_entry_takes_it(shared, tmp_path, capsys):
    picture = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    for split in ("train", "test"):
        for label in "abc":
            (tmp_path / "data" / split / label).mkdir(parents=True)
            Image.fromarray(picture[::-1]).save(tmp_path / "data" / split / label / "1.png")
    status, out, _ = run(capsys, "predict", shared, tmp_path / "a.png", "--json")
    assert status == 0
    found = json.loads(out)["images"][0]["classes"]
    (guesses,) = classify(SpikingMLP.from_pretrained(shared), [picture])
    assert [(place["class"], place["score"]) for place in found] == [(guess.name, guess.score) for guess in guesses]
    status, out, _ = run(capsys, "evaluate", shared, "--data-dir", tmp_path / "data", "--json")
    assert status == 0 and json.loads(out)["images"] == 3
    status, _, err = run(capsys, "compile", shared, "--data-dir", tmp_path / "data", "-o", tmp_path / "tiny.smlp")
    assert (status, err) == (0, "") and (tmp_path / "tiny.smlp").stat().st_size


@settings(max_examples=40)
@given(data=st.data())
def test_any_changed_byte_is_refused(data):
    folder = weights.pretrained_path("fashion_mnist")
    name = data.draw(st.sampled_from([name for name in FILES if name != "SHA256SUMS"]))
    content = (folder / name).read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    other = data.draw(st.integers(1, 255))
    changed = bytearray(content)
    changed[place] ^= other
    with tempfile.TemporaryDirectory() as where:
        copy = Path(where) / "net"
        shutil.copytree(folder, copy)
        (copy / name).write_bytes(changed)
        with pytest.raises(InputError, match=f"{re.escape(name)} is not the file that SHA256SUMS lists"):
            weights.read_config(copy)


@pytest.mark.parametrize("command", ["predict {} x.png", "evaluate {}", "compile {} -o y.smlp", "hub {} -o z"])
def test_no_command_takes_a_changed_folder(command, shared, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").write_bytes(b"")
    text = (shared / "config.json").read_text()
    (shared / "config.json").write_text(text.replace('"tau": 2.0', '"tau": 3.0'))
    status, out, err = run(capsys, *command.format("shared").split())
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: shared/config.json is not the file that SHA256SUMS lists: .*\n", err)
    with pytest.raises(InputError, match="is not the file"):
        SpikingMLP.from_pretrained(shared)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda f: (f / "README.md").unlink(), "README.md is missing, but SHA256SUMS lists it"),
        (lambda f: sums(f, lambda lines: lines[1:]), "has no checksum of model.safetensors"),
        (lambda f: sums(f, lambda lines: [lines[0], lines[2]]), "has no checksum of config.json"),
        (lambda f: sums(f, lambda lines: []), "has no checksum of model.safetensors"),
        (lambda f: sums(f, lambda lines: [*lines, "nonsense"]), "line 4 of .* is not the checksum"),
        (lambda f: sums(f, lambda lines: [*lines, lines[0]]), "line 4 of .* is not the checksum"),
        (lambda f: sums(f, lambda lines: [*lines, "0" * 64 + "  ../secret"]), "line 4 of .* is not the checksum"),
        (lambda f: sums(f, lambda lines: [*lines, "0" * 64 + "  .."]), "line 4 of .* is not the checksum"),
        (lambda f: sums(f, lambda lines: [lines[0].upper(), *lines[1:]]), "line 1 of .* is not the checksum"),
        (lambda f: (f / "SHA256SUMS").write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda f: ((f / "SHA256SUMS").unlink(), (f / "SHA256SUMS").mkdir()), "cannot be read"),
        (lambda f: (f / "weights.safetensors").write_bytes(b""), "remove one of them"),
    ],
)
def test_sums_that_say_nothing_are_refused(change, sentence, shared):
    change(shared)
    with pytest.raises(InputError, match=sentence):
        weights.load(shared)


def sums(folder, change):
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    (folder / "SHA256SUMS").write_text("".join(line + "\n" for line in change(lines)))


def test_weights_of_another_network_are_refused_without_sums(shared, tmp_path):
    save_pretrained(tmp_path / "other", random_model(**{**FIELDS, "dim": 6}), META, name="other")
    for folder in (shared, tmp_path / "other"):
        (folder / "SHA256SUMS").unlink()
    shutil.copy(tmp_path / "other" / "model.safetensors", shared / "model.safetensors")
    with pytest.raises(InputError, match="has shape"):
        weights.load(shared)


def test_saving_over_it_leaves_no_stale_sums(shared, model):
    weights.save(shared, model, {**META, "result": {"accuracy": 0.5, "images": 2}})
    assert tuple(sorted(path.name for path in shared.iterdir())) == ("config.json", "model.safetensors")
    assert weights.load(shared)[1]["result"]["accuracy"] == 0.5


def test_a_card_of_one_s_own_beside_weights_stays(tmp_path, model):
    weights.save(tmp_path, model, META)
    (tmp_path / "README.md").write_text("mine")
    weights.save(tmp_path, model, META)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_command(shared, tmp_path, capsys):
    status, out, err = run(capsys, "hub", "fashion_mnist", "-o", tmp_path / "fm", "--repo", "me/fm")
    assert (status, err) == (0, "")
    assert [line.rpartition("/")[2] for line in out.splitlines()] == list(FILES)
    assert weights.load(tmp_path / "fm")[1]["repo"] == "me/fm"
    # Once more, over itself, with other words.
    status, _, err = run(capsys, "hub", tmp_path / "fm", "-o", tmp_path / "fm", "--license", "cc-by-4.0", "--name", "n")
    assert (status, err) == (0, "")
    assert head_of((tmp_path / "fm" / "README.md").read_text())["license"] == "cc-by-4.0"
    verify(tmp_path / "fm", FILES[2:])


def test_without_a_licence_it_is_said(tmp_path, model, capsys):
    weights.save(tmp_path / "w", model, {"data": META["data"]})
    status, _, err = run(capsys, "hub", tmp_path / "w", "-o", tmp_path / "out")
    assert status == 0 and err.startswith("note: the card says licence unknown")
    text = (tmp_path / "out" / "README.md").read_text()
    assert head_of(text)["license"] == "unknown" and "model-index" not in head_of(text)
    assert "Not measured" in text


def test_measured_now(tmp_path, model, capsys):
    rng = np.random.default_rng(1)
    for label in "abc":
        (tmp_path / "data" / "test" / label).mkdir(parents=True)
        for i in range(2):
            picture = rng.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(picture).save(tmp_path / "data" / "test" / label / f"{i}.png")
    weights.save(tmp_path / "w", model, META)
    status, *_ = run(
        capsys,
        *("hub", tmp_path / "w", "-o", tmp_path / "out", "--license", "mit"),
        *("--evaluate", "--data-dir", tmp_path / "data"),
    )
    assert status == 0
    result = weights.load(tmp_path / "out")[1]["result"]
    status, out, _ = run(capsys, "evaluate", tmp_path / "out", "--data-dir", tmp_path / "data", "--json")
    assert result["images"] == 6 and result["accuracy"] == json.loads(out)["accuracy"]


def test_the_card_says_what_was_measured(model):
    weights_meta = {"name": "n", "license": "mit", "data": META["data"], "trained_on": "letters"}
    trained = model_card(CONFIG, weights_meta | {"result": {"accuracy": 0.5, "images": 9, "step": 1234}}, 7, {})
    assert "50.00 % of 9 test images" in trained and "those of step 1,234, the best of their training run" in trained
    measured = model_card(CONFIG, weights_meta | {"result": {"accuracy": 0.5, "images": 9}}, 7, {})
    assert "training run" not in measured and head_of(measured)["model-index"][0]["results"][0]["dataset"]["name"] == (
        "letters"
    )
    # On other data than it was trained on: the figure is not said to be of these.
    result = {"accuracy": 0.5, "images": 9, "dataset": "tfds:cifar10"}
    other = model_card(CONFIG, weights_meta | {"result": result}, 7, {})
    about = head_of(other)["model-index"][0]["results"][0]["dataset"]
    assert about == {"name": "cifar10", "type": "uoft-cs/cifar10", "split": "test"}
    assert "\nspiking-mlp evaluate n --dataset tfds:cifar10 --data-dir DIR\n" in other


def test_nothing_of_others_is_written_over(tmp_path, model, capsys):
    # A workdir has a config.json, too, but it is the training's.
    weights.save(tmp_path / "run" / "weights", model, META)
    (tmp_path / "run" / "config.json").write_text('{"data_dir": null}')
    status, out, err = run(capsys, "hub", tmp_path / "run", "-o", tmp_path / "run")
    assert (status, out) == (2, "") and "holds other files" in err
    assert (tmp_path / "run" / "config.json").read_text() == '{"data_dir": null}'
    # A card of one's own, or one that was edited, with its sums renewed or not.
    folder, source = tmp_path / "run" / "weights", tmp_path / "run"
    (folder / "README.md").write_text("mine")
    status, _, err = run(capsys, "hub", source, "-o", folder)
    assert status == 2 and "README.md was edited: move it away" in err
    (folder / "README.md").unlink()
    assert run(capsys, "hub", source, "-o", folder, "--licence", "mit", "--name", "n")[0] == 0
    assert run(capsys, "hub", source, "-o", folder, "--name", "m")[0] == 0
    with (folder / "README.md").open("a") as file:
        file.write("one more word\n")
    subprocess.run(f"sha256sum {' '.join(FILES[2:])} README.md > SHA256SUMS", shell=True, check=True, cwd=folder)
    status, _, err = run(capsys, "hub", source, "-o", folder)
    assert status == 2 and "README.md was edited" in err
    assert (folder / "README.md").read_text().endswith("one more word\n")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["hub", "{w}", "-o", "{tmp}/o", "--license", "MIT License"], "is not a licence identifier"),
        (["hub", "{w}", "-o", "{tmp}/o", "--name", "a b"], 'the name "a b" cannot be used'),
        (["hub", "{w}", "-o", "{tmp}/o", "--repo", "tiny"], "give OWNER/NAME"),
        (["hub", "{w}", "-o", "{tmp}/o", "--data-dir", "x"], "need --evaluate"),
        (["hub", "{w}", "-o", "{tmp}/file"], "is not a folder: name another with -o"),
        (["hub", "{w}", "-o", "{tmp}/full"], "holds other files"),
        (["hub", "{w}", "-o", "{tmp}/file/x"], "is not a folder: name another with -o"),
        (["hub", "{w}", "-o", "{tmp}/" + 300 * "x", "--name", "n"], "a name has at most 255 bytes"),
        (["hub", "{tmp}/none", "-o", "{tmp}/o"], "there is no folder"),
        (["hub", "{bare}", "-o", "{tmp}/o"], 'have no "data"'),
        (["hub", "me/none", "-o", "{tmp}/o"], "download it first: spiking-mlp download me/none"),
        (["hub", "{w}"], "required: -o"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(words, sentence, tmp_path, model, capsys):
    weights.save(tmp_path / "w", model, META)
    weights.save(tmp_path / "bare", model, {})
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    places = {"w": tmp_path / "w", "tmp": tmp_path, "bare": tmp_path / "bare"}
    try:
        status = cli.main([word.format(**places) for word in words])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and sentence in err and err.count("\n") == 1
    assert not (tmp_path / "o").exists()


@given(name=st.text(max_size=20), trained=st.text(min_size=1, max_size=40), names=st.lists(st.text(), max_size=3))
@example(name="---", trained="a\n---\nlicense: other", names=["```\n# x", "<script>", "]\n---"])
def test_texts_stay_texts(name, trained, names):
    meta = {"data": {**DATA, "dataset": name, "class_names": names}, "name": "n", "license": "mit", "result": None}
    meta |= {"trained_on": trained, "result": {"accuracy": 0.5, "images": 2}}
    text = model_card(CONFIG, meta, 7, {"a": "0"})
    head = head_of(text)
    assert head["license"] == "mit"
    assert head["model-index"][0]["results"][0]["dataset"]["name"].split() == trained.split()
    body = text.split("---\n", 2)[2]
    # No heading, fence or rule but the card's own.
    assert re.findall(r"^#+ .*$", body, re.M) == [
        *("# n", "## Data", "## Accuracy", "## Use it", "## Files", "## Licence and citation")
    ]
    assert body.count("\n```") == 10


def test_a_folder_inside_does_not_take_its_place(shared, tmp_path):
    save_pretrained(shared / "weights", random_model(**{**FIELDS, "dim": 6}), META, name="other")
    assert weights.find(shared) == shared
    assert SpikingMLP.from_pretrained(shared).config.dim == 3
