"""Where a run takes place: versions, and several processes that find each other, agree, and end together."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import socket
import sys
import time
import traceback
import zlib
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spiking_mlp_jax.errors import EXIT_LOST, InputError, LostError
from spiking_mlp_jax.utils.files import system_error
from spiking_mlp_jax.utils.interrupt import StopRequest
from spiking_mlp_jax.utils.watchdog import Watchdog

TIMEOUT = 60  # seconds
PATIENCE = 20  # seconds of waiting for the others before a message
AHEAD = 2  # steps that the host dispatches before it reads what the first of them gave

# Packages that results may depend on.
PACKAGES = (
    "spiking-mlp-jax jax jaxlib flax optax orbax-checkpoint grain numpy chex ml-collections "
    "tensorflow-datasets safetensors"
)
# What JAX computes in, and where its random numbers come from.
SETTINGS = ("jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable")
# Where launchers leave the number of processes, this one's number, and its number on this machine.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
)


def versions() -> dict[str, Any]:
    """Versions of Python, the platform and the packages that results may depend on; the devices and JAX's settings."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES.split():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    found["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return found | {name: getattr(jax.config, name) for name in SETTINGS}


def check_settings(file: epath.Path) -> None:
    """Refuses to resume a run under other settings of JAX than it began with: it would compute something else.

    Args:
        file: versions.json of the run. An earlier version wrote none of the settings.

    Raises:
        InputError: a setting differs.
    """
    try:
        saved = json.loads(file.read_text())
    except (OSError, ValueError):
        return
    for name in SETTINGS:
        now = getattr(jax.config, name)
        if saved.get(name, now) != now:
            raise InputError(
                f"the run in {file.parent} was trained with {name}={saved[name]}, now it is {now}: set "
                f"{name.upper()}={saved[name]}, or take another workdir"
            )


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = TIMEOUT,
    start_timeout: int = 300,
) -> None:
    """Makes this process one of a run's, if there are several; must come before JAX's devices are first used.

    Without arguments JAX looks for a cluster itself (TPU pod, SLURM, Open MPI 4), which costs nothing elsewhere: a
    process that is alone stays alone, with all of the machine's devices.

    Args:
        coordinator: "HOST:PORT", where process 0 listens and all others reach it; None: found by JAX.
        num_processes: how many there are; with a coordinator, None takes it from Open MPI or SLURM.
        process_id: which one this is, from 0; likewise.
        timeout: seconds of silence after which a process counts as dead, and the others end.
        start_timeout: seconds in which all processes have to start.

    Raises:
        InputError: impossible settings, or processes that do not start.
    """
    local_device_ids = None
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise InputError("num_processes and process_id need a coordinator: add --coordinator HOST:PORT")
        if _launched() == 1:
            return  # JAX would take one of the machine's GPUs where SLURM started one process
    else:
        if not re.fullmatch(r".+:\d{1,5}", coordinator):
            raise InputError(f'coordinator must be HOST:PORT, e.g. node1:12345, got "{coordinator}"')
        if num_processes is None and process_id is None:
            num_processes, process_id, local_device_ids = _launcher()
        if num_processes is None or process_id is None:
            raise InputError("a coordinator needs both numbers: add --num_processes N and --process_id I")
        if not 0 <= process_id < num_processes:
            raise InputError(f"process_id must be below num_processes, which is {num_processes}, got {process_id}")
    place = _meeting_point(coordinator, num_processes, process_id, start_timeout)
    if place is None:
        if "OMPI_COMM_WORLD_SIZE" in os.environ:
            raise InputError(
                f"mpirun started {os.environ['OMPI_COMM_WORLD_SIZE']} processes, but this version of Open MPI does "
                "not say where the first one is: add --coordinator HOST:PORT, with a free port of its machine"
            )
        return
    # JAX's own handling of SIGTERM is not used, see StopVote; it would only hide the signal from Python.
    jax.config.update("jax_enable_preemption_service", False)
    roll_call(*place, start_timeout)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids,
            cluster_detection_method=None if coordinator is None else "deactivate",
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except jax.errors.JaxRuntimeError as error:
        who = f"process {process_id} of {num_processes}" if coordinator else "this process"
        raise InputError(
            f"{who} cannot join the others ({_first_words(error)}): check that all were started, that "
            f"{coordinator or 'the first one'} can be reached from here, and that nothing else uses this port"
        ) from error


def _meeting_point(
    coordinator: str | None, count: int | None, index: int | None, timeout: int
) -> tuple[str, int, int] | None:
    """Where the processes meet, how many there are and which this one is; None: JAX will find no cluster."""
    if coordinator is None:
        from jax._src.clusters import ClusterEnv  # nothing public tells it before they have met

        find = ClusterEnv.auto_detect_unset_distributed_params
        coordinator, count, index, _ = find(None, None, None, None, None, timeout)
    return None if coordinator is None or count is None or index is None else (coordinator, count, index)


