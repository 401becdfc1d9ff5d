"""One trainer for a workdir: a lock that the system releases with its process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.paths import is_remote

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    from etils import epath

LOCK = "lock"
BEAT = 10.0  # seconds between signs of life in an object store
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def locked(workdir: epath.Path | Path, beat: float = BEAT, doing: str = "training in") -> Iterator[None]:
    """Holds a workdir for this process alone; the file WORKDIR/lock names the host and the process.

    On a disk it is an flock, which the system releases with the process, however that ends. An object store has no
    locks: there the file is written again every `beat` seconds, and another trainer that finds one waits for 2.5 beats
    to see whether it changes. Two that start within the same second may both go on.

    Args:
        workdir: an existing folder.
        beat: for object stores.
        doing: what processes do in it, for the message.

    Raises:
        InputError: another process works there; the message names it.
    """
    with _claimed(workdir, beat) if is_remote(workdir) else _flocked(workdir, doing):
        yield


@contextlib.contextmanager
def _flocked(workdir, doing):
    if fcntl is None:
        yield
        return
    with open(workdir / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                file.seek(0)
                raise _taken(workdir, _parsed(file.read()), doing) from error
        else:
            file.truncate(0)
            json.dump(_holder(), file)
            file.flush()
        yield
        # The file stays: removing it would let a third process lock a new one beside a second, who waits for this one.
        file.truncate(0)


@contextlib.contextmanager
def _claimed(workdir, beat):
    file, mine = workdir / LOCK, _holder() | {"run": uuid.uuid4().hex}
    if before := _read(file):
        # A clean end removes the file. Whether its process lives cannot be seen from here, nor clocks be compared.
        print(f"waiting {2.5 * beat:.0f} s: {_who(before)} may still train in {workdir}", file=sys.stderr, flush=True)
        deadline = time.monotonic() + 2.5 * beat
        while (now := _read(file)) is not None and time.monotonic() < deadline:
            if now and now != before:
                raise _taken(workdir, now)
            time.sleep(beat / 10)
    stop = threading.Event()

    def live():
        count = 0
        while not stop.wait(beat):
            count += 1
            with contextlib.suppress(Exception):  # the store may be out of reach for a while
                file.write_text(json.dumps(mine | {"beat": count}))

    file.write_text(json.dumps(mine | {"beat": 0}))
    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(Exception):
            if (_read(file) or {}).get("run") == mine["run"]:
                file.unlink()


def _holder() -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": os.getpid()}


def _read(file) -> dict[str, Any] | None:
    try:
        return _parsed(file.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _parsed(text) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(found := json.loads(text), dict):
            return found
    return {}


def _who(holder) -> str:
    return f"process {holder.get('process', 'unknown')} on {holder.get('host', 'another host')}"


def _taken(workdir, holder, doing="training in") -> InputError:
    return InputError(f"{_who(holder)} is {doing} {workdir}: wait until it ends, stop it, or take another folder")
