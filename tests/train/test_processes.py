"""Several real processes as one run, on CPUs: the same numbers as one process, and one end for all of them."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import chex
import jax
import numpy as np
import pytest

from spiking_mlp_jax.errors import EXIT_INTERRUPTED, EXIT_LOST, InputError, LostError
from spiking_mlp_jax.train import loop
from spiking_mlp_jax.train import runtime as processes
from spiking_mlp_jax.train.config import to_dict
from spiking_mlp_jax.utils.interrupt import StopRequest, out_of_reach
from tests.conftest import FLAGS
from tests.support.shades import forget_compiled, write_shades
from tests.train.test_loop import lines, make_config, restored

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 120  # seconds; a launch takes ten where nothing hangs
CONFIG = """
import json, pathlib
from spiking_mlp_jax.train.config import default_config


def get_config():
    config = default_config()
    config.update(json.loads((pathlib.Path(__file__).parent / "fields.json").read_text()))
    return config
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Images whose number no batch divides, and compiled programs that the launches share."""
    folder = tmp_path_factory.mktemp("shared")
    write_shades(folder, train=70, test=37, side=14)
    yield folder
    forget_compiled()


def experiment(shared, **fields):
    """Far longer than any test runs it, and the same in all tests, so that few programs are compiled."""
    return make_config(shared, **{"epochs": 1000, "log_every": 1, **fields})


def told(how, count, index, port):
    """How a process learns that it is one of several: arguments, and what a launcher leaves in the environment."""
    if how == "slurm":
        names = {"SLURM_JOB_ID": 7, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": count}
        numbers = {"SLURM_PROCID": index, "SLURM_LOCALID": index, "JAX_COORDINATOR_PORT": port}
    elif how == "openmpi":
        names = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": count}
        numbers = {"OMPI_COMM_WORLD_RANK": index, "OMPI_COMM_WORLD_LOCAL_RANK": index, "JAX_COORDINATOR_PORT": port}
    else:
        options = {"coordinator": f"localhost:{port}", "num_processes": count, "process_id": index}
        return [f"--{name}={value}" for name, value in options.items()], {}
    return [], {name: str(value) for name, value in {**names, **numbers}.items()}


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Launch:
    """The processes of one run, each with one or more virtual devices; all are gone when the block ends."""

    def __init__(self, config, workdir, count, devices=2, plots="no", how="flags", hang="", **apart):
        self.reports = [workdir.with_name(f"{workdir.name}-{index}.json") for index in range(count)]
        folder = workdir.with_name(f"{workdir.name}-config")
        folder.mkdir(exist_ok=True)
        (folder / "config.py").write_text(CONFIG)
        (folder / "fields.json").write_text(json.dumps(to_dict(config)))
        port = free_port()
        flags = [f"--xla_force_host_platform_device_count={devices}", *FLAGS[1:]]
        environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)}
        self.processes = []
        for index, report in enumerate(self.reports):
            arguments, launcher = told(how, count, index, port)
            command = [sys.executable, "-W", "ignore", ROOT / "tests" / "support" / "process_run.py", report, plots]
            command += ["--config", folder / "config.py", "--workdir", workdir, "--timeout", "10", *arguments]
            process = subprocess.Popen(
                [*map(str, command), *apart.get(f"process_{index}", ())],
                env={**environment, **launcher, "HANG": hang if index == 1 else ""},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait_for(self, text):
        """Reads what process 0 shows until there is this."""
        for line in self.processes[0].stdout:
            if text in line:
                return
        raise AssertionError(f"process 0 ended without {text!r}: {self.processes[0].communicate()[1]}")

    def end(self):
        """Exit code, output and messages of each."""
        said = [process.communicate(timeout=LIMIT) for process in self.processes]
        return [(process.returncode, *texts) for process, texts in zip(self.processes, said, strict=True)]


def run(*arguments, **options):
    with Launch(*arguments, **options) as launch:
        ends = launch.end()
    assert [code for code, *_ in ends] == [0] * len(ends), ends
    return ends, [
        {re.sub(r"\.\d+\.tmp$", "", name) for name in json.loads(report.read_text())} for report in launch.reports
    ]


def check_same(config, workdir, other):
    """Metrics, evaluations and states of two runs in float64."""
    for first, second in zip(lines(workdir), lines(other), strict=True):
        assert first.pop("split") == second.pop("split")
        # Firing rates are always summed in float32.
        rates = [line.pop("firing_rates", {}) for line in (first, second)]
        chex.assert_trees_all_close(*rates, rtol=1e-5, atol=1e-7)
        chex.assert_trees_all_close(first, second, rtol=1e-9, atol=1e-12)
    first, second = (json.loads((folder / "evaluation.json").read_text()) for folder in (workdir, other))
    assert first["images"] == 37 and first["confusion"] == second["confusion"]
    first, second = restored(config, workdir), restored(config, other)
    assert {leaf.dtype for leaf in jax.tree.leaves(first.state.params)} == {np.dtype("float64")}
    chex.assert_trees_all_close(first.state, second.state, rtol=1e-9, atol=1e-12)
    assert first.data == second.data


@pytest.fixture(scope="module")
def single(shared, tmp_path_factory):
    """One process with eight devices: its workdirs after one epoch of four steps, and after two."""
    folder = tmp_path_factory.mktemp("single")
    with jax.enable_x64(True):
        loop.fit(experiment(shared, max_steps=4), folder / "half")
        shutil.copytree(folder / "half", folder / "whole")
        assert loop.fit(experiment(shared, max_steps=8), folder / "whole").step == 8
    return folder / "half", folder / "whole"


def test_two_processes_continue_what_one_began(shared, single, tmp_path, x64):
    """They find each other as under Open MPI."""
    half, whole = single
    config = experiment(shared, max_steps=8)
    shutil.copytree(half, tmp_path / "one_two")
    ends, written = run(config, tmp_path / "one_two", 2, plots="yes", how="openmpi")
    check_same(config, tmp_path / "one_two", whole)
    assert "finished at step 8" in ends[0][1]
    assert "step" not in ends[1][1] and not written[1]
    assert {"log.txt", "metrics.jsonl", "config.json", "evaluation.json"} <= written[0]
    assert list((tmp_path / "one_two" / "plots").iterdir())


@pytest.mark.slow
def test_one_two_and_four_processes_are_the_same_run(shared, single, tmp_path, x64):
    """2 continue as 1, 2 as 4; they find each other as under SLURM and by flags."""
    half, whole = single
    config = experiment(shared, max_steps=8)
    begun = experiment(shared, max_steps=4)
    run(begun, tmp_path / "two", 2, how="slurm")
    check_same(begun, tmp_path / "two", half)
    shutil.copytree(tmp_path / "two", tmp_path / "two_one")
    loop.fit(config, tmp_path / "two_one")
    check_same(config, tmp_path / "two_one", whole)
    shutil.copytree(tmp_path / "two", tmp_path / "two_four")
    run(config, tmp_path / "two_four", 4, devices=1)
    check_same(config, tmp_path / "two_four", whole)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step(shared, tmp_path, x64):
    config = experiment(shared)
    with Launch(config, tmp_path / "run", 2) as launch:
        launch.wait_for("step 6/")
        launch.processes[1].send_signal(signal.SIGTERM)
        ends = launch.end()
    assert [code for code, *_ in ends] == [EXIT_INTERRUPTED] * 2, ends
    assert "interrupted: rerun the same command to resume" in ends[0][1]
    stopped = restored(config, tmp_path / "run")
    config.max_steps = int(stopped.state.step)
    loop.fit(config, tmp_path / "one")
    chex.assert_trees_all_close(stopped.state, restored(config, tmp_path / "one").state, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_takes_the_other_down(shared, tmp_path, victim):
    with Launch(experiment(shared), tmp_path / "run", 2) as launch:
        launch.wait_for("step 6/")
        launch.processes[victim].kill()
        ends = launch.end()
    code, _, message = ends[1 - victim]
    assert ends[victim][0] == -signal.SIGKILL
    # Usually gloo notices, sometimes the coordination service does first.
    assert code in (EXIT_LOST, -signal.SIGABRT), message
    assert "another process has ended" in message or "another task died" in message


@pytest.mark.slow
@pytest.mark.parametrize("hang, doing", [("reader", r"reading at step \d"), ("restore", "restoring")])
def test_a_process_that_hangs_is_named_by_all(shared, single, tmp_path, hang, doing):
    """Process 1 still lives and sends heartbeats."""
    shutil.copytree(single[0], tmp_path / "run")
    config = experiment(shared, deadlines="reading=4,restoring=8")
    with Launch(config, tmp_path / "run", 2, hang=hang) as launch:
        ends = launch.end()
    for code, _, message in ends:
        assert code == EXIT_LOST, ends
        where = r"\(.*hang in process_run.py:\d+ < \w+ in"
        found = re.search(rf"process 1 of 2 has been {doing} for \d+ s {where}", message)
        assert found, message
        assert hang == "restore" or "process 0 of 2" not in message


def test_who_has_not_started(capfd):
    """Two of four wait for the others, and then the last ones come."""
    port, late = free_port(), []

    def start(index, timeout=60.0):
        place = f"localhost:{port}", 4, index
        late.append(threading.Thread(target=processes.roll_call, args=(*place, timeout), kwargs={"patience": 0.2}))
        late[-1].start()

    start(1)
    said = wait_for_line(capfd, f"waiting for process 0 of 4 at localhost:{port}")
    start(0)
    said = wait_for_line(capfd, "waiting for processes 2, 3 of 4", said, times=2)  # both say it
    start(2)
    wait_for_line(capfd, "waiting for process 3 of 4", said, times=3)
    start(3)
    for thread in late:
        thread.join(60)
        assert not thread.is_alive()
    with socket.create_server(("localhost", port)):
        pass  # the port is free for JAX


def wait_for_line(capfd, line, said="", times=1):
    """What has been said when this line has been said that often."""
    deadline = time.monotonic() + 60
    while said.splitlines().count(line) < times:
        said += capfd.readouterr().err
        assert time.monotonic() < deadline, said
    return said


def test_some_never_start():
    place = f"localhost:{free_port()}", 3
    with pytest.raises(LostError, match=r"waiting for process 0 of 3 at localhost:\d+ has lasted too long"):
        processes.roll_call(*place, 2, 0.1, 0.05)
    with pytest.raises(LostError, match=r"waiting for processes 1, 2 of 3 has lasted too long"):
        processes.roll_call(*place, 0, 0.1, 0.05)
    with (
        socket.create_server(("", int(place[0].rpartition(":")[2]))),
        pytest.raises(InputError, match="cannot listen on"),
    ):
        processes.roll_call(*place, 0, 0.1, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("eval_only", [False, True])
def test_processes_that_differ_are_told(shared, tmp_path, eval_only):
    with Launch(experiment(shared, eval_only=eval_only), tmp_path / "run", 2, process_1=["--config.seed=1"]) as launch:
        ends = launch.end()
    for code, _, message in ends:
        assert code == 2 and "process 1 has another configuration than process 0" in message


@pytest.fixture
def calls(monkeypatch):
    """What jax.distributed.initialize is given; no launcher is in the environment."""
    found = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **named: found.append((arguments, named)))
    monkeypatch.setattr(processes, "roll_call", lambda *_: None)
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return found


def launcher(monkeypatch, size):
    for name, value in zip(processes.LAUNCHERS[1], (size, size - 1, 1), strict=True):
        monkeypatch.setenv(name, str(value))


def test_who_is_asked(calls, monkeypatch):
    processes.join("node1:1234", 4, 3, timeout=7)
    assert calls[-1][0] == ("node1:1234", 4, 3, None)
    assert calls[-1][1]["cluster_detection_method"] == "deactivate"
    assert calls[-1][1]["heartbeat_timeout_seconds"] == 7
    before = len(calls)
    processes.join()
    assert len(calls) == before  # no cluster: alone
    for name, value in told("slurm", 2, 1, 1234)[1].items():
        monkeypatch.setenv(name, value)
    processes.join()
    assert calls[-1][0] == (None,) * 4 and calls[-1][1]["cluster_detection_method"] is None
    for name in told("slurm", 2, 1, 1234)[1]:
        monkeypatch.delenv(name)
    launcher(monkeypatch, 8)
    processes.join("node1:1234")
    assert calls[-1][0] == ("node1:1234", 8, 7, 1)
    launcher(monkeypatch, 1)
    before = len(calls)
    processes.join()
    assert len(calls) == before


def test_jax_itself_finds_nothing_here(monkeypatch):
    """The real function: a process that is alone stays so, and Open MPI's later versions are asked for more."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    processes.join()
    assert not jax.distributed.is_initialized()
    for name, value in zip(processes.LAUNCHERS[0], (2, 0, 0), strict=True):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match=r"mpirun started 2 processes.*add --coordinator"):
        processes.join()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None, 2, 0), "need a coordinator"),
        (("node1", 2, 0), 'HOST:PORT, e.g. node1:12345, got "node1"'),
        (("node1:1", None, 0), "needs both numbers"),
        (("node1:1", None, None), "needs both numbers"),
        (("node1:1", 2, 2), "process_id must be below num_processes, which is 2, got 2"),
    ],
)
def test_impossible_settings(calls, arguments, message):
    with pytest.raises(InputError, match=message):
        processes.join(*arguments)
    assert not calls