def roll_call(coordinator: str, count: int, index: int, timeout: float, patience: float = PATIENCE) -> None:
    """Waits until all processes have started, and says which have not; they meet at the port before JAX takes it.

    Args:
        coordinator: "HOST:PORT" of process 0.
        count: number of processes.
        index: this one's.
        timeout: seconds in which all have to start.
        patience: seconds between two messages.

    Raises:
        InputError: process 0 cannot listen there.
        LostError: some have not started in time.
    """
    host, port = coordinator.rsplit(":", 1)
    deadline = time.monotonic() + timeout
    if count > 1 and index == 0:
        _call_roll(int(port), count, deadline, patience)
    elif count > 1:
        _answer_roll((host.strip("[]"), int(port)), count, index, deadline, patience)


def _missing(numbers: list[int], count: int) -> str:
    listed = ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")
    return f"waiting for process{'es' if len(numbers) > 1 else ''} {listed} of {count}"


def _say_missing(text: str, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise LostError(f"{text} has lasted too long: start all processes within the same few minutes")
    print(text, file=sys.stderr, flush=True)


def _call_roll(port: int, count: int, deadline: float, patience: float) -> None:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=count)
    except OSError as error:
        raise InputError(
            f"process 0 of {count} cannot listen on port {port} ({error.strerror}): name a free one in --coordinator"
        ) from error
    present: dict[int, socket.socket] = {}
    news = time.monotonic() + patience
    with server:
        while len(present) < count - 1:
            server.settimeout(max(0.0, min(news, deadline) - time.monotonic()) + 0.01)
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                name, number = connection.recv(64).split()
                if name == b"spiking_mlp_jax":
                    present[int(number)] = connection
            except (OSError, ValueError):  # nobody came, or somebody else
                pass
            if time.monotonic() > min(news, deadline) and len(present) < count - 1:
                news += patience
                text = _missing([number for number in range(1, count) if number not in present], count)
                for connection in present.values():
                    with contextlib.suppress(OSError):  # it has ended, which it reports itself
                        connection.sendall(text.encode() + b"\n")
                _say_missing(text, deadline)
        for connection in present.values():
            with contextlib.suppress(OSError), connection:
                connection.sendall(b"all\n")
                connection.recv(1)  # they close first, so that the port is free at once


def _answer_roll(address: tuple[str, int], count: int, index: int, deadline: float, patience: float) -> None:
    news = time.monotonic() + patience
    while True:
        try:
            with socket.create_connection(address, timeout=patience) as connection:
                connection.sendall(b"spiking_mlp_jax %d\n" % index)
                connection.settimeout(2 * patience)
                for line in connection.makefile():
                    if line == "all\n":
                        return
                    news = time.monotonic() + patience
                    _say_missing(line.strip(), deadline)
        except OSError:  # process 0 has not started, or its machine is not known yet
            pass
        if time.monotonic() > min(news, deadline):
            news += patience
            _say_missing(_missing([0], count) + f" at {':'.join(map(str, address))}", deadline)
        time.sleep(0.1)


class _Board:
    """The store of JAX's coordination service, which process 0 holds; alone, a dict."""

    runs = 0  # every process makes as many: those of one run have the same number

    def __init__(self):
        # JAX does not offer the store under a public name.
        from jax._src import distributed

        self._client = distributed.global_state.client if jax.process_count() > 1 else None
        self._texts: dict[str, str] = {}
        _Board.runs += 1
        self._folder = f"spiking_mlp_jax/{self.runs}/"

    def post(self, name: str, text: str) -> None:
        if self._client is None:
            self._texts[name] = text
        else:
            self._client.key_value_set(self._folder + name, text, allow_overwrite=True)

    def read(self) -> dict[str, str]:
        if self._client is None:
            return dict(self._texts)
        return {name.rsplit("/", 1)[1]: text for name, text in self._client.key_value_dir_get(self._folder)}


def watchdog(deadlines: dict[str, float]) -> Watchdog:
    """Watches over the progress of all processes, which all call it; see `Watchdog`.

    Args:
        deadlines: from `spiking_mlp_jax.utils.watchdog.parse_deadlines`.
    """
    return Watchdog(deadlines, _Board(), jax.process_index(), jax.process_count(), lambda: _exit(EXIT_LOST))


def leave() -> None:
    """Waits for the other processes to get here, and disconnects; alone it does nothing.

    Raises:
        jax.errors.JaxRuntimeError: one of them has died.
    """
    jax.distributed.shutdown()


