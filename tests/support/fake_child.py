"""Stands for `spiking_mlp_jax.sweep.jobs`: does what `init_weights` of its configuration says, and notes when."""

import json
import os
import signal
import sys
import time
from pathlib import Path

message = json.loads(sys.stdin.readline())
folder = Path(message["workdir"])
notes = folder.parents[2] / "notes.txt"


def note(what):
    with open(notes, "a") as file:
        file.write(f"{what} {folder.parent.name}\n")


asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(0))
note("start")
cores = None if message["cores"] is None else sorted(os.sched_getaffinity(0))
(folder / "seen.json").write_text(json.dumps({"cores": cores, "told": message["cores"], "task": sys.argv[1]}))
print("step 3/4  epoch 1/1", flush=True)
what = message["config"]["init_weights"]
if what == "fails":
    print("Traceback\nerror: no weights there\nRuntimeError: said while the process ends\n", file=sys.stderr)
    sys.exit(2)
if what == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "waits":
    note("ready")
    while not asked:
        time.sleep(0.01)
    time.sleep(0.05)
    note(f"asked{len(asked)}")
    sys.exit(75)
# The first one waits for the second, if they may run at the same time.
deadline = time.monotonic() + 20
while notes.read_text().split().count("start") < 2 and time.monotonic() < deadline:
    time.sleep(0.01)
note("end")
