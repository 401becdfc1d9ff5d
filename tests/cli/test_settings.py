"""A small training and every command under JAX settings that users turn on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.killer import configuration
from tests.support.shades import forget_compiled, write_shades

ROOT = Path(__file__).parents[2]
STRICT = {
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_TRANSFER_GUARD": "disallow",
}
CONFIG = """
import json, pathlib
from spiking_mlp_jax.train.config import default_config


def get_config():
    config = default_config()
    config.update(json.loads((pathlib.Path(__file__).parent / "fields.json").read_text()))
    return config
"""
COMMANDS = """
train --config config.py --workdir run
train --config config.py --workdir run --config.eval_only=True
train --config config.py --config.dry_run=True
train --config config.py --workdir other --config.neuron=plif --config.dtype=bfloat16 --config.norm=tebn
evaluate run
predict run image.png
plot run
compile run -o net.smlp --images 16
evaluate net.smlp --against run
predict net.smlp image.png
audit run --folded
audit net.smlp --compiled
cost run --limit 8
cost net.smlp --limit 8 --data-dir data
export-c net.smlp -o net.c
pixels net.smlp image.png -o image.bin
convert run -o state.npz
hub run -o shared
export-stablehlo run -o net.stablehlo
export-onnx run -o net.onnx
export-onnx net.smlp -o integers.onnx
export-nir run -o net.nir
probe receptive-fields run -o fields --images 12 --noise 24 --gradients 4 --units 1 --covariances 1 --least 1
probe activity run -o activity --images 8
report run -o report.html --limit 8
"""
RUN_ALL = """
import sys
from spiking_mlp_jax.cli.main import main
for line in sys.stdin:
    status = main(line.split())
    print("STATUS", status, line, flush=True)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_shades(folder, train=64, test=16, side=8)
    yield folder
    forget_compiled()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [STRICT, {"JAX_ENABLE_X64": "1"}], ids=["strict", "x64"])
def test_every_command(data, tmp_path, settings):
    config = configuration(data)
    config.update({"epochs": 1, "checkpoint_every": 0, "host_memory": "auto"})
    (tmp_path / "fields.json").write_text(config.to_json())
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "data").symlink_to(data)
    Image.new("L", (9, 8), 100).save(tmp_path / "image.png")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    environment |= {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_COMPILATION_CACHE_DIR": str(data / "cache")}
    command = [sys.executable, "-c", RUN_ALL]
    done = subprocess.run(
        command, input=COMMANDS.strip(), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    lines = COMMANDS.strip().splitlines()
    ended = [line for line in done.stdout.splitlines() if line.startswith("STATUS ")]
    assert done.returncode == 0 and len(ended) == len(lines), done.stdout[-2000:] + done.stderr
    expected = {"audit run --folded": 1}
    assert ended == [f"STATUS {expected.get(line, 0)} {line}" for line in lines], done.stderr