def check_alike(values: dict[str, Any]) -> None:
    """Refuses processes that were not started alike; all of them call it.

    Args:
        values: JSON values by name that must be the same in all of them.

    Raises:
        InputError: one is not; every process raises it.
    """
    if jax.process_count() == 1:
        return
    digests = [zlib.crc32(json.dumps(value, sort_keys=True).encode()) for value in values.values()]
    found = multihost_utils.process_allgather(np.array(digests, np.uint32))
    for name, column in zip(values, found.T, strict=True):
        others = np.flatnonzero(column != column[0])
        if others.size:
            raise InputError(
                f"process {others[0]} has another {name} than process 0: start all with the same command, the same "
                "data, and a workdir that all of them see"
            )


def union(numbers: set[int]) -> set[int]:
    """The numbers, below 2^31 and not negative, of all processes, which all call it."""
    if jax.process_count() == 1:
        return numbers
    most = int(multihost_utils.process_allgather(np.int32(len(numbers))).max())
    padded = np.full(most, -1, np.int32)
    padded[: len(numbers)] = sorted(numbers)
    return set(multihost_utils.process_allgather(padded).ravel().tolist()) - {-1}


def end_together(kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
    """Ends this process at once where an error would end one of several; for contextlib.ExitStack.push.

    The ordinary way out waits for the others, to finish a checkpoint and to disconnect, while they wait for this
    process in a collective operation. If it ends at once, its connections close, and the others end, too: at once on
    CPUs, where gloo notices, and elsewhere when its heartbeat has been missing for the timeout of `join`.
    """
    if error is None or jax.process_count() == 1:
        return
    who = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, OSError) and error.errno:
        error = system_error(error, "a file of the workdir")
    if isinstance(error, InputError):
        message, code = f"error: {error} ({who})", error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        message, code = (
            f"{who} stopped: rerun the same command to resume from the last checkpoint, if any",
            130,
        )
    elif _is_lost(error):
        reason = f"if a connection failed ({_first_words(error)}), another process has ended and reports why"
        message = f"error: {who} cannot go on: {reason}; rerun the same command to resume from the last checkpoint"
        code = EXIT_LOST
    else:
        message, code = "".join(traceback.format_exception(error)) + f"error: {who} failed", 1
    print(message, file=sys.stderr, flush=True)
    _exit(code)


def _exit(code: int) -> None:
    for child in multiprocessing.active_children():
        child.kill()  # the workers that read images
    os._exit(code)


class StopVote:
    """A request to stop that all processes see at the same step, whichever of them got the signal.

    Each step ends with a vote, one integer summed over all devices. Like a step's metrics, its result is fetched AHEAD
    steps later, so that the devices never wait for the host; therefore they stop that many steps later.

    Args:
        stop: the signals of this process.
    """

    def __init__(self, stop: StopRequest):
        self._stop = stop
        self._alone = jax.process_count() == 1
        self._seen, self._seen_at = False, 0.0
        self._votes: deque[jax.Array] = deque()
        mesh = Mesh(np.array(jax.devices()), ("device",))
        self._split = NamedSharding(mesh, PartitionSpec("device"))
        self._sum = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))

    @property
    def requested(self) -> bool:
        """Whether to stop: with several processes the same in all of them, and new only after `count`."""
        return self._stop.requested if self._alone else self._seen

    @property
    def since(self) -> float:
        """When the request came, by time.monotonic; in a process that got no signal, when it learned of it."""
        return self._stop.since or self._seen_at

    def count(self) -> None:
        """Starts this step's vote and reads an earlier one's; all processes call it after each step."""
        if self._alone:
            return
        if len(self._votes) == AHEAD:
            self._seen = bool(np.asarray(self._votes.popleft()) > 0)
            self._seen_at = time.monotonic()
        mine = np.full(jax.local_device_count(), self._stop.requested, np.int32)
        self._votes.append(self._sum(jax.make_array_from_process_local_data(self._split, mine)))


def _launched():
    """How many processes a launcher started, None without one."""
    return next((int(os.environ[names[0]]) for names in LAUNCHERS if all(x in os.environ for x in names)), None)


def _launcher():
    for names in LAUNCHERS:
        if all(name in os.environ for name in names):
            return tuple(int(os.environ[name]) for name in names)
    return None, None, None


def _is_lost(error):
    # What gloo raises is a ValueError where JAX waits for each program, as it does on CPUs with host_memory "keep".
    found = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    return found and "RESOURCE_EXHAUSTED" not in str(error)


def _first_words(error):
    return " ".join(str(error).split())[:200]
