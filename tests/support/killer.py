"""Kills a training run again and again, and lets it finish: `python killer.py DATA WORKDIR KILLS SIZES`, prints JSON.

Importing JAX costs more than a life lasts here. This process imports everything, never touches a device, and forks the
processes of each life, as many as one of SIZES ("1,2,4") says, with as many devices in all as the largest; they share
compiled programs. Half of the kills wait for a save to begin; with several sizes a third are a SIGTERM, which lets the
processes save.
"""

import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from spiking_mlp_jax.errors import EXIT_INTERRUPTED, EXIT_LOST
from spiking_mlp_jax.train import loop, runtime
from spiking_mlp_jax.train.config import default_config

SUFFIX = ".orbax-checkpoint-tmp"
LEVEL = "--xla_backend_optimization_level=0"


def configuration(data, kills=0):
    """48 steps of 8 images or, to be killed more often, more; a checkpoint after each, an evaluation every 8."""
    config = default_config()
    config.update(
        dataset="idx", data_dir=str(data), image_size=8, in_channels=1, num_classes=3, patch_size=4, dim=4, depths=(1,),
        expansion=1, time_steps=1, mean=(0.5,), std=(0.25,), crop_padding=1, flip=True, batch_size=8,
        eval_batch_size=16, epochs=max(6, 1 + kills // 3), log_every=4, checkpoint_every=1,
        host_memory="default", compilation_cache=str(data / "cache"), optimizer="adam", learning_rate=0.01,
    )  # fmt: skip
    return config


def fork(config, workdir, size, devices):
    """The processes of a life, which train; their output goes to a file."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    children = []
    for index in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            log = os.open(workdir.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ["XLA_FLAGS"] = f"{LEVEL} --xla_force_host_platform_device_count={devices // size}"
            if size > 1:
                runtime.join(address, size, index, timeout=10)
            finished = loop.fit(config, workdir).finished
            runtime.leave()
            status = 0 if finished else EXIT_INTERRUPTED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return children


class Life:
    """The processes of a life, and the exit statuses of those that have ended."""

    def __init__(self, config, workdir, size, devices):
        self.running = fork(config, workdir, size, devices)
        self.statuses = []

    def ended(self):
        """Whether all have."""
        for child in [*self.running]:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                self.running.remove(child)
                self.statuses.append(os.waitstatus_to_exitcode(status))
        return not self.running

    def wait_for(self, condition):
        """Watches until the condition holds or all have ended."""
        while not self.ended() and not condition():
            time.sleep(0.0005)

    def kill(self, number):
        """Sends the signal to all, and waits for their ends."""
        for child in self.running:
            os.kill(child, number)
        deadline = time.monotonic() + 60
        self.wait_for(lambda: time.monotonic() > deadline)
        assert not self.running, "the processes outlive their signal"


def unfinished(workdir):
    """Saves that have begun and not ended: name and inode, because the next life may begin the same step again."""
    found = set()
    for path in (workdir / "checkpoints").glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def newest(workdir):
    """The newest checkpoint's step, or that of an older one that is being replaced; 0 without one."""
    names = [path.name.removesuffix(".retained") for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def until(life, how, workdir, before, draw, seconds):
    """Lets a life run until a moment of the given kind, or its end."""
    log = workdir / "log.txt"
    size = log.stat().st_size if log.exists() else 0
    if how == "start":
        span = 1.0
    else:
        life.wait_for(lambda: log.exists() and log.stat().st_size > size)
        if how == "save":
            life.wait_for(lambda: unfinished(workdir) - before)
        span = seconds / (60 if how == "save" else 8)
    deadline = time.monotonic() + draw.uniform(0, span)
    life.wait_for(lambda: time.monotonic() > deadline)


def main(data, workdir, kills, sizes):
    config, draw = configuration(data, kills), random.Random(0)
    workdir.mkdir(parents=True)
    whole, broken = workdir / "whole", workdir / "broken"
    started = time.monotonic()

    def finish(folder):
        life = Life(config, folder, 1, sizes[-1])
        life.wait_for(lambda: False)
        assert life.statuses == [0], folder.with_suffix(".out").read_text()

    finish(whole)
    seconds = time.monotonic() - started
    kinds = [("save", "any", "start")[k % 3] if k % 6 < 5 else "save" for k in range(kills)]
    done, half_written, at, at_work = [], 0, [], []
    for how in kinds:
        before = unfinished(broken)
        size = draw.choice(sizes)
        number = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)) if len(sizes) > 1 else signal.SIGKILL
        life = Life(config, broken, size, sizes[-1])
        until(life, how, broken, before, draw, seconds)
        if life.ended():
            assert life.statuses == [0] * size, broken.with_suffix(".out").read_text()
            break  # the run has ended: no more to kill
        life.kill(number)
        # A process that does not listen to signals yet dies of SIGTERM, and takes the others down.
        ends = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGABRT, EXIT_INTERRUPTED, EXIT_LOST, 0}
        assert set(life.statuses) <= ends, (life.statuses, broken.with_suffix(".out").read_text()[-3000:])
        at_work.append(size)
        done.append(how)
        half_written += bool(unfinished(broken) - before)
        at.append(newest(broken))
    finish(broken)
    counts = {how: done.count(how) for how in sorted(set(done))}
    result = {"kills": len(done), **counts, "half_written": half_written, "newest_checkpoint_at_each": at}
    result |= {"processes_at_each": at_work, "seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), [*map(int, sys.argv[4].split(","))])
