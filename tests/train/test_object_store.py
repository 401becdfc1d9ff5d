"""A workdir in an object store: whole files only, no appending and no renaming of single files."""

import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path

import chex
import pytest
from etils.epath import backend, gpath
from orbax.checkpoint._src.path import gcs_utils

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.train import loop
from spiking_mlp_jax.train.checkpoint import MANIFEST
from spiking_mlp_jax.train.config import to_dict
from spiking_mlp_jax.utils.files import as_path
from tests.support.killer import configuration
from tests.support.shades import forget_compiled, write_shades
from tests.train.test_loop import lines, restored

BUCKET = "gs://bucket"


class Bucket(backend._OsPathBackend):
    """A folder behind gs://bucket that refuses what object stores cannot do."""

    def __init__(self, root):
        self.root = root
        self.moved = []

    def local(self, path):
        path = os.fspath(path)
        assert path.startswith(BUCKET), path
        return str(self.root) + path.removeprefix(BUCKET)

    def open(self, path, mode):
        assert "a" not in mode, f"{path} cannot be appended to"
        if "w" in mode:  # objects need no folder
            os.makedirs(os.path.dirname(self.local(path)), exist_ok=True)
        return super().open(self.local(path), mode)

    def rename(self, path, dst):
        # Copies and deletes, one object after the other.
        self.moved.append((os.fspath(path), os.fspath(dst)))
        assert os.path.isdir(self.local(path)), f"{path} should have been written in place"
        os.rename(self.local(path), self.local(dst))

    def glob(self, path):
        return [BUCKET + found.removeprefix(str(self.root)) for found in super().glob(self.local(path))]

    def rmtree(self, path):
        shutil.rmtree(self.local(path))

    def replace(self, path, dst):
        raise AssertionError(f"{path} should have been written in place")


def _translated(name):
    method = getattr(backend._OsPathBackend, name)
    return lambda self, path, *rest, **more: method(self, self.local(path), *rest, **more)


for _name in ("exists", "isdir", "listdir", "makedirs", "mkdir", "remove", "stat"):
    setattr(Bucket, _name, _translated(_name))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    root = tmp_path / "bucket"
    root.mkdir()
    store = Bucket(root)
    monkeypatch.setenv("EPATH_USE_TF", "0")
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", store)

    def files(path):
        return {"driver": "file", "path": store.local(path) + ("" if path.endswith("_sharding") else "/")}

    # TensorStore and Google's client do not go through epath.
    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", files)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    return store


@pytest.fixture
def config(tmp_path):
    write_shades(tmp_path, train=32, test=16, side=8, step=90)
    config = configuration(tmp_path)
    config.update(epochs=2, checkpoint_every=0)
    yield config
    forget_compiled()


@pytest.mark.slow
def test_a_run_in_a_bucket_is_that_on_a_disk(bucket, config, tmp_path, monkeypatch, capsys):
    assert loop.fit(config, tmp_path / "disk").finished
    # The same in a bucket, interrupted once and damaged once.
    shard_batch, calls = loop.shard_batch, []

    def interrupting(*arguments):
        calls.append(0)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return shard_batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "shard_batch", interrupting)
        result = loop.fit(config, f"{BUCKET}/run")
    assert not result.finished and result.step == 6
    assert bucket.moved == []
    run = bucket.root / "run"
    file = next(path for path in (run / "checkpoints" / "6" / "state").rglob("*") if path.is_file())
    file.write_bytes(file.read_bytes() + b"x")
    # An upload that never ended: a folder under its final name, without the file that is written last.
    shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / "7")
    (run / "checkpoints" / "7" / "commit_success.txt").unlink()
    assert loop.fit(config, f"{BUCKET}/run").finished
    assert f"was moved to {BUCKET}/run/damaged/6" in capsys.readouterr().out
    assert bucket.moved == [(f"{BUCKET}/run/checkpoints/6", f"{BUCKET}/run/damaged/6")]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4", "8"]
    assert (run / "checkpoints" / "8" / MANIFEST).exists()
    ours, theirs = restored(config, as_path(f"{BUCKET}/run")), restored(config, tmp_path / "disk")
    chex.assert_trees_all_equal(ours.state, theirs.state)
    assert ours.progress == theirs.progress
    assert lines(as_path(f"{BUCKET}/run")) == lines(tmp_path / "disk")
    for name in ("weights/model.safetensors", "evaluation.json", "config.json"):
        assert (run / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()
    assert weights.load(run / "weights")[1]["result"]["step"] in (4, 8)
    log = (run / "log.txt").read_text()
    assert "starting" in log and "resuming at step 4" in log and "finished" in log
    assert json.loads((run / "config.json").read_text()) == to_dict(config)
    assert not list(run.rglob("*.tmp")) and not Path("gs:").exists()


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="the package is there")
def test_a_store_without_its_package_is_an_input_error(config, monkeypatch):
    monkeypatch.setenv("EPATH_USE_TF", "0")
    with pytest.raises(InputError, match=r'"gs://bucket/run" cannot be reached .* gcsfs'):
        loop.fit(config, f"{BUCKET}/run")