def test_workers_are_out_of_reach():
    """A process started for the first item holds both signals back; this one gets what came meanwhile."""
    print_mask = "import signal; print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))))"

    def items():
        os.kill(os.getpid(), signal.SIGTERM)
        yield from (1, 2)

    def started():
        yield subprocess.run([sys.executable, "-c", print_mask], capture_output=True, text=True, check=True).stdout

    assert json.loads(*out_of_reach(started(), 1)) == [signal.SIGINT, signal.SIGTERM]
    assert json.loads(*out_of_reach(started(), 0)) == []
    with StopRequest() as stop:
        assert list(out_of_reach(items(), 1)) == [1, 2]
        assert stop.requested
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


@pytest.mark.parametrize(
    "error, code, message",
    [
        (InputError("a.jpg is no image"), 2, "error: a.jpg is no image (process 1 of 2)"),
        (LostError("waiting for process 3 of 4"), 5, "error: waiting for process 3 of 4"),
        (KeyboardInterrupt(), 130, "process 1 of 2 stopped"),
        (ValueError("Gloo all-reduce failed"), EXIT_LOST, "another process has ended"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory"), 1, "process 1 of 2 failed"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_ends_one_of_several_at_once(monkeypatch, capsys, error, code, message):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    processes.end_together(type(error), error, None)
    assert not codes  # a process that is alone goes the ordinary way
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    processes.end_together(None, None, None)
    assert not codes
    processes.end_together(type(error), error, None)
    assert codes == [code]
    assert message in capsys.readouterr().err
