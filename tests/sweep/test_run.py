"""Jobs of a sweep: limited, recorded when they fail, stopped together, and resumed after a kill of the parent."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from spiking_mlp_jax.cli.main import main
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.sweep import jobs
from spiking_mlp_jax.sweep import run as run_module
from spiking_mlp_jax.sweep.plan import load_sweep
from spiking_mlp_jax.sweep.run import SweepProgress, run_all
from spiking_mlp_jax.utils.interrupt import StopRequest
from tests.support import fake_slurm
from tests.sweep.test_plan import write_sweep

ROOT = Path(__file__).parents[2]


class Watcher:
    def __init__(self):
        self.shares, self.errors = {}, {}

    def started(self, key):
        self.shares[key] = [0.0]

    def at(self, key, share, line):
        self.shares[key].append(share)

    def ended(self, key, error):
        self.errors[key] = error


def run_fakes(monkeypatch, tmp_path, whats, workers, stop=None):
    """Runs fake children; what was told of them, whether all ended, and the watcher."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(jobs, "MODULE", "tests.support.fake_child")
    runs = {f"r{i}": {"init_weights": what, "tau": 2.0 + i} for i, what in enumerate(whats)}
    sweep = load_sweep(write_sweep(tmp_path, runs=runs, seeds=(0,)))
    watcher, told = Watcher(), {}

    def ended(run, error):
        told[run.name] = error

    stop = stop or StopRequest()
    whole = run_all("train", sweep.runs, tmp_path, (1,), workers, stop, watcher, ended)
    return told, whole, watcher


def test_failures_are_recorded_and_others_go_on(monkeypatch, tmp_path):
    told, whole, watcher = run_fakes(monkeypatch, tmp_path, ["fails", "", "dies", ""], 1)
    assert whole
    assert told["r0"] == "no weights there" and told["r1"] is None and told["r3"] is None
    assert told["r2"] is not None and told["r2"].startswith("killed by SIGKILL (out of memory?)")
    assert watcher.errors == {f"{name}/seed0": error for name, error in told.items()}
    assert max(watcher.shares["r1/seed0"]) == 0.75
    # One at a time: each starts when the one before has ended.
    assert (tmp_path / "notes.txt").read_text().split() == [
        *("start", "r0", "start", "r1", "end", "r1", "start", "r2", "start", "r3", "end", "r3")
    ]
    seen = json.loads((tmp_path / "runs/r1/seed0/seen.json").read_text())
    assert seen == {"cores": None, "told": None, "task": "train"}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not tell cores")
def test_workers_share_the_cores_and_are_no_more_than_allowed(monkeypatch, tmp_path):
    told, whole, _ = run_fakes(monkeypatch, tmp_path, [""] * 5, 2)
    assert whole and set(told.values()) == {None}
    running, most = 0, 0
    for word in (tmp_path / "notes.txt").read_text().split()[::2]:
        running += {"start": 1, "end": -1}[word]
        most = max(most, running)
    assert most == 2
    cores = os.sched_getaffinity(0)
    found = [json.loads((tmp_path / f"runs/r{i}/seed0/seen.json").read_text())["told"] for i in range(2)]
    assert all(group and set(group) <= cores for group in found)
    assert len(cores) < 2 or not set(found[0]) & set(found[1])


def test_groups_of_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 1, 5, 7, 9}, raising=False)
    assert run_module._core_groups(1) == [None]
    assert run_module._core_groups(2) == [[1, 3], [5, 7, 9]]
    assert run_module._core_groups(6) == [[1], [3], [5], [7], [9], [1]]


def test_a_stop_asks_every_child_once(monkeypatch, tmp_path):
    stop, notes = StopRequest(), tmp_path / "notes.txt"
    sleep = time.sleep

    def sleeping(seconds):
        sleep(0.02)
        if notes.exists() and notes.read_text().count("ready") == 2:
            stop.requested = True

    monkeypatch.setattr(time, "sleep", sleeping)
    told, whole, _ = run_fakes(monkeypatch, tmp_path, ["waits", "waits", ""], 2, stop)
    assert not whole and told == {}  # nothing is recorded of what was stopped, and the third has not begun
    lines = notes.read_text().splitlines()
    assert sorted(lines) == sorted(f"{what} r{i}" for what in ("start", "ready", "asked1") for i in range(2))


def test_an_exception_kills_the_children(monkeypatch, tmp_path):
    def looking(one, lines, progress):
        looking.job = one.job
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "_look", looking)
    with pytest.raises(KeyboardInterrupt):
        run_fakes(monkeypatch, tmp_path, ["waits"], 1)
    assert looking.job.returncode in (-signal.SIGKILL, -signal.SIGTERM)


