"""Whole runs of a tiny network on eight devices: they learn, stop when told to, and continue bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict
from PIL import Image

import spiking_mlp_jax as smlp
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.train import loop
from spiking_mlp_jax.train.checkpoint import Checkpoints
from spiking_mlp_jax.train.config import default_config, model_config, to_dict
from spiking_mlp_jax.train.logging import read_metrics
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.state import abstract_state
from spiking_mlp_jax.utils.interrupt import StopRequest
from tests.support.shades import forget_compiled, write_shades
from tests.support.tiers import rest_slow

LAST = 12  # steps: 2 epochs of 6
SPEEDS = ("images_per_second", "data_wait_share", "data_wait_seconds")  # what differs between equal runs


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder of bright and dark images, and one where compiled programs are kept from test to test."""
    folder = tmp_path_factory.mktemp("shared")
    write_shades(folder, train=100, test=36, side=14)
    yield folder
    forget_compiled()


def make_config(shared, **fields):
    config = default_config()
    config.update(
        dataset="idx",
        data_dir=str(shared),
        image_size=16,
        in_channels=1,
        num_classes=3,
        dim=6,
        depths=(1, 1),
        expansion=2,
        time_steps=2,
        mean=(0.5,),
        std=(0.25,),
        crop_padding=1,
        flip=True,
        batch_size=16,
        eval_batch_size=16,
        epochs=2,
        log_every=4,
        host_memory="default",  # it would hold for all tests after this one
        compilation_cache=str(shared / "cache"),
    )
    config.update(fields)
    return config


class Watch:
    """Runs training; remembers every batch in order, and can send this process a signal at one of them."""

    def __init__(self, patch):
        self.seen, self.signal_at = [], 0
        self.shard_batch = loop.shard_batch
        patch.setattr(loop, "shard_batch", self)

    def __call__(self, batch, mesh):
        self.seen.append(batch["image"].tobytes() + batch["label"].tobytes())
        if len(self.seen) == self.signal_at:
            os.kill(os.getpid(), signal.SIGINT)
        return self.shard_batch(batch, mesh)


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory):
    """A run that nothing interrupts: its workdir and its batches."""
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        result = loop.fit(make_config(shared), workdir)
    assert result.finished and result.step == LAST
    return workdir, watch.seen


@pytest.mark.slow
def test_keeping_memory_changes_no_result(shared, tmp_path):
    """In processes of their own: what is kept is kept for good."""
    code = """
import json, sys
from spiking_mlp_jax.train import loop
from spiking_mlp_jax.train.config import default_config
config = default_config()
config.update(json.loads(sys.argv[1]))
assert loop.fit(config, sys.argv[2]).finished
"""
    lines = {}
    for choice in ("default", "auto"):
        config = json.dumps(to_dict(make_config(shared, host_memory=choice, epochs=1)))
        subprocess.run([sys.executable, "-c", code, config, str(tmp_path / choice)], check=True, capture_output=True)
        rows = map(json.loads, (tmp_path / choice / "metrics.jsonl").read_text().splitlines())
        lines[choice] = [{name: row[name] for name in row if name not in SPEEDS} for row in rows]
    assert lines["auto"] == lines["default"] and any("loss" in name for row in lines["auto"] for name in row)


