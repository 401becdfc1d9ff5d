"""The notebooks run from top to bottom, show what is committed, and call the package and the figures beside them."""

import ast
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from scripts.run_notebooks import NOTEBOOKS, execute  # noqa: E402

LINES, BYTES = 12, 500_000
# What makes a notebook a program.
LOGIC = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.IfExp),
    *(ast.Try, ast.With, ast.ListComp, ast.SetComp),
)


def name(path):
    return path.stem


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell's outputs are: the kinds of data that it shows, and whether it printed."""
    return [sorted(output.get("data", {output.get("name", ""): ""})) for output in cell.outputs]


def test_there_are_notebooks():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i:02}" for i in range(1, len(NOTEBOOKS) + 1)]
    assert len(NOTEBOOKS) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_committed_notebook(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    text = path.read_text()
    assert len(text) < BYTES
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for place in (str(ROOT), "/home/", "/root/", "/work/", "/tmp/", "site-packages"):
        assert place not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_has_no_logic_of_its_own(path):
    for cell in code(nbformat.read(path, as_version=4)):
        lines = [line for line in cell.source.splitlines() if not line.startswith("%")]
        assert len(lines) <= LINES, cell.source
        found = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, LOGIC)]
        assert not found, cell.source


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_runs_and_shows_the_same(path):
    committed, now = nbformat.read(path, as_version=4), execute(path)
    for before, after in zip(code(committed), code(now), strict=True):
        # Nothing on stderr: no warning.
        assert kinds(before) == kinds(after), before.source