def test_progress_tells_rate_and_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=200)
    progress = SweepProgress("training", {"a": 1.0, "b": 2.0, "c": 1.0}, console)
    with progress:
        progress.started("a")
        progress.started("b")
        now[0] = 1800.0
        progress.at("b", 0.25, "step 1/4")
        progress.ended("a", None)  # 1.5 of 4 parts in half an hour
        now[0] = 3600.0
        progress.ended("b", "it broke")
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "a: done  (1 of 3 runs, 2.0 runs/h, 50:00 left)" in text
    assert "b: FAILED: it broke  (2 of 3 runs, 1 failed, 2.0 runs/h, 20:00 left)" in text


# --- the whole command, with real trainings


def write_images(folder):
    """24 training and 12 test images of 8 x 8: three classes, darker and brighter."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label, name in enumerate(("dark", "grey", "light")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(40, size=(8, 8)) + 100 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")


def write_files(folder):
    write_images(folder / "images")
    (folder / "base.py").write_text(f"""
from spiking_mlp_jax.train.config import default_config

def get_config():
    config = default_config()
    config.update(
        dataset="folder", data_dir={str(folder / "images")!r}, image_size=8, in_channels=1, num_classes=3, patch_size=4,
        dim=4, depths=(1,), expansion=1, time_steps=2, mean=(0.5,), std=(0.25,), batch_size=8, eval_batch_size=12,
        epochs=16, log_every=3, host_memory="default",
        compilation_cache={str(folder / "cache")!r}, learning_rate=0.05,
    )
    return config
