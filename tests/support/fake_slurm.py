"""A Slurm of this machine: one script under the names of Slurm's commands, which runs jobs at once.

Files of FAKE_SLURM: N.sh the batch script of job N, N.pid its process, N.state its state when it has ended, N.requeue
where it shall run again. "fails" holds the state of jobs that do not run, "rejects" the error of sbatch.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path


def install(folder):
    """Makes the commands in a folder, which has to be on PATH and in FAKE_SLURM."""
    folder.mkdir()
    for name in ("sbatch", "srun", "sacct", "scancel", "scontrol"):
        (folder / name).write_text(f"#!{sys.executable}\n{Path(__file__).read_text()}")
        (folder / name).chmod(0o755)
    return folder


def sbatch(folder, script):
    if (folder / "rejects").exists():
        sys.exit((folder / "rejects").read_text())
    number = len(list(folder.glob("*.sh"))) + 1
    (folder / f"{number}.sh").write_text(Path(script).read_text())
    subprocess.Popen(
        [sys.executable, folder / "sbatch", "run", str(number)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    print(f"Submitted batch job {number}")


def run(folder, number):
    if (folder / "fails").exists():
        (folder / f"{number}.state").write_text((folder / "fails").read_text())
        return
    again = folder / f"{number}.requeue"
    while True:
        status = subprocess.run(
            ["bash", folder / f"{number}.sh"], env={**os.environ, "SLURM_JOB_ID": number}
        ).returncode
        if not again.exists():
            break
        again.unlink()
    state = folder / f"{number}.state"
    if not state.exists():
        state.write_text("FAILED" if status else "COMPLETED")


def srun(folder, *arguments):
    number = os.environ["SLURM_JOB_ID"]
    at = arguments.index("--output")
    with open(arguments[at + 1].replace("%j", number).replace("%t", "0"), "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    (folder / f"{number}.pid").write_text(str(os.getpid()))
    os.execvp(arguments[at + 2], arguments[at + 2 :])


def sacct(folder, *arguments):
    print("JobID|State|NodeList")
    for number in re.findall(r"-j (\d+)", " ".join(arguments)):
        state = folder / f"{number}.state"
        print(f"{number}|{state.read_text() if state.exists() else 'RUNNING'}|node")


def scancel(folder, number):
    (folder / f"{number}.state").write_text("CANCELLED by 0")
    os.kill(int((folder / f"{number}.pid").read_text()), signal.SIGTERM)


def scontrol(folder, command, number):
    assert command == "requeue"
    (folder / f"{number}.requeue").touch()


if __name__ == "__main__":
    name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    if arguments[:1] == ["run"]:
        name, arguments = "run", arguments[1:]
    globals()[name](Path(os.environ["FAKE_SLURM"]), *arguments)
