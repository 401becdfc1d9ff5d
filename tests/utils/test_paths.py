"""Paths as users write them: `~`, `..` and links mean the same everywhere."""

import json
import os

import pytest

from spiking_mlp_jax.cli import train
from spiking_mlp_jax.cli.main import main
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.utils.paths import is_remote, real_path, user_path
from tests.support.random_model import make_workdir, random_model
from tests.support.tiers import rest_slow

CONFIG = """
from spiking_mlp_jax.train.config import default_config


def get_config():
    config = default_config()
    network = dict(image_size=16, in_channels=1, num_classes=3, patch_size=4, dim=6, depths=(1,), expansion=2)
    data = dict(dataset="folder", mean=(0.25,), std=(0.5,), eval_batch_size=8)
    config.update(network | data | dict(time_steps=2, eval_only=True, compilation_cache="off"))
    return config
"""
PLACES = {"home": "~/run", "parent": "{home}/run/weights/..", "link": "{home}/link", "link to weights": "~/named"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run, whose config names its data, and links to it."""
    home = tmp_path_factory.mktemp("home")
    run = make_workdir(home / "run", random_model(depths=(1,)))
    (home / "link").symlink_to("run")
    (home / "named").symlink_to("run/weights")
    (home / "data").symlink_to("run/data")
    (home / "config.py").write_text(CONFIG)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"data_dir": "~/run/data"}))
    return home


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("spiking_mlp_jax.utils.compilation_cache.use_compilation_cache", lambda where: None)


def evaluated(capsys, *arguments):
    """The weights folder and the accuracy that `evaluate` prints."""
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return os.path.realpath(found["weights"]), found["accuracy"]


@pytest.mark.parametrize("place", rest_slow(PLACES))
def test_evaluate_and_predict(home, capsys, place):
    where = PLACES[place].format(home=home)
    expected = evaluated(capsys, home / "run", "--data-dir", home / "run" / "data")
    assert evaluated(capsys, where) == expected
    for data in ("~/run/data", f"{home}/run/weights/../data", "~/data"):
        assert evaluated(capsys, where, "--data-dir", data) == expected

    image = "run/data/test/cat/1.png"
    predicted = [main(["predict", where, f"{start}/{image}"]) for start in ("~", f"{home}/link/..")]
    assert predicted == [0, 0]


@pytest.mark.parametrize("below", ["weights", "."])
def test_here(home, monkeypatch, capsys, below):
    expected = evaluated(capsys, home / "run")
    monkeypatch.chdir(home / "run" / below)
    assert evaluated(capsys, ".") == expected


@pytest.mark.parametrize("place", PLACES)
def test_train(home, tmp_path, monkeypatch, place):
    monkeypatch.setattr("spiking_mlp_jax.train.runtime.join", lambda *_: None)  # only a fresh process can join others
    (tmp_path / "out").mkdir()
    (home / "out").unlink(missing_ok=True)
    (home / "out").symlink_to(tmp_path / "out")
    data, out = {
        "home": ("~/run/data", "~/out"),
        "parent": (f"{home}/run/weights/../data", f"{home}/run/../out"),
    }.get(place, ("~/data", f"{home}/out/new"))
    where = PLACES[place].format(home=home)
    fields = [f"--config.init_weights={where}", f"--config.data_dir={data}"]
    assert train.main(["--config", "~/config.py", "--workdir", out, *fields]) == 0
    written = tmp_path / "out" / ("new" if out.endswith("new") else "") / "evaluation.json"
    assert json.loads(written.read_text())["images"] == 12


def test_weights_behind_a_link(home, tmp_path):
    """The run of linked weights is found on either side of the link."""
    (tmp_path / "elsewhere").symlink_to(home / "run" / "weights")
    assert weights.data_dir(weights.find(tmp_path / "elsewhere")) == "~/run/data"
    (tmp_path / "weights").symlink_to(home / "run" / "weights")
    assert weights.data_dir(weights.find(tmp_path)) == "~/run/data"
    (tmp_path / "config.json").write_text('{"data_dir": "here"}')
    assert weights.data_dir(weights.find(tmp_path)) == "here"


def test_object_stores_are_unchanged():
    assert os.fspath(user_path("gs://bucket/~/a/../b")) == "gs://bucket/~/a/../b"


def test_a_real_path_has_no_links_and_is_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    wanted = tmp_path.resolve() / "run"
    for name in (
        "~/run",
        "run",
        "./link",
        "run/../link/.",
        f"file://{tmp_path}/run",
        f"file://localhost{tmp_path}/run",
    ):
        assert real_path(name) == wanted, name
    assert not is_remote(f"file://{tmp_path}") and is_remote("gs://bucket/run")
    assert str(real_path("gs://bucket/../run")) == "gs://bucket/../run"
    with pytest.raises(InputError, match="is a file on another machine"):
        real_path("file://elsewhere/run")
