"""Print the sizes, import circles and call structure of the package.

    python -m scripts.structure [ROOT]

ROOT is a checkout; by default the one this file is in. Prints files and lines by folder, circles of imports (nested and
TYPE_CHECKING imports count), how many modules the training loop imports, and how many files of the package are entered
by one `predict` and by a training run of one step. Another ROOT must also be first on PYTHONPATH.
"""

from __future__ import annotations

import ast
import sys
import tempfile
import threading
from collections import defaultdict
from importlib import import_module
from pathlib import Path

PACKAGE = "spiking_mlp_jax"


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(root: Path) -> dict[str, set[str]]:
    """Modules of the package that each module imports, anywhere in its text.

    A name imported from a package's `__init__` counts as an import of the submodule of that name, if there is one.
    """
    known = modules(root)
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, file in known.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [target if target in known else node.module for target in targets]
            else:
                continue
            found[name] |= {target for target in targets if target in known and target != name}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    reached = {}
    for start in graph:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for target in graph[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        reached[start] = seen
    groups = {
        frozenset(m for m in reached[name] if name in reached[m]) | {name} for name in graph if name in reached[name]
    }
    return sorted(map(sorted, groups))


def entered(run) -> set[str]:
    """Files of the package whose functions are called while `run()` runs."""
    files: set[str] = set()

    def note(frame, event, _):
        if event == "call" and f"/{PACKAGE}/" in frame.f_code.co_filename:
            files.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # pyright: ignore[reportArgumentType]
    return files


def main(root: Path) -> None:
    """Print the tables."""
    count: dict[str, int] = defaultdict(int)
    lines: dict[str, int] = defaultdict(int)
    for file in modules(root).values():
        inside = file.relative_to(root / PACKAGE).parent
        count[str(inside)] += 1
        lines[str(inside)] += file.read_text().count("\n")
    print(f"{'folder':24} files  lines")
    for folder in sorted(count):
        print(f"{folder if folder != '.' else PACKAGE:24} {count[folder]:5d} {lines[folder]:6,d}")
    print(f"{'all':24} {sum(count.values()):5d} {sum(lines.values()):6,d}")
    graph = imports(root)
    found = circles(graph)
    print(f"\ncircles of imports: {len(found)}")
    for circle in found:
        print("  " + ", ".join(circle))
    loop = f"{PACKAGE}.train.loop"
    print(f"modules of the package that train/loop.py imports: {len(graph[loop])}")
    print(f"words of the README: {len((root / 'README.md').read_text().split()):,}")
    sys.path.insert(0, str(root))
    for name in graph:
        # Everything is imported first, so that only calls count.
        if not name.endswith("__main__"):
            import_module(name)

    def module(*names):
        for name in names:
            if f"{PACKAGE}.{name}" in graph:
                return import_module(f"{PACKAGE}.{name}")
        raise SystemExit(f"none of {names} is a module of the package")

    picture = str(root / "tests/data/fashion_ankle_boot.png")
    main_of_cli = module("cli.main", "cli").main
    print(
        f"files that one `predict` enters: {len(entered(lambda: main_of_cli(['predict', 'fashion_mnist', picture])))}"
    )
    config = module("train.config").default_config()
    with tempfile.TemporaryDirectory() as workdir:
        config.update(
            dim=6, depths=(1,), image_size=28, in_channels=1, num_classes=10, mean=(0.5,), std=(0.25,), time_steps=1,
            batch_size=8, max_steps=1, epochs=1, compilation_cache="off", host_memory="default",
        )  # fmt: skip
        files = entered(lambda: module("train.loop").train(config, workdir))
    print(f"files that a training run of one step enters: {len(files)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1])
