"""A whole fine-tuning run: other images and classes, averaged weights, a trace, an interruption; evaluation alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.train import loop
from spiking_mlp_jax.train.checkpoint import Checkpoints
from spiking_mlp_jax.train.config import default_config, model_config, parse_window, to_dict
from spiking_mlp_jax.train.logging import DataWait, Profiler, read_metrics
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.state import Average, abstract_state, with_average
from tests.support.random_model import meta_for, random_model
from tests.support.shades import forget_compiled, write_shades

pytestmark = pytest.mark.slow

LAST = 6  # steps: 2 epochs of 3


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Images of four classes, the weights of a network that knows three, and the compiled programs."""
    folder = tmp_path_factory.mktemp("shared")
    write_shades(folder, train=50, test=20, side=24, classes=4, step=70)
    network = random_model(depths=(1, 1))
    weights.save(folder / "given", network, meta_for(network))
    yield folder
    forget_compiled()


def make_config(shared, **fields):
    config = default_config()
    config.update(
        dataset="idx", data_dir=str(shared), image_size=24, in_channels=1, num_classes=4, dim=6, depths=(1, 1),
        expansion=2, time_steps=2, mean=(0.5,), std=(0.25,), batch_size=16, eval_batch_size=16, epochs=2, log_every=2,
        learning_rate=0.5, ema_decay=0.9, init_weights=str(shared / "given"), profile_steps="2:4",
        host_memory="default", compilation_cache=str(shared / "cache"),
    )  # fmt: skip
    config.update(fields)
    return config


def restored(config, workdir):
    """The newest checkpoint, on one device."""
    _, abstract = abstract_state(model_config(config), make_optimizer(config, 3))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(with_average, abstract)
    )
    checkpoints = Checkpoints(workdir / "checkpoints", to_dict(config), config.keep)
    try:
        return checkpoints.restore(abstract)
    finally:
        checkpoints.close()


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory):
    """A run that nothing interrupts; its loop is told of much waiting."""
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataWait, "so_far", lambda self: (0.25, 0.125))
        assert loop.fit(make_config(shared), workdir).finished
    return workdir


def test_what_the_run_leaves(shared, whole):
    log = (whole / "log.txt").read_text()
    said = "mixing and token norms resampled from 16 to 24 px, with a new head (3 classes there, 4 now)"
    assert f"starting from the weights of {shared / 'given'}, with {said}: " in log
    assert len(list((whole / "profile").rglob("*.xplane.pb"))) == 1
    assert log.count(f"a trace of the steps is in {whole / 'profile'}") == 1
    lines = [line for line in read_metrics(whole) if line["split"] == "train"]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all((line["data_wait_share"], line["data_wait_seconds"]) == (0.25, 0.125) for line in lines)
    assert log.count("data wait 25 %") == 3
    assert log.count("warning: 25 % of the time since the last line was spent waiting for images: raise workers") == 1


def test_the_averaged_weights_are_kept(shared, whole):
    model, meta = weights.load(whole / "weights")
    config = make_config(shared)
    if meta["result"]["step"] != LAST:
        # The first evaluation was the better: its checkpoint is kept beside the newest.
        copy = whole.parent / "first"
        shutil.copytree(whole / "checkpoints", copy / "checkpoints")
        shutil.rmtree(copy / "checkpoints" / str(LAST))
        state = restored(config, copy).state
    else:
        state = restored(config, whole).state
    assert state.step == meta["result"]["step"]
    saved = Average(*nnx.split(model, nnx.Param, nnx.BatchStat)[1:])
    chex.assert_trees_all_equal(saved, state.average)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(saved.params, state.params)


def test_an_interrupted_run_continues_bit_for_bit(shared, whole, tmp_path, monkeypatch):
    traces, calls = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", traces.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traces.append("end"))
    shard_batch = loop.shard_batch

    def interrupting(batch, mesh):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return shard_batch(batch, mesh)

    monkeypatch.setattr(loop, "shard_batch", interrupting)
    config = make_config(shared)
    assert loop.fit(config, tmp_path).step == 5
    # The window is over: the rest of the run is not traced.
    assert loop.fit(config, tmp_path).finished
    assert traces == [str(tmp_path / "profile"), "end"]
    chex.assert_trees_all_equal(restored(config, tmp_path).state, restored(config, whole).state)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "weights" / name).read_bytes() == (whole / "weights" / name).read_bytes()
    with pytest.raises(InputError, match=r"ema_decay \(0.9 there, 0.0 now\)"):
        loop.fit(make_config(shared, ema_decay=0.0), tmp_path)


