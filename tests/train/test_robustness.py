"""Runs that are killed, terminated, damaged, out of room or not finite: nothing is lost, and what happened is said."""

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiking_mlp_jax.data.pipeline import batch_records
from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.data.transforms import Augment
from spiking_mlp_jax.errors import EXIT_INTERRUPTED, InputError, NonFiniteError, StorageError
from spiking_mlp_jax.train import checkpoint, loop, nonfinite
from spiking_mlp_jax.train import step as step_module
from spiking_mlp_jax.train.checkpoint import MANIFEST, UNLISTED, Checkpoints, find_damage
from spiking_mlp_jax.train.config import to_dict
from spiking_mlp_jax.train.replay import replay
from spiking_mlp_jax.train.runtime import AHEAD
from spiking_mlp_jax.train.sharding import AXIS
from tests.support.killer import configuration
from tests.support.shades import forget_compiled, write_shades
from tests.train.test_loop import kept_steps, lines, restored

ROOT = Path(__file__).parents[2]
EPOCH = 8  # steps
# The slow tier kills this often.
KILLS = int(os.environ.get("ROBUSTNESS_KILLS", "100"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """64 training and 16 test images of 8 x 8; compiled programs are kept beside them."""
    folder = tmp_path_factory.mktemp("data")
    write_shades(folder, train=64, test=16, side=8, step=90)
    yield folder
    forget_compiled()


def make_config(data, **fields):
    config = configuration(data)
    config.update({"epochs": 2, "checkpoint_every": 0, **fields})
    return config


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of two epochs that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("whole")
    assert loop.fit(make_config(data), workdir).finished
    return workdir


def assert_same_run(config, first, second):
    ours, theirs = restored(config, first), restored(config, second)
    chex.assert_trees_all_equal(ours.state, theirs.state)
    assert ours.data == theirs.data and ours.progress == theirs.progress
    assert lines(first) == lines(second)
    for name in ("weights/model.safetensors", "evaluation.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("kills, sizes", [(4, "1"), pytest.param(KILLS, "1,2,4", marks=pytest.mark.slow)])
def test_killed_at_random_moments(data, tmp_path, kills, sizes):
    """Half of the times while a checkpoint is being written; with other numbers of processes in each life."""
    runs, resized = tmp_path / "runs", sizes != "1"
    # The forked children start faster so. In 64 bits, sums over other processes are the same to many digits.
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_ENABLE_X64": str(int(resized))}
    arguments = [sys.executable, ROOT / "tests" / "support" / "killer.py", data, runs, str(kills), sizes]
    done = subprocess.run(list(map(str, arguments)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert result["kills"] >= 0.9 * kills
    assert result["half_written"] >= (2 if resized else 1)
    # Nothing is lost but the steps since the last checkpoint.
    assert result["newest_checkpoint_at_each"] == sorted(result["newest_checkpoint_at_each"])
    config = configuration(data, kills)
    with jax.enable_x64(resized):
        assert restored(config, runs / "whole").state.step == config.epochs * EPOCH
        (assert_nearly_same_run if resized else assert_same_run)(config, runs / "whole", runs / "broken")
    assert not list((runs / "broken" / "checkpoints").glob("*tmp*"))
    assert not (runs / "broken" / "damaged").exists()


def assert_nearly_same_run(config, first, second):
    ours, theirs = restored(config, first), restored(config, second)
    chex.assert_trees_all_close(ours.state, theirs.state, rtol=1e-9, atol=1e-12)
    assert ours.data == theirs.data
    for one, other in zip(lines(first), lines(second), strict=True):
        assert (one["step"], one["split"]) == (other["step"], other["split"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9) and one["accuracy"] == other["accuracy"]


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_its_status(data, tmp_path):
    (tmp_path / "endless.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests' / 'support')!r})\nfrom pathlib import Path\n"
        f"from killer import configuration\n\ndef get_config():\n"
        f"    config = configuration(Path({str(data)!r}))\n    config.epochs, config.checkpoint_every = 10**6, 0\n"
        f"    config.log_every = 1\n    return config\n"
    )
    command = [sys.executable, "train.py", "--config", str(tmp_path / "endless.py"), "--workdir", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/"):
                break
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)  # the grace period
    assert process.returncode == EXIT_INTERRUPTED == 75
    (step,) = kept_steps(tmp_path / "run")
    assert f"interrupted: rerun the same command to resume at step {step} of" in said and "s after the signal" in said
    assert find_damage(loop.as_path(tmp_path / "run" / "checkpoints" / str(step))) is None


@pytest.mark.slow
def test_a_signal_ends_an_evaluation_which_is_made_up_for(data, whole, tmp_path, monkeypatch):
    config, shard_batch, calls = make_config(data, eval_batch_size=8), loop.shard_batch, []

    def interrupting(*arguments):
        calls.append(0)
        os.kill(os.getpid(), signal.SIGTERM)
        return shard_batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("spiking_mlp_jax.train.evaluate.shard_batch", interrupting)
        result = loop.fit(config, tmp_path)
    assert not result.finished and result.step == EPOCH and len(calls) == 1
    assert not (tmp_path / "evaluation.json").exists()
    assert loop.fit(config, tmp_path).finished
    assert [line["split"] for line in lines(tmp_path)] == [line["split"] for line in lines(whole)]
    ours, theirs = restored(config, tmp_path), restored(make_config(data), whole)
    chex.assert_trees_all_equal(ours.state, theirs.state)
    assert ours.progress == theirs.progress
    # The one that was made up for counts like every other.
    for step in ("8", "16"):
        found = [
            json.loads((run / "checkpoints" / step / "metrics" / "metrics").read_text()) for run in (tmp_path, whole)
        ]
        assert found[0] == found[1] and found[0]["accuracy"] > 0


def test_what_is_saved_is_what_it_was_then(data, whole, tmp_path, monkeypatch):
    gate, dumps = threading.Event(), json.dumps

    def late(value, *rest, **more):
        if (
            isinstance(value, dict)
            and "progress" in value
            and threading.current_thread() is not threading.main_thread()
        ):
            assert gate.wait(60)
        return dumps(value, *rest, **more)

    monkeypatch.setattr(json, "dumps", late)
    config = make_config(data)
    state, progress = restored(config, whole).state, {"window": {"loss": 0.5}}
    position = {"next_index": 16}
    checkpoints = Checkpoints(tmp_path / "checkpoints", to_dict(config), 2)
    checkpoints.save(state, position, progress)
    # The loop goes on with its own dicts while they are being written.
    progress["window"]["loss"], position["next_index"] = 1.5, 17
    gate.set()
    checkpoints.close()
    found = restored(config, tmp_path)
    assert found.progress == {"window": {"loss": 0.5}} and found.data == {"next_index": 16}


# --- damage


def damage(path, how):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0 if how == "cut" else 1
    path.write_bytes(content[: len(content) // 2] if how == "cut" else content)


def test_damage_to_any_file_is_named(whole, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(whole / "checkpoints" / "16", folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    listed = [path for path in files if str(path.relative_to(folder)) not in UNLISTED]
    assert sorted(str(path.relative_to(folder)) for path in listed) == sorted(
        json.loads((folder / MANIFEST).read_text())["files"]
    )
    assert any(path.stat().st_size > 1000 for path in listed)
    assert find_damage(loop.as_path(folder)) is None
    for path in [*listed, folder / MANIFEST]:
        content = path.read_bytes()
        for how in ("cut", "flip"):
            damage(path, how)
            found = find_damage(loop.as_path(folder))
            # A flipped bit in the manifest makes it disagree with the files, in a place that depends on the bit.
            assert found is not None
            assert path == folder / MANIFEST or str(path.relative_to(folder)) in found
            path.write_bytes(content)
        path.rename(tmp_path / "gone")
        if path.name != MANIFEST:
            assert "is missing" in (find_damage(loop.as_path(folder)) or "")
        (tmp_path / "gone").rename(path)
    assert find_damage(loop.as_path(folder)) is None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "flip"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(data, whole, tmp_path, capsys, how):
    shutil.copytree(whole, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    big = max((checkpoints / "16" / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    damage(big, how)
    config = make_config(data)
    assert loop.fit(config, tmp_path / "run").finished
    said = capsys.readouterr().out
    assert "resuming at step 8" in said
    assert f"the checkpoint of step 16 is damaged ({big.relative_to(checkpoints / '16')} " in said
    assert (tmp_path / "run" / "damaged" / "16" / MANIFEST).exists()
    assert_same_run(config, tmp_path / "run", whole)


def test_only_damaged_checkpoints_are_an_input_error(data, whole, tmp_path):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    for step in ("8", "16"):
        damage(tmp_path / "checkpoints" / step / "metrics" / "metrics", "cut")
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged \(16: metrics/metrics has .*; 8: "):
        loop.fit(make_config(data), tmp_path)
    assert kept_steps(tmp_path) == [8, 16]


def test_remains_of_a_deletion_are_removed(data, whole, tmp_path):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "8" / "run")
    assert restored(make_config(data), tmp_path).state.step == 16
    assert kept_steps(tmp_path) == [16] and not (tmp_path / "damaged").exists()


@pytest.mark.parametrize("moment", ["deleting", "writing", "done"])
def test_a_checkpoint_that_is_replaced_is_there_at_every_moment(data, whole, tmp_path, moment):
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(whole / "checkpoints", checkpoints)
    checkpoint._retain(loop.as_path(checkpoints / "16"))
    shutil.copytree(checkpoints / "16.retained", checkpoints / "8.retained.tmp")
    if moment != "done":
        shutil.rmtree(checkpoints / "16" / "run" if moment == "deleting" else checkpoints / "16")
    assert restored(make_config(data), tmp_path).state.step == 16
    assert {path.name for path in checkpoints.iterdir()} == {"8", "16"}
    assert find_damage(loop.as_path(checkpoints / "16")) is None


# --- no room


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's and TensorStore's threads
def test_a_full_disk(data, whole, small_disk):
    config, workdir = make_config(data, max_steps=EPOCH), small_disk / "run"
    assert loop.fit(config, workdir).finished
    config.max_steps = 0
    usage = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(usage.f_bavail * usage.f_frsize - 3 * 4096))
    with pytest.raises(StorageError, match=r"No space left.*") as error:
        loop.fit(config, workdir)
    assert "\n" not in str(error.value) and error.value.exit_code == 4
    assert kept_steps(workdir) == [EPOCH]
    assert find_damage(loop.as_path(workdir / "checkpoints" / str(EPOCH))) is None
    gc.collect()
    (small_disk / "ballast").unlink()
    assert loop.fit(config, workdir).finished
    assert_same_run(config, workdir, whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
def test_files_that_may_not_grow(data, whole, tmp_path):
    config = make_config(data, max_steps=EPOCH)
    assert loop.fit(config, tmp_path).finished
    config.max_steps = 0
    biggest = max(path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (biggest // 2, limits[1]))
    try:
        with pytest.raises(
            StorageError,
            match=r"checkpoint of step 16 could not be written .* resume from step 8, whose checkpoint is complete",
        ):
            loop.fit(config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()
    assert kept_steps(tmp_path) == [EPOCH]
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))
    assert loop.fit(config, tmp_path).finished
    assert_same_run(config, tmp_path, whole)


# --- NaN


def test_the_records_of_a_step(data):
    source = open_source("idx", "train", data)
    batches = loop.train_batches(
        source, batch_size=24, image_size=8, in_channels=1, augment=Augment(), seed=3, epochs=3
    )
    seen = []
    for step, batch in enumerate(batches, 1):
        indices = [entry["index"] for entry in batch_records(source, batch_size=24, seed=3, step=step)]
        np.testing.assert_array_equal([source[i]["label"] for i in indices], batch["label"])
        np.testing.assert_array_equal([source[i]["image"] for i in indices], batch["image"])
        seen.append(tuple(indices))
    assert len(set(seen)) == len(seen) == 6


@pytest.fixture
def poisoned(data, monkeypatch):
    """The loss of step 3 is NaN; the states that the training step was given and gave."""
    records = batch_records(open_source("idx", "train", data), batch_size=8, seed=0, step=3)
    wanted = jnp.array([open_source("idx", "train", data)[entry["index"]]["label"] for entry in records])
    make_loss, make_train_step, states = step_module.make_loss, loop.make_train_step, []

    def poisoned_loss(config):
        loss = make_loss(config)

        def of_one_device(logits, labels):
            first = jax.lax.axis_index(AXIS) * len(labels)
            mine = (labels == jax.lax.dynamic_slice_in_dim(wanted, first, len(labels))).all()
            return loss(logits, labels) * jnp.where(jax.lax.pmin(mine.astype(int), AXIS), jnp.nan, 1.0)

        return of_one_device

    def watched(*arguments):
        step = make_train_step(*arguments)

        def run(state, *rest):
            before = jax.device_get(state)
            new, metrics = step(state, *rest)
            states.append((before, jax.device_get(new)))
            return new, metrics

        return run

    monkeypatch.setattr(step_module, "make_loss", poisoned_loss)
    monkeypatch.setattr(loop, "make_train_step", watched)
    return records, states


@pytest.mark.slow
def test_a_loss_that_is_nan_stops_the_run_or_is_skipped(data, poisoned, tmp_path, capsys):
    records, states = poisoned
    config = make_config(data, epochs=1)
    for _ in range(2):  # the same command gets to the same point again
        with pytest.raises(NonFiniteError, match=r"the loss is nan .* at step 3, whose 8 images") as error:
            loop.fit(config, tmp_path / "stop")
        assert error.value.exit_code == 3
    assert kept_steps(tmp_path / "stop") == [2]
    entry = json.loads((tmp_path / "stop" / "nonfinite.jsonl").read_text().splitlines()[-1])
    assert entry["step"] == 3 and entry["loss"] == "nan" and entry["records"] == records
    saved = restored(config, tmp_path / "stop")
    assert saved.state.step == 2 and saved.progress["window"]["steps"] == 2
    # The steps after the bad one that had run before it was noticed have changed nothing either.
    assert len(states) == (3 + AHEAD) + (1 + AHEAD)
    for before, after in states[2:]:
        assert before.step == after.step == 2
        chex.assert_trees_all_equal(before, after, jax.device_get(saved.state))
    states.clear()
    config.on_nonfinite = "skip"
    assert loop.fit(config, tmp_path / "skip").finished
    assert "warning: step 3 was skipped: its loss is nan" in capsys.readouterr().out
    assert [int(after.step) for _, after in states] == list(range(1, 9))
    chex.assert_trees_all_equal(states[2][0].replace(step=0), states[2][1].replace(step=0))
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, states[3]), strict=True))
    found = lines(tmp_path / "skip")
    assert [line.get("skipped") for line in found] == [1, 0, None]
    assert np.isfinite(found[0]["loss"])
    # Going on after a stop is the same as having skipped.
    assert loop.fit(config, tmp_path / "stop").finished
    chex.assert_trees_all_equal(restored(config, tmp_path / "stop").state, restored(config, tmp_path / "skip").state)


@pytest.mark.slow
def test_skipping_without_end_ends(data, tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "MOST_IN_A_ROW", 3)
    config = make_config(data, learning_rate=1e38, on_nonfinite="skip")
    with pytest.raises(NonFiniteError, match=r"^3 steps in a row up to step \d+ were skipped, the last with loss"):
        loop.fit(config, tmp_path)
    assert len((tmp_path / "nonfinite.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{}, {"mixup": 0.4, "cutmix": 1.0, "accumulate": 2, "ema_decay": 0.9, "batch_size": 16}], ids=str
)
def test_replaying_a_step(data, tmp_path, fields):
    config = make_config(data, learning_rate=1e38, **fields)
    with pytest.raises(InputError, match=r"no step of .* had a loss that is not finite"):
        replay(tmp_path)
    with pytest.raises(NonFiniteError) as error:
        loop.fit(config, tmp_path)
    assert "replay" in str(error.value)
    entry = json.loads((tmp_path / "nonfinite.jsonl").read_text())
    before = sorted(path for path in tmp_path.rglob("*"))
    found = replay(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert found.step == entry["step"] == 2
    assert str(found.loss) == entry["loss"] or np.isclose(found.loss, float(entry["loss"]), rtol=1e-4)
    assert not np.isfinite(found.loss) or not np.isfinite(found.grad_norm)
    assert any("step 2: loss" in line for line in found.lines())
    assert to_dict(config)["on_nonfinite"] == "stop"
