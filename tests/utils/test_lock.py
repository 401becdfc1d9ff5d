"""One trainer for a workdir: refused while its process lives, free as soon as it has ended, by kill -9, too."""

import json
import os
import subprocess
import sys

import pytest
from etils import epath

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils import lock
from spiking_mlp_jax.utils.lock import LOCK, locked

HOLD = """
import sys
from pathlib import Path
from spiking_mlp_jax.utils.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the workdir."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_refused_with_host_and_process(tmp_path, other):
    host = os.uname().nodename
    with (
        pytest.raises(InputError, match=f"^process {other.pid} on {host} is training in {tmp_path}: "),
        locked(tmp_path),
    ):
        pass


@pytest.mark.parametrize("how", ["kill", "end"])
def test_it_is_free_when_the_process_has_ended(tmp_path, other, how):
    if how == "kill":
        other.kill()
        other.wait()
    else:
        other.communicate()
    with locked(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} on"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A folder that counts as an object store."""
    monkeypatch.setattr(lock, "is_remote", lambda path: True)
    return epath.Path(tmp_path)


def test_a_trainer_with_signs_of_life_in_an_object_store_is_not_disturbed(remote):
    with locked(remote, beat=0.01):
        with pytest.raises(InputError, match=f"process {os.getpid()} on "), locked(remote, beat=1):
            pass
        assert (remote / LOCK).exists()
    assert not (remote / LOCK).exists()


def test_one_that_has_died_in_an_object_store_is_replaced(remote, capsys):
    (remote / LOCK).write_text(json.dumps({"host": "elsewhere", "process": 1, "beat": 3}))
    with locked(remote, beat=0.02):
        pass
    assert "process 1 on elsewhere may still train in" in capsys.readouterr().err
    assert not (remote / LOCK).exists()