def test_evaluation_alone(shared, whole, tmp_path, monkeypatch):
    """Of the newest checkpoint, on the test images alone; the run is left as it was."""
    splits = []
    open_source = loop.open_source
    monkeypatch.setattr(loop, "open_source", lambda *given: splits.append(given[1]) or open_source(*given))
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    before = files(workdir)
    result = loop.fit(make_config(shared, eval_only=True), workdir)
    assert splits == ["test"]
    after = files(workdir)
    changed = {path.relative_to(workdir).name for path in after if after[path] != before.get(path)}
    assert before.keys() == after.keys() and changed == {"log.txt"}
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert (result.step, result.finished, result.best_accuracy) == (LAST, True, evaluation["accuracy"])
    assert evaluation["weights"] == f"averaged weights (ema_decay=0.9) after step {LAST}"
    assert f"{evaluation['weights']}: test accuracy" in (workdir / "log.txt").read_text()
    # The best weights, given to an empty workdir, give what they had when they were kept.
    best = weights.read_config(whole / "weights")[1]["result"]
    config = make_config(shared, eval_only=True, init_weights=str(whole), ema_decay=0.0)
    assert loop.fit(config, tmp_path / "new").best_accuracy == best["accuracy"]
    assert str(whole) in json.loads((tmp_path / "new" / "evaluation.json").read_text())["weights"]
    found = json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert (found["step"], found["loss"], found["images"]) == (0, best["loss"], 20)
    assert {path.name for path in files(tmp_path / "new")} == {"evaluation.json", "lock", "log.txt"}


def test_nothing_to_evaluate(shared, tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint, and init_weights names no weights"):
        loop.fit(make_config(shared, eval_only=True, init_weights=""), tmp_path)
    with pytest.raises(InputError, match="know 3 classes, but num_classes is 4"):
        loop.fit(make_config(shared, eval_only=True), tmp_path)
    with pytest.raises(InputError, match="num_classes is 5"):
        loop.fit(make_config(shared, eval_only=True, num_classes=5), tmp_path)


def test_train_py_draws_nothing_after_an_evaluation(tmp_path):
    root = Path(__file__).parents[2]
    script = f"""
import runpy, sys
from spiking_mlp_jax.train import loop
loop.fit = lambda *_: loop.Result(3, True, None)
config = "{root}/configs/fashion_mnist.py"
sys.argv = ["train.py", "--config", config, "--workdir={tmp_path}", "--config.eval_only=True"]
runpy.run_path("{root}/train.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("window", "steps", "traced"),
    [
        ("", range(5), []),
        ("1:3", range(6), [1, 3]),
        ("0:2", range(2), [0, "closed"]),
        ("1:3", range(2, 6), [2, 3]),
        ("1:3", range(3, 6), []),
        ("8:9", range(6), []),
    ],
)
def test_windows_of_the_profiler(monkeypatch, window, steps, traced):
    seen: list[Any] = []
    now: list[Any] = [None]
    said: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append(now[0]))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(now[0]))
    profiler = Profiler(parse_window(window), "folder", said.append)
    for step in steps:
        now[0] = step
        profiler.between_steps(step, np.zeros(1))
    now[0] = "closed"
    profiler.close()
    assert seen == traced and len(said) == bool(traced)


@pytest.mark.parametrize("text", ["5", "5:5", "6:5", "a:b", "-1:3", "1:2:3", ":", "1.0:2"])
def test_bad_windows(text):
    with pytest.raises(InputError, match="profile_steps"):
        parse_window(text)


def test_a_window_that_no_step_reaches_is_refused(shared, tmp_path):
    assert parse_window("", 5) is None
    assert parse_window("4:9", 5) == (4, 9)
    with pytest.raises(InputError, match=r'"5:9" begins after the run.s last step, 5'):
        parse_window("5:9", 5)
    with pytest.raises(InputError, match="last step, 2"):
        loop.fit(make_config(shared, max_steps=2, profile_steps="2:4"), tmp_path)
    assert not list(tmp_path.iterdir())
