"""The benchmark of the host's work prints a row for each batch."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_rows():
    command = [sys.executable, "-m", "benchmarks.host", "--turns=1", "--steps=5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if " images of " in line]
    assert [row[0] for row in rows] == ["8 images of 8 x 8 x 1", "64 images of 32 x 32 x 3"]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows)
