"""`spiking-mlp prepare` killed, stopped, run again and on full disks: the folder belongs to one set and ends whole."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.errors import InputError
from tests.support.archives import SYNSETS, encoded, train_files, train_tar
from tests.support.preparing import NAME, VERSION, command, listed, records, shards, write, write_archives

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    return write_archives(tmp_path_factory.mktemp("archives"))


# --- interruptions

KILLED = """
import os, signal, sys
from pathlib import Path
from spiking_mlp_jax.data.prepare import imagenet, records

sys.path.insert(0, {tests!r})
left = int(sys.argv[3])

def event(*_):
    # Each image, and each time a file gets its name: before it and after it.
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def replace(self, target, original=Path.replace):
    event()
    original(self, target)
    event()

Path.replace = replace
listing = imagenet.list_train(Path(sys.argv[1]), lambda *_: None)
records.prepare([listing], Path(sys.argv[2]), "imagenet2012", "5.1.0", jpeg_only=True, shard_bytes=6_000, workers=2,
                progress=event)
print(left)
"""


def test_killed_anywhere_it_ends_in_the_same_bytes(archives, tmp_path):
    def run(out, events):
        program = KILLED.format(tests=str(ROOT / "tests"))
        return subprocess.run(
            [sys.executable, "-c", program, str(archives / "train.tar"), str(out), str(events)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    whole = run(tmp_path / "whole", 10**6)
    assert whole.returncode == 0, whole.stderr
    events = 10**6 - int(whole.stdout)
    assert events > 40
    out, kills = tmp_path / "killed", 0
    # One folder is killed again and again until it is whole.
    rng, reference = np.random.default_rng(1), shards(tmp_path / "whole")
    while (done := run(out, int(rng.integers(2, 12)) + 2 * kills)).returncode == -signal.SIGKILL:
        kills += 1
        for name, data in shards(out).items():
            assert reference[name] == data, "never a half-written one under its name"
    assert done.returncode == 0, done.stderr
    assert kills >= 4
    # A late kill of a run that did everything else.
    late = tmp_path / "late"
    assert run(late, events - 2).returncode == -signal.SIGKILL
    assert run(late, 10**6).returncode == 0
    for folder in (out, late):
        assert shards(folder) == reference
        assert len(records(folder / NAME / VERSION, "train")) == 16
        for file in ("dataset_info.json", "features.json", "preparation/train.report.json"):
            path = Path(NAME) / VERSION / file
            assert (folder / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
        assert not list(folder.rglob("*.partial"))


def test_stopped_it_goes_on_with_what_is_missing(archives, tmp_path):
    listing, seen = listed(archives / "train.tar"), []
    stopped = write(listing, tmp_path, workers=1, progress=lambda *a: seen.append(a), stopping=lambda: len(seen) > 8)
    assert stopped is None
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"{NAME}/*/{NAME}-*")}
    assert before
    assert not (tmp_path / NAME / VERSION / "dataset_info.json").exists(), "readers do not see it yet"
    calls = []
    write(listing, tmp_path, progress=lambda *a: calls.append(a))
    assert calls[0][1:] > (0, 16), "the bar starts at what is there"
    assert max(calls) == ("train", 16, 16)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(records(tmp_path / NAME / VERSION, "train")) == 16


def test_ctrl_c_is_answered(archives, tmp_path, capsys, monkeypatch):
    from spiking_mlp_jax.data.prepare import records as module

    def interrupted(data, jpeg_only, original=module.checked):
        os.kill(os.getpid(), signal.SIGINT)
        return original(data, jpeg_only)

    arguments = ("imagenet", "--train", archives / "train.tar", "--partial", "--workers", 1, "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "checked", interrupted)
        # The main thread waits while a worker sends the first signal; a second would end it at once.
        patch.setattr(module, "ThreadPoolExecutor", InThisThread)
        assert command(*arguments) == 130
    assert "stopped: rerun the same command to resume" in capsys.readouterr().err
    assert command(*arguments) == 0
    assert "train: 16 images" in capsys.readouterr().out
    assert command(*arguments) == 0, "a finished set is recognised"


class InThisThread:
    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*arguments))
        return future


def test_a_lost_or_cut_shard_is_written_again(archives, tmp_path):
    listing = listed(archives / "train.tar")
    write(listing, tmp_path)
    reference = shards(tmp_path)
    first, second, *_ = sorted((tmp_path / NAME / VERSION).glob(f"{NAME}-*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:1000])
    write(listing, tmp_path)
    assert shards(tmp_path) == reference


# --- the folder belongs to one set


def test_other_inputs_into_the_same_folder_are_refused(archives, tmp_path, capsys):
    out, copy = tmp_path / "out", tmp_path / "copy.tar"
    arguments = ("imagenet", "--partial", "--out", out, "--train")
    assert command(*arguments, archives / "train.tar") == 0
    before = {path: path.stat().st_mtime_ns for path in out.glob(f"{NAME}/*/{NAME}-*")}
    shutil.copy(archives / "train.tar", copy)
    os.utime(copy, (1, 1))
    assert command(*arguments, copy) == 0, "the same archive elsewhere"
    assert {path: path.stat().st_mtime_ns for path in before} == before

    files = train_files()
    files[SYNSETS[0]][f"{SYNSETS[0]}_1.JPEG"] = encoded(9)
    copy.write_bytes(train_tar(files))
    capsys.readouterr()
    assert command(*arguments, copy) == 2
    message = capsys.readouterr().err
    assert f"holds train images prepared from another source than {copy}" in message
    assert "digest" in message
    with pytest.raises(InputError, match=r"other options \(shards 1 instead of \d+\)"):
        write(listed(archives / "train.tar"), out)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_split_can_follow_later(archives, tmp_path, capsys):
    out = tmp_path / "out"
    assert command("imagenet", "--partial", "--out", out, "--train", archives / "train.tar") == 0
    assert command("imagenet", "--partial", "--out", out, "--val", archives / "val.tar") == 0
    assert len(open_source(f"tfds:{NAME}", "train", out)) == 16
    assert len(open_source(f"tfds:{NAME}", "test", out)) == 6
    assert not {"train", "validation"} & {path.name for path in (out / NAME / VERSION).iterdir()}


def test_two_at_a_time_are_refused(archives, tmp_path):
    work = tmp_path / NAME / VERSION / "preparation"
    work.mkdir(parents=True)
    with open(work / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is preparing images in"):
            write(listed(archives / "train.tar"), tmp_path)


# --- disks


def test_too_small_a_disk_is_refused_at_once(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    with pytest.raises(InputError, match=r"has 0.0 GB free, but needs about 0.0 GB more"):
        write(listed(archives / "train.tar"), tmp_path)
    assert not shards(tmp_path)


def test_a_disk_that_fills_up_is_named_and_nothing_half_written_stays(archives, tmp_path):
    # A limit on the size of files stands for a full disk: write() fails in the same way.
    program = (
        "import resource, sys; from pathlib import Path; from spiking_mlp_jax.data.prepare import imagenet, records; "
        "listing = imagenet.list_train(Path(sys.argv[1]), print); "
        "import tensorflow_datasets; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "records.prepare([listing], Path(sys.argv[2]), 'imagenet2012', '5.1.0', jpeg_only=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(archives / "train.tar"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "InputError: cannot write" in done.stderr
    assert "File too large" in done.stderr
    assert not shards(tmp_path)
    assert not list(tmp_path.rglob("*.partial"))
    write(listed(archives / "train.tar"), tmp_path)
    assert len(records(tmp_path / NAME / VERSION, "train")) == 16