@pytest.mark.slow
def test_each_step_is_compiled_once(shared, tmp_path):
    compiled = []

    def count(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        # A batch size of its own, so that no other test has compiled it.
        loop.fit(make_config(shared, batch_size=8), tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    for step in ("train_step", "eval_step"):
        assert sum(step in name for name in compiled) == 1, compiled


def restored(config, workdir):
    """The newest checkpoint, on one device."""
    _, abstract = abstract_state(model_config(config), make_optimizer(config, 6))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract)
    checkpoints = Checkpoints(workdir / "checkpoints", to_dict(config), config.keep)
    try:
        return checkpoints.restore(abstract)
    finally:
        checkpoints.close()


def lines(workdir):
    return [{k: v for k, v in line.items() if k not in SPEEDS} for line in read_metrics(workdir)]


def kept_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def test_what_a_run_leaves(shared, whole):
    workdir, seen = whole
    assert len(seen) == LAST and len(set(seen)) == LAST
    found = lines(workdir)
    assert [(line["step"], line["split"]) for line in found] == [
        (4, "train"), (6, "eval"), (8, "train"), (12, "train"), (12, "eval")
    ]  # fmt: skip
    assert found[-2]["loss"] < found[0]["loss"]
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert evaluation["step"] == LAST and evaluation["images"] == 36
    assert np.sum(evaluation["confusion"]) == 36
    config = make_config(shared)
    assert json.loads((workdir / "config.json").read_text()) == to_dict(config)
    assert json.loads((workdir / "versions.json").read_text())["jax"] == jax.__version__
    best = max(line["accuracy"] for line in found if line["split"] == "eval")
    model, meta = weights.load(workdir / "weights")
    assert model.config == model_config(config)
    assert meta["result"]["accuracy"] == best
    assert meta["data"]["class_names"] == ["0", "1", "2"]
    log = (workdir / "log.txt").read_text()
    assert "starting" in log and "finished at step 12 of 12" in log
    assert list((workdir / "tensorboard").iterdir())
    assert not list(workdir.glob("*.tmp"))


@pytest.mark.parametrize("at", rest_slow([5, 6]))
def test_an_interrupted_run_continues_bit_for_bit(shared, whole, watch, tmp_path, capsys, at):
    config = make_config(shared)
    watch.signal_at = at
    handler = signal.getsignal(signal.SIGINT)
    result = loop.fit(config, tmp_path)
    assert not result.finished and result.step == at
    assert signal.getsignal(signal.SIGINT) is handler
    assert kept_steps(tmp_path) == [at]
    assert "rerun the same command to resume at step" in capsys.readouterr().out
    # What a killed process may have written after its last checkpoint must not appear twice.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 8, "epoch": 1.3, "split": "train", "loss": 9.0}) + '\n{"step": 9, "ep')
    assert loop.fit(config, tmp_path).finished
    workdir, seen = whole
    assert watch.seen == seen
    first, second = restored(config, workdir), restored(config, tmp_path)
    assert first.state.step == LAST
    chex.assert_trees_all_equal(first.state, second.state)
    assert first.data == second.data and first.progress == second.progress
    assert lines(tmp_path) == lines(workdir)


@pytest.mark.slow
def test_a_penalised_run_from_given_weights_continues_bit_for_bit(shared, whole, watch, monkeypatch, tmp_path, capsys):
    """Both options at once; the weights are gone when the run goes on, because its checkpoint goes before them."""
    shutil.copytree(whole[0] / "weights", tmp_path / "weights")
    config = make_config(
        shared,
        init_weights=str(tmp_path / "weights"),
        activity_weight=0.5,
        activity_measure="synops",
        tau=1.5,
        epochs=1,
    )
    first_states = []
    make_train_step = loop.make_train_step

    def watched(*arguments):
        step = make_train_step(*arguments)

        def run(state, *rest):
            first_states.append(jax.device_get(state))
            return step(state, *rest)

        return run

    monkeypatch.setattr(loop, "make_train_step", watched)
    assert loop.fit(config, tmp_path / "one").finished
    assert f"starting from the weights of {tmp_path / 'weights'}" in capsys.readouterr().out
    _, params, stats = nnx.split(weights.load(tmp_path / "weights")[0], nnx.Param, nnx.BatchStat)
    assert first_states[0].step == 0
    chex.assert_trees_all_equal((first_states[0].params, first_states[0].stats), (params, stats))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(first_states[0].opt_state))
    train_lines = [line for line in lines(tmp_path / "one") if line["split"] == "train"]
    assert all(0 < line["activity"] < 1 for line in train_lines)
    assert f"activity {train_lines[-1]['activity']:.4f}" in (tmp_path / "one" / "log.txt").read_text()
    watch.seen.clear()
    watch.signal_at = 3
    assert loop.fit(config, tmp_path / "two").step == 3
    shutil.rmtree(tmp_path / "weights")
    assert loop.fit(config, tmp_path / "two").finished
    first, second = restored(config, tmp_path / "one"), restored(config, tmp_path / "two")
    chex.assert_trees_all_equal(first.state, second.state)
    assert first.data == second.data and first.progress == second.progress
    assert lines(tmp_path / "one") == lines(tmp_path / "two")


