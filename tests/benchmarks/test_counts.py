"""No slower anywhere: counts that do not depend on the machine, against the recorded ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks" / "counts.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(
    jax.__version__ != RECORD["jax"],
    reason=f"counts are recorded for JAX {RECORD['jax']}, this is {jax.__version__}: on a commit whose counts are "
    "known to be good record them anew with python -m benchmarks.counts --record",
)
def test_nothing_has_grown():
    # The small network's training stands for the large one's, whose compilation takes minutes.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.counts", "--quick"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
