"""Imports of the package point one way, in the order of its layers, and never in a circle."""

from pathlib import Path

import pytest

from scripts.structure import PACKAGE, circles, imports, modules

ROOT = Path(__file__).parents[2]
# Each layer imports itself and those before it.
LAYERS = ("errors", "utils", "nn", "models", "data", "train", "deploy", "interop", "analysis", "sweep", "cli")
# Layers that a later one must not import all the same: what is deployed needs no trainer.
FORBIDDEN = {"models": {"data"}, "deploy": {"train"}}


@pytest.fixture(scope="module")
def graph():
    return imports(ROOT)


def layer(module):
    return module.split(".")[1] if "." in module else None


def test_the_rooms():
    top = {path.stem for path in (ROOT / PACKAGE).iterdir() if path.name != "__pycache__"}
    assert top == {"__init__", "__main__", *LAYERS}
    for folder in {file.parent for file in modules(ROOT).values()}:
        assert len(list(folder.glob("*.py"))) <= 17, folder


def test_no_circles(graph):
    assert circles(graph) == []


def test_imports_point_one_way(graph):
    for module, targets in graph.items():
        if module in (PACKAGE, f"{PACKAGE}.__main__"):
            continue
        here = layer(module)
        for target in targets:
            there = layer(target)
            if there is None:
                continue  # the version, from the package itself
            assert LAYERS.index(there) <= LAYERS.index(here), f"{module} imports {target}"
            assert there not in FORBIDDEN.get(here, ()), f"{module} imports {target}"


def test_the_check_finds_what_is_planted():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert circles(graph) == [["a", "b", "c"]]