@pytest.mark.slow
def test_a_window_of_fewer_metrics_is_continued(shared, tmp_path):
    config = make_config(shared, activity_weight=0.5, max_steps=2, log_every=4, epochs=1, checkpoint_every=1)
    loop.fit(config, tmp_path)
    (tmp_path / "checkpoints" / "2" / "manifest.json").unlink()
    (run,) = (tmp_path / "checkpoints" / "2").glob("run/metadata")
    saved = json.loads(run.read_text())
    del saved["progress"]["window"]["activity"]
    run.write_text(json.dumps(saved))
    config.max_steps = 3
    assert loop.fit(config, tmp_path).step == 3
    assert lines(tmp_path)[-2]["activity"] > 0


@pytest.mark.slow
def test_the_newest_and_the_best_are_kept(shared, tmp_path, monkeypatch):
    accuracies = iter([0.9, 0.5, 0.7])

    class Fixed(loop.Evaluation):
        accuracy = property(lambda self: self.images)

    def fixed(*_):
        return Fixed(next(accuracies), 1.0, np.eye(3, dtype=int), {"x.spikes": 0.0})

    monkeypatch.setattr(loop, "evaluate", fixed)
    config = make_config(shared, epochs=3, checkpoint_every=2, keep=2)
    result = loop.fit(config, tmp_path)
    assert result.best_accuracy == 0.9
    assert kept_steps(tmp_path) == [6, 16, 18]
    assert weights.load(tmp_path / "weights")[1]["result"]["step"] == 6
    assert (tmp_path / "log.txt").read_text().count("x.spikes is silent") == 1


def test_a_finished_run_has_nothing_to_do(shared, whole, watch):
    workdir, _ = whole
    before = (workdir / "metrics.jsonl").read_text()
    assert loop.fit(make_config(shared, log_every=2), workdir).finished
    assert watch.seen == []
    assert (workdir / "metrics.jsonl").read_text() == before


def test_another_configuration_is_refused_by_name(shared, whole):
    workdir, _ = whole
    before = (workdir / "config.json").read_text()
    with pytest.raises(InputError, match=r"seed \(0 there, 1 now\).*tau \(2.0 there, 3.0 now\)"):
        loop.fit(make_config(shared, seed=1, tau=3.0), workdir)
    assert (workdir / "config.json").read_text() == before


def test_other_data_are_refused_or_taken_on_request(shared, whole, tmp_path, capsys):
    workdir, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(whole[0], workdir)
    other.mkdir()
    write_shades(other, train=100, test=30, side=14, step=91)
    config = make_config(shared, data_dir=str(other))
    different = "the training images differ in names, sizes or contents; 36 test images there, 30 now"
    with pytest.raises(InputError, match=f"the run in .*run has other data: {different}: use the same data, or set"):
        loop.fit(config, workdir)
    with pytest.raises(InputError, match="has other data: 36 test images there, 30 now: "):
        loop.fit(make_config(shared, data_dir=str(other), eval_only=True), workdir)
    config.allow_other_data = True
    assert loop.fit(config, workdir).finished
    assert f"has other data: {different}" in capsys.readouterr().out
    # The same files in another folder are the same data.
    shutil.copytree(shared, tmp_path / "moved")
    assert loop.fit(make_config(shared, data_dir=str(tmp_path / "moved")), workdir).finished
    # A checkpoint of an earlier version does not know its data.
    run = workdir / "checkpoints" / "12" / "run" / "metadata"
    saved = json.loads(run.read_text())
    del saved["progress"]["dataset"]
    run.write_text(json.dumps(saved))
    (workdir / "checkpoints" / "12" / "manifest.json").unlink()
    assert loop.fit(make_config(shared, data_dir=str(other)), workdir).finished
    saved["progress"]["epoch_steps"] = 12
    run.write_text(json.dumps(saved))
    with pytest.raises(InputError, match="12 steps an epoch, but this data has 6"):
        loop.fit(make_config(shared, data_dir=str(other)), workdir)
    assert "other data" not in capsys.readouterr().out


