"""The benchmark of reading images runs and prints every stage."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.input", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300)


@pytest.mark.slow
def test_every_stage_is_printed(tmp_path):
    (tmp_path / "some").mkdir()
    for number in range(3):
        image = np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / "some" / f"{number}.jpg")
    done = run(str(tmp_path), "--size=8", "--processes=1", "--turns=1", "--batches=2")
    assert done.returncode == 0, done.stderr
    rows = [
        line.strip("| ").split(" | ")
        for line in done.stdout.splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    names = [row[0] for row in rows]
    assert names[1:4] == ["decode", "decode, crop, flip", "+ RandAugment"]
    assert sum(name.startswith("batches through Grain") for name in names) == 4
    assert all(float(row[1].replace(",", "")) > 0 for row in rows[1:])
    costs = {row[0]: row[4] for row in rows if row[0].startswith("+ ")}
    assert len(costs) == 3 and all(cost.startswith(("+", "-")) for cost in costs.values())


def test_a_folder_without_images(tmp_path):
    done = run(str(tmp_path))
    assert done.returncode == 2 and "holds no .jpg" in done.stderr