""")
    runs = {"t1": {"time_steps": 1}, "broken": {"init_weights": "nowhere"}, "layer": {"norm": "layer"}}
    return write_sweep(folder, base=str(folder / "base.py"), runs=runs, seeds=(0,), test_time_steps=(1, 2))


def start_command(arguments):
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; from spiking_mlp_jax.cli.main import main; sys.exit(main({arguments!r}))"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_and_resumed(tmp_path, monkeypatch, capsys):
    """Two runs and one that fails; the parent is killed while the first trains, and the command given again."""
    # One device and fast compilation in the children.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    file, out = write_files(tmp_path), tmp_path / "out"
    arguments = ["sweep", file, "--workdir", str(out)]
    first = out / "runs" / "t1" / "seed0"
    parent = start_command(arguments)
    while not list((first / "checkpoints").glob("[0-9]*")) and parent.poll() is None:
        time.sleep(0.02)
    parent.kill()
    assert parent.wait() == -signal.SIGKILL
    assert not (out / "results").exists()

    # At once: the training that lost its parent still holds the workdir, saves and ends, and the new one goes on.
    assert main([*arguments, "--workers", "2"]) == 1  # "broken" fails
    shown, err = capsys.readouterr()
    assert "broken/seed0: FAILED" in err and "nowhere" in err
    log = (first / "log.txt").read_text()
    assert "interrupted: rerun the same command to resume at step" in log and "resuming at step" in log
    assert log.count("finished at step 48 of 48") == 1
    assert sorted(str(path.relative_to(out / "results")) for path in (out / "results").rglob("*.json")) == [
        "broken/seed0.json", "layer/seed0.json", "t1/seed0.json"
    ]  # fmt: skip
    results = {name: json.loads((out / "results" / name / "seed0.json").read_text()) for name in ("t1", "layer")}
    for name, result in results.items():
        measured = result["measured"]
        evaluation = json.loads((out / "runs" / name / "seed0" / "evaluation.json").read_text())
        assert measured["accuracy"] == evaluation["accuracy"] and measured["step"] == 48
        assert measured["best_accuracy"] >= measured["accuracy"]
        assert measured["by_time_steps"][str(result["config"]["time_steps"])] == measured["accuracy"]
        assert 0 < measured["synaptic_operations"] < measured["dense_operations"]
        assert result["latency"]["float_ms"] > 0 and result["latency"]["batch"] == 12
    assert results["t1"]["measured"]["integer_accuracy"] is not None and results["t1"]["latency"]["integer_ms"] > 0
    assert "norm" in results["layer"]["measured"]["not_integer"] and results["layer"]["latency"]["integer_ms"] is None
    assert "| t1 | 1 |" in shown and "broken, seed 0 failed" in shown

    # Nothing of what is done is done again; what failed is.
    before = (out / "results" / "t1" / "seed0.json").stat().st_mtime_ns
    monkeypatch.setattr("spiking_mlp_jax.sweep.run.run_all", lambda task, runs, *_: calls.append((task, runs)) or True)
    calls = []
    assert main(arguments) == 1
    assert [(task, [run.name for run in runs]) for task, runs in calls] == [("train", ["broken"])]
    assert (out / "results" / "t1" / "seed0.json").stat().st_mtime_ns == before
    assert main([*arguments, "--retime"]) == 1
    assert [(task, [run.name for run in runs]) for task, runs in calls[1:]] == [
        ("train", ["broken"]),
        ("time", ["t1", "layer"]),
    ]
    assert main([*arguments, "--config.learning_rate=0.1"]) == 2
    assert "t1/seed0 (learning_rate: 0.05 there, 0.1 now)" in capsys.readouterr().err


# --- the same as Slurm jobs


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm of this machine: its folder, with NUMBER.pid, NUMBER.state and NUMBER.requeue of each job."""
    pytest.importorskip("submitit")
    folder = fake_slurm.install(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return folder


@pytest.mark.slow
def test_slurm_jobs_stop_requeue_and_outlive_the_command(tmp_path, monkeypatch, slurm, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    write_files(tmp_path)
    runs = {"t1": {"time_steps": 1}, "broken": {"init_weights": "nowhere"}}
    file = write_sweep(tmp_path, base=str(tmp_path / "base.py"), runs=runs, seeds=(0,), test_time_steps=(1, 2))
    out = tmp_path / "out"
    arguments = ["sweep", file, "--workdir", str(out), "--config.epochs=48", "--slurm", "time=10", "partition=x"]
    folder = out / "runs" / "t1" / "seed0"

    def checkpoints():
        return len(list((folder / "checkpoints").glob("[0-9]*")))

    def log():
        return (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""

    # Ctrl-C cancels the jobs, which save.
    command = start_command(arguments)
    wait_for(checkpoints)
    command.send_signal(signal.SIGINT)
    assert command.wait(20) == 75
    wait_for(lambda: "interrupted: rerun the same command to resume at step" in log())
    assert not (out / "results/t1").exists() and not (folder / "slurm_job.json").exists()
    assert "--partition=x" in (slurm / "1.sh").read_text() and "--time=10" in (slurm / "1.sh").read_text()

    # The command is killed; its job goes on, reaches its time limit, saves, is requeued and resumes.
    command = start_command(arguments)
    wait_for(lambda: log().count("resuming at step") == 1)
    before = checkpoints()
    wait_for(lambda: checkpoints() > before or "finished" in log())
    command.kill()
    command.wait()
    note = json.loads((folder / "slurm_job.json").read_text())
    os.kill(int((slurm / f"{note['job']}.pid").read_text()), signal.SIGUSR2)
    wait_for(lambda: log().count("resuming at step") == 2)

    # The next command attaches to it.
    submitted = len(list(slurm.glob("*.sh")))
    assert main(arguments) == 1
    shown, err = capsys.readouterr()
    assert "t1/seed0: done" in err and "broken/seed0: FAILED" in err and "nowhere" in err
    assert log().count("finished at step 144 of 144") == 1
    result = json.loads((out / "results/t1/seed0.json").read_text())
    assert result["measured"]["step"] == 144 and result["latency"]["float_ms"] > 0
    # One job of each training that was not running, and one of the timing.
    assert len(list(slurm.glob("*.sh"))) - submitted <= 2
    assert not list(out.rglob("slurm_job.json"))
    assert "| t1 | 1 |" in shown


@pytest.mark.slow
def test_slurm_s_own_failures_are_recorded(tmp_path, slurm):
    start = jobs.Slurm(tmp_path / "submitit", ["time=10", "--cpus-per-task=2", "exclusive"]).start
    message = {"workdir": str(tmp_path), "config": {}, "cores": None, "test_time_steps": [1]}
    (slurm / "fails").write_text("OUT_OF_MEMORY")
    job = start("train", message)
    script = (slurm / "1.sh").read_text()
    assert "#SBATCH --cpus-per-task=2" in script and "#SBATCH --exclusive\n" in script
    wait_for(lambda: job.poll() is not None)
    assert job.poll() == "Slurm reports OUT_OF_MEMORY" and not (tmp_path / "slurm_job.json").exists()
    assert run_module._error(job.poll(), ["step 3"]) == "Slurm reports OUT_OF_MEMORY; its last line: step 3"
    (slurm / "rejects").write_text("sbatch: error: invalid partition specified")
    with pytest.raises(InputError, match=r"sbatch rejected the job: .*invalid partition"):
        start("train", message)


def test_slurm_options_are_checked(tmp_path, monkeypatch, slurm):
    with pytest.raises(InputError, match="needs a time limit"):
        jobs.Slurm(tmp_path, ["partition=x"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="needs Slurm's srun"):
        jobs.Slurm(tmp_path, ["time=1"])
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=re.escape("pip install 'spiking-mlp-jax[slurm]'")):
        jobs.Slurm(tmp_path, ["time=1"])