def test_other_settings_of_jax_are_refused(shared, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    file = tmp_path / "run" / "versions.json"
    versions = json.loads(file.read_text())
    assert versions["jax_enable_x64"] is False and versions["jax_default_prng_impl"] == "threefry2x32"
    for name, value in (("jax_enable_x64", True), ("jax_default_prng_impl", "rbg")):
        file.write_text(json.dumps(versions | {name: value}))
        with pytest.raises(InputError, match=f"was trained with {name}={value}, now it is .*: set {name.upper()}="):
            loop.fit(make_config(shared), tmp_path / "run")
    file.write_text(json.dumps({"jax": "0.10"}))  # of an earlier version
    assert loop.fit(FrozenConfigDict(make_config(shared)), f"file://{tmp_path}/run").finished


@pytest.mark.slow
def test_renamed_classes_are_named(shared, whole, tmp_path, capsys):
    for name in ("b", "c", "zebra"):
        for split in ("train", "test"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (14, 14)).save(tmp_path / "data" / split / name / f"{i}.png")
    shutil.copytree(whole[0] / "weights", tmp_path / "weights")
    file = tmp_path / "weights" / "config.json"
    meta = json.loads(file.read_text())
    assert meta["data"]["train"]["images"] == 100 and meta["data"]["test"]["digest"]
    meta["data"]["class_names"] = ["a", "b", "c"]
    file.write_text(json.dumps(meta))
    config = make_config(
        shared, dataset="folder", data_dir=str(tmp_path / "data"), init_weights=str(tmp_path / "weights"), batch_size=8
    )
    different = 'class 0 is "a" there, "b" now; class 1 is "b" there, "c" now; class 2 is "c" there, "zebra" now'
    with config.unlocked():
        config.eval_only = True
    with pytest.raises(InputError, match=f"the network in .* has other data: {different}"):
        loop.fit(config, tmp_path / "run")
    with pytest.raises(InputError, match=f"the network in .* has other data: {different}"):
        smlp.evaluate(tmp_path / "weights", "folder", tmp_path / "data")
    found = smlp.evaluate(tmp_path / "weights", "folder", tmp_path / "data", allow_other_data=True)
    assert found.images == 12
    config.eval_only = False
    config.max_steps = 1
    loop.fit(config, tmp_path / "run")
    assert f"warning: the head of init_weights is for other classes: {different}" in capsys.readouterr().out


@pytest.mark.parametrize("remat", [False, "none"])
def test_an_older_workdir_resumes(shared, whole, tmp_path, remat):
    workdir, _ = whole
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    run = tmp_path / "checkpoints" / "12" / "run" / "metadata"
    (tmp_path / "checkpoints" / "12" / "manifest.json").unlink()
    saved = json.loads(run.read_text())
    for name in ("neuron_backend", "activity_weight", "activity_measure", "init_weights"):
        del saved["config"][name]
    saved["config"]["remat"] = remat
    run.write_text(json.dumps(saved))
    assert restored(make_config(shared), tmp_path).state.step == LAST
    with pytest.raises(InputError, match=r'remat \("none" there, "block" now\)'):
        restored(make_config(shared, remat="block"), tmp_path)
    with pytest.raises(InputError, match=r'neuron_backend \("auto" there, "xla" now\)'):
        restored(make_config(shared, neuron_backend="xla"), tmp_path)
    with pytest.raises(InputError, match=r"activity_weight \(0.0 there, 0.5 now\)"):
        restored(make_config(shared, activity_weight=0.5), tmp_path)


def test_a_damaged_checkpoint_of_an_older_version_is_named(shared, whole, tmp_path):
    workdir, _ = whole
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "12" / "manifest.json").unlink()
    config = make_config(shared)
    run = tmp_path / "checkpoints" / "12" / "run" / "metadata"
    text = run.read_text()
    run.write_text(text[:100])
    with pytest.raises(InputError, match="checkpoints/12 cannot be read"):
        restored(config, tmp_path)
    run.write_text(text)
    shutil.rmtree(tmp_path / "checkpoints" / "12" / "state")
    with pytest.raises(InputError, match="checkpoints/12 cannot be read"):
        restored(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    assert restored(config, tmp_path).state.step == 6


def test_other_data_is_refused(shared, whole, tmp_path):
    workdir, _ = whole
    for path in shared.glob("t10k*"):
        for prefix in ("train", "t10k"):
            shutil.copy(path, tmp_path / path.name.replace("t10k", prefix))
    with pytest.raises(InputError, match="has other data: 100 training images there, 36 now"):
        loop.fit(make_config(shared, data_dir=str(tmp_path)), workdir)
    with pytest.raises(InputError, match="num_classes is 4"):
        loop.fit(make_config(shared, num_classes=4), workdir)


def test_a_workdir_that_cannot_be_made(shared, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="workdir"):
        loop.fit(make_config(shared), tmp_path / "file" / "run")
    with pytest.raises(InputError, match="compilation_cache"):
        loop.use_compilation_cache(str(tmp_path / "file" / "cache"))


@pytest.mark.slow
def test_a_run_continues_with_parameters_shared_out_otherwise(shared, tmp_path):
    fields = dict(dim=48, accumulate=2, norm_statistics="device")
    assert loop.fit(make_config(shared, fsdp=2, max_steps=2, **fields), tmp_path).step == 2
    network, _ = weights.load(tmp_path / "weights")
    assert network.config.dim == 48
    result = loop.fit(make_config(shared, fsdp=4, max_steps=4, **fields), tmp_path)
    assert result.step == 4 and result.finished


def test_the_second_signal_stops_at_once():
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_dry_runs_train_nothing(shared, tmp_path, watch, capsys):
    assert loop.fit(make_config(shared, dry_run=True), tmp_path / "none").step == 0
    assert not (tmp_path / "none").exists()
    assert "GMAC" in capsys.readouterr().out
    assert watch.seen == []


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.slow
def test_a_diverged_run_is_saved_but_never_the_best(shared, tmp_path, capsys):
    config = make_config(shared, learning_rate=1e38, optimizer="adam", max_steps=3, log_every=1, on_nonfinite="skip")
    result = loop.fit(config, tmp_path)
    assert result.finished and result.step == 3 and result.best_accuracy is None
    assert kept_steps(tmp_path) == [3]
    assert not (tmp_path / "weights").exists()
    assert "these weights are not saved" in capsys.readouterr().out
    found = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found[-1]["split"] == "eval" and found[-1]["loss"] is None
    assert strict((tmp_path / "evaluation.json").read_text())["loss"] is None
    assert read_metrics(tmp_path) == found
    config.max_steps = 2
    assert loop.fit(config, tmp_path).step == 3
    said = capsys.readouterr().out
    assert "already at step 3 (max_steps=2)" in said and "3 of 2" not in said


@pytest.mark.slow
def test_arrays(shared, tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 3
    images = (rng.integers(40, size=(48, 14, 14)) + 100 * labels[:, None, None]).astype(np.uint8)
    config = make_config(shared, max_steps=2)
    saved = to_dict(config)
    data = {"train_data": (images, labels), "test_data": (images[:20], labels[:20].tolist())}
    assert loop.fit(config, tmp_path, **data).step == 2
    assert to_dict(config) == saved, "the caller's configuration stays as it was"
    config.max_steps = 3
    with pytest.raises(InputError, match="the training images differ in names, sizes or contents"):
        loop.fit(config, tmp_path, **data | {"train_data": (images[::-1], labels)})
    with pytest.raises(InputError, match="dataset"):
        loop.fit(config, tmp_path)
    with pytest.raises(InputError, match="test_data is missing: pass train_data and test_data"):
        loop.fit(config, tmp_path, train_data=data["train_data"])
    assert loop.fit(config, tmp_path, **data).step == 3
    config.eval_only = True
    assert loop.fit(config, tmp_path, test_data=data["test_data"]).step == 3
    _, meta = weights.load(tmp_path / "weights")
    assert (meta["data"]["dataset"], meta["data"]["class_names"]) == ("arrays", ["0", "1", "2"])
