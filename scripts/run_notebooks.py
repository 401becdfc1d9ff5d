"""Run the notebooks and save their outputs.

    python -m scripts.run_notebooks [NOTEBOOK...]

Each runs in a fresh kernel and an empty folder, so that nothing of the machine gets into its outputs. Figures get few
colors, which makes their files a third as large.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLOURS = 96
RUN_LONG = ("02_train_and_ablate_time_steps", "03_receptive_fields", "05_from_checkpoint_to_every_format")


def execute(path: Path, seconds: int = 600) -> nbformat.NotebookNode:
    """A notebook with the outputs of running it now; the file stays as it is.

    Args:
        path: of the notebook.
        seconds: that a cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an exception.
    """
    notebook = nbformat.read(path, as_version=4)
    # The package and figures of this checkout, and one device even where tests have eight virtual ones. Where networks
    # only run a few times, compiling takes longer than running: compile fast, not fast code.
    flags = "--xla_backend_optimization_level=1"
    if path.stem not in RUN_LONG:
        flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    modules = os.pathsep.join((str(ROOT), str(path.resolve().parent)))
    environment = {**os.environ, "PYTHONPATH": modules, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TERM": "dumb"}
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=seconds, resources=where, record_timing=False, coalesce_streams=True)
        client.execute(env=environment)
    return notebook


def main(paths: list[Path]) -> None:
    """Run notebooks and write them back."""
    for path in paths:
        begun = time.monotonic()
        notebook = execute(path)
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    output["data"]["image/png"] = _smaller(output["data"]["image/png"])
        temporary = path.with_suffix(".tmp")
        nbformat.write(notebook, temporary)
        temporary.replace(path)
        print(f"{path.name}: {time.monotonic() - begun:.0f} s, {path.stat().st_size:,} bytes", flush=True)


def _smaller(png: str) -> str:
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    stream = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(stream, format="png", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or NOTEBOOKS)
