"""train.py in a process of its own, as one of several; run by test_processes.py.

    process_run.py REPORT PLOTS [arguments of train.py]

Writes the names of the files in the workdir, but for checkpoints, that this process has opened for writing to REPORT.
PLOTS "no" leaves out the plots, which take longer than everything else. HANG in the environment, "reader" or "restore",
is what never returns.
"""

import atexit
import json
import os
import pathlib
import runpy
import sys
import threading
import types

report, plots, *arguments = sys.argv[1:]
workdir = arguments[arguments.index("--workdir") + 1]
written = set()


def listen(event, details):
    if event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.path.relpath(str(details[0]), workdir)
        if not path.startswith((".", "checkpoints")):
            written.add(path)


if plots == "no":
    module = types.ModuleType("spiking_mlp_jax.analysis.plots")
    module.__dict__["plot_workdir"] = lambda _: None
    sys.modules[module.__name__] = module


def hang(*_, **__):
    threading.Event().wait()


if os.environ["HANG"] == "reader":
    from spiking_mlp_jax.train.logging import DataWait

    DataWait.next = hang
elif os.environ["HANG"] == "restore":
    from spiking_mlp_jax.train.checkpoint import Checkpoints

    Checkpoints.restore = hang

sys.addaudithook(listen)
atexit.register(lambda: pathlib.Path(report).write_text(json.dumps(sorted(written))))
train = pathlib.Path(__file__).parents[2] / "train.py"
sys.argv = [str(train), *arguments]
runpy.run_path(str(train), run_name="__main__")
