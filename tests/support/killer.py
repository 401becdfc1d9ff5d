"""Kills a training run again and again, and lets it finish: `python killer.py DATA WORKDIR KILLS SEED`, prints JSON.

Importing JAX costs more than a life lasts here. This process imports everything, never touches a device, and forks a
child for each life; the children share compiled programs. Half of the kills wait for a save to begin.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from spiking_mlp_jax.train import loop
from spiking_mlp_jax.train.config import default_config

SUFFIX = ".orbax-checkpoint-tmp"


def configuration(data, kills=0):
    """48 steps of 8 images or, to be killed more often, more; a checkpoint after each, an evaluation every 8."""
    config = default_config()
    config.update(
        dataset="idx", data_dir=str(data), image_size=8, in_channels=1, num_classes=3, patch_size=4, dim=4, depths=(1,),
        expansion=1, time_steps=1, mean=(0.5,), std=(0.25,), crop_padding=1, flip=True, batch_size=8,
        eval_batch_size=16, epochs=max(6, 1 + kills // 4), log_every=4, checkpoint_every=1,
        host_memory="default", compilation_cache=str(data / "cache"), optimizer="adam", learning_rate=0.01,
    )  # fmt: skip
    return config


def fork(config, workdir):
    """A child that trains; its output goes to a file, its status is 0 when the run has ended by itself."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(workdir.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 0 if loop.fit(config, workdir).finished else 3
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child):
    """The child's status, None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return status if pid else None


def wait_for(child, condition):
    """Watches until the condition holds or the child has ended; its status in that case."""
    while (status := ended(child)) is None and not condition():
        time.sleep(0.0005)
    return status


def unfinished(workdir):
    """Saves that have begun and not ended: name and inode, because the next life may begin the same step again."""
    found = set()
    for path in (workdir / "checkpoints").glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def kill(child, how, workdir, before, draw, seconds):
    """Lets a child run until a moment of the given kind, then kills it; its status when it ended before."""
    log = workdir / "log.txt"
    size = log.stat().st_size if log.exists() else 0
    if how == "start":
        deadline = time.monotonic() + draw.uniform(0, 1)
        status = wait_for(child, lambda: time.monotonic() > deadline)
    else:
        status = wait_for(child, lambda: log.exists() and log.stat().st_size > size)
    if status is None and how == "save":
        status = wait_for(child, lambda: unfinished(workdir) - before)
    if status is None:
        span = {"start": 0, "save": seconds / 60, "any": seconds / 8}[how]
        deadline = time.monotonic() + draw.uniform(0, span)
        status = wait_for(child, lambda: time.monotonic() > deadline)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return status


def main(data, workdir, kills, seed):
    config, draw = configuration(data, kills), random.Random(seed)
    workdir.mkdir(parents=True)
    whole, broken = workdir / "whole", workdir / "broken"
    started = time.monotonic()
    assert wait_for(fork(config, whole), lambda: False) == 0, whole.with_suffix(".out").read_text()
    seconds = time.monotonic() - started
    kinds = [("save", "any", "start")[k % 3] if k % 6 < 5 else "save" for k in range(kills)]
    done, half_written, at = [], 0, []
    for how in kinds:
        before = unfinished(broken)
        child = fork(config, broken)
        status = kill(child, how, broken, before, draw, seconds)
        if status is not None:
            assert status == 0, broken.with_suffix(".out").read_text()
            break  # the run has ended: no more to kill
        folder = broken / "checkpoints"
        done.append(how)
        half_written += bool(unfinished(broken) - before)
        at.append(max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0))
    assert wait_for(fork(config, broken), lambda: False) == 0, broken.with_suffix(".out").read_text()
    counts = {how: done.count(how) for how in sorted(set(done))}
    result = {"kills": len(done), **counts, "half_written": half_written, "newest_checkpoint_at_each": at}
    print(json.dumps(result | {"seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
