"""Every option of every command with impossible values: one line on stderr, status 2, nothing written."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spiking_mlp_jax.cli.main import main, make_parser
from spiking_mlp_jax.deploy import artifact
from spiking_mlp_jax.deploy.compile import compile
from spiking_mlp_jax.train.config import default_config
from tests.support.random_model import make_workdir, random_model

# What else each command needs, in a folder of `files`.
REQUIRED = {
    "train": "--config fashion_mnist:demo --workdir new",
    "predict": "run good.png",
    "evaluate": "run",
    "plot": "run",
    "compile": "run -o out.smlp",
    "audit": "run",
    "cost": "run",
    "export-c": "net.smlp",
    "pixels": "run good.png -o out.bin",
    "convert": "run -o out.npz",
    "hub": "run -o out",
    "download": "me/net",
    "export-stablehlo": "run -o out.mlir",
    "export-onnx": "net.smlp",
    "export-nir": "run -o out.nir",
    "prepare imagenet": "--out out --val-labels text.txt",
    "prepare folder": "--data run/data --out out",
    "probe receptive-fields": "run",
    "probe activity": "run",
    "sweep": "sweeps/norm --workdir new",
    "report": "run",
    "demo": "",
}
NUMBERS = "", "abc", "-1", "1e99", "nan"
INPUTS = "", "nothing", "text.txt", "text.txt/below", "x" * 300
OUTPUT_FILES = "", "text.txt/below", "empty", "/proc/nothing/here", "x" * 300
OUTPUT_FOLDERS = "", "text.txt", "text.txt/below", "/proc/nothing/here", "x" * 300
WORDS = "", "nonsense"
# Values of options by their metavar. Not of --slurm: importing submitit closes the stderr that pytest captures.
VALUES = {
    **dict.fromkeys(["N", "I", "S", "M", "R", "X", "SECONDS", "MIB", "I/N", "S,S"], NUMBERS),
    **dict.fromkeys(
        ["CONFIG", "NETWORK", "IMAGE", "WORKDIR", "WORKDIR_OR_WEIGHTS", "FILE_OR_NETWORK", "TAR", "SWEEP", "WEIGHTS"],
        INPUTS,
    ),
    **dict.fromkeys(["FOLDER", "PATH"], OUTPUT_FOLDERS),
    **dict.fromkeys(["FIELD=VALUE", "MODE", "NAMES", "OWNER/NAME", None], WORDS),
    ("--data-dir", "DIR"): INPUTS,
    ("--data", "DIR"): INPUTS,
    ("--collect", "DIR"): INPUTS,
    ("--workdir", "DIR"): OUTPUT_FOLDERS,
    ("--out", "DIR"): OUTPUT_FOLDERS,
    ("--val-labels", "FILE"): INPUTS,
    ("-o", "FILE"): OUTPUT_FILES,
    ("--plot", "FILE"): OUTPUT_FILES,
    ("--dataset", "NAME"): WORDS,
    ("--layer", "NAME"): WORDS,
    ("--classes", "NAMES"): INPUTS,
    ("--key", "KEY"): WORDS,
}


def commands(parser, path=()):
    inner = [action for action in parser._actions if isinstance(action.choices, dict)]
    if not inner:
        yield " ".join(path), parser
    for name, other in inner[0].choices.items() if inner else ():
        yield from commands(other, (*path, name))


def wrong_lines():
    """(command, its other arguments, the wrong ones) as a word each."""
    for command, parser in commands(make_parser()):
        required = REQUIRED[command].split()
        yield command, [], ["--nonsense"]
        places = [action for action in parser._actions if not action.option_strings]
        if required and command != "prepare imagenet":
            yield command, [], []
        for action in parser._actions:
            if action.nargs == 0 and action.option_strings[0] not in ("-h",):
                yield command, required, [f"{action.option_strings[0]}=x"]
            if action.nargs == 0:
                continue
            name = action.option_strings[0] if action.option_strings else action.dest
            values = VALUES.get((name, action.metavar), VALUES.get(action.metavar, ()))
            for value in values:
                if not action.option_strings:
                    others = [value if place is action else required[i] for i, place in enumerate(places)]
                    yield command, others, required[len(places) :]
                else:
                    others = list(required)
                    if name in others:
                        del others[others.index(name) : others.index(name) + 2]
                    yield command, others, [name, value]
            if action.option_strings and action.nargs != "*":
                yield command, required, [name]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a run, a compiled network, an image, a text file and an empty folder."""
    folder = tmp_path_factory.mktemp("files")
    make_workdir(folder / "run", random_model(depths=(1,)))
    (folder / "run" / "data" / "train").symlink_to(folder / "run" / "data" / "test")
    artifact.save(compile(folder / "run", images=8), folder / "net.smlp")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / "good.png")
    (folder / "text.txt").write_text("not what you want\n")
    (folder / "empty").mkdir()
    return folder


def listing(folder: Path):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def check(capsys, monkeypatch, files, words):
    monkeypatch.chdir(files)
    before = listing(files)
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    _, err = capsys.readouterr()
    assert status == 2, (words, status, err)
    assert err.startswith("error: ") and err.count("\n") == 1, (words, err)
    assert len(err) < 700, err
    assert listing(files) == before, words


SLOW = "probe activity", "probe receptive-fields"  # they measure before they find that nothing can be written to /proc


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in REQUIRED]
)
def test_wrong_lines(capsys, monkeypatch, files, command):
    monkeypatch.setattr("spiking_mlp_jax.utils.compilation_cache.use_compilation_cache", lambda where: None)
    monkeypatch.setattr("spiking_mlp_jax.train.runtime.join", lambda *settings: None)  # must come before JAX is used
    for name, others, wrong in wrong_lines():
        if name == command:
            check(capsys, monkeypatch, files, [*name.split(), *others, *wrong])


def test_there_are_many():
    assert len(list(wrong_lines())) > 500


def test_a_compiled_network_has_its_ending(capsys, monkeypatch, files):
    for name in ("net", "net.txt", "net.smlp.bak", ".smlp"):
        check(capsys, monkeypatch, files, ["compile", "run", "-o", name])


def test_a_dry_run_needs_a_folder_too(capsys, monkeypatch, files):
    monkeypatch.setattr("spiking_mlp_jax.train.runtime.join", lambda *settings: None)
    words = "train --config fashion_mnist:demo --config.dry_run=True --workdir text.txt"
    check(capsys, monkeypatch, files, words.split())


WRONG = {bool: ["maybe", "2"], int: ["abc", "1.5", "-1"], float: ["abc", "nan"]}


@pytest.mark.parametrize("name", list(default_config()))
def test_wrong_fields(capsys, monkeypatch, files, name):
    monkeypatch.setattr("spiking_mlp_jax.train.runtime.join", lambda *settings: None)
    wrong = [f"{name}={value}" for value in WRONG.get(type(default_config()[name]), ())]
    for field in (*wrong, f"{name}x=1"):
        check(
            capsys,
            monkeypatch,
            files,
            [*["train", "--config", "fashion_mnist:demo", "--workdir", "new"], f"--config.{field}"],
        )
