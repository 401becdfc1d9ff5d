"""Generated pages of the documentation site; a hook of `mkdocs.yml`.

    notebooks/NAME.ipynb     a page of its cells and their committed outputs
    spiking_mlp_jax/**.py    a page of docstrings for each public module, filled in by mkdocstrings
    spiking-mlp --help       a page of all commands

A new module, command or notebook needs no change here. A page of docs/ that mkdocs.yml does not place goes under
"More".
"""

from __future__ import annotations

import argparse
import ast
import base64
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import spiking_mlp_jax as smlp

ROOT = Path(__file__).parents[1]
PACKAGE = "spiking_mlp_jax"
# Folders of the package, in reading order, and their titles.
TITLES = {
    "nn": "Neurons and layers",
    "models": "Networks",
    "data": "Data",
    "train": "Training",
    "deploy": "Deployment",
    "interop": "Exchange",
    "analysis": "Analysis",
    "sweep": "Sweeps",
    "utils": "Utilities",
    "": "Errors",
}
# Modules that are read first, in their order; others follow by name.
FIRST = (
    "surrogate",
    "neuron",
    "dynamics",
    "norm",
    "layers",
    "fused",
    "config",
    "spiking_mlp",
    "topology",
    "loop",
    "step",
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated pages to the navigation."""
    nav: list[Any] = config.nav or []
    notebooks = {title: page for page, title in ((_page(path), _title(path)) for path in notebook_files())}
    # Behind the how-to pages, and at the end.
    nav.insert(3, {"Notebooks": [{title: page} for title, page in notebooks.items()]})
    groups: list[Any] = [{"Commands": "reference/commands.md"}]
    for folder, modules in module_groups().items():
        pages = [{_short(path).removeprefix(f"{folder}."): _reference(path)} for path in modules]
        groups.append({_folder_title(folder): pages})
    placed = set(_pages(nav))
    others = [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in placed]
    if others:
        nav.append({"More": others})
    nav.append({"API reference": ["reference/index.md", *groups]})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path in notebook_files():
        for name, content in notebook_page(path).items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    files.append(File.generated(config, "reference/index.md", content=index_page()))
    for modules in module_groups().values():
        for path in modules:
            content = f"# {_short(path)}\n\n::: {_module(path)}\n"
            files.append(File.generated(config, _reference(path), content=content))
    return files


def module_groups() -> dict[str, list[Path]]:
    """Public modules of the package by folder, in reading order. Commands have their own page."""
    found: dict[str, list[Path]] = {folder: [] for folder in TITLES}
    first = {name: i for i, name in enumerate(FIRST)}
    files = (ROOT / PACKAGE).rglob("*.py")
    for path in sorted(files, key=lambda path: (len(path.parts), first.get(path.stem, len(first)), path)):
        folder, *rest = path.relative_to(ROOT / PACKAGE).parent.parts or ("",)
        # An __init__ counts where it defines something.
        defines = any(isinstance(x, ast.FunctionDef | ast.ClassDef) for x in ast.parse(path.read_text("utf-8")).body)
        hidden = folder == "cli" or (path.stem.startswith("_") and not (rest and defines))
        if not hidden:
            found.setdefault(folder, []).append(path)
    return {folder: modules for folder, modules in found.items() if modules}


def index_page() -> str:
    """The public names, then all modules by folder."""
    lines = ["# API reference", "", "Generated from docstrings.", "", "## `import spiking_mlp_jax as smlp`", ""]
    lines += ["| name | |", "|---|---|"]
    for name in dir(smlp):
        thing = getattr(smlp, name)
        if not (inspect.isfunction(thing) or inspect.ismethod(thing) or inspect.isclass(thing)):
            continue
        page = _reference(ROOT / (thing.__module__.replace(".", "/") + ".py")).removeprefix("reference/")
        lines.append(f"| [`smlp.{name}`]({page}#{thing.__module__}.{thing.__qualname__}) | {_first(thing.__doc__)} |")
    lines.append("")
    for folder, modules in module_groups().items():
        lines += [f"## {_folder_title(folder)}", "", "| module | |", "|---|---|"]
        for path in modules:
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            lines.append(f"| [{_short(path)}]({_reference(path).removeprefix('reference/')}) | {_first(text)} |")
        lines.append("")
    return "\n".join(lines)


def commands_page() -> str:
    """The help of `spiking-mlp` and of each of its commands."""
    os.environ["COLUMNS"] = "88"
    from spiking_mlp_jax.cli import main as cli

    parts = ["# Commands", "", "What `spiking-mlp --help` and `spiking-mlp COMMAND --help` print.", ""]
    for title, parser in _parsers("spiking-mlp", cli.make_parser()):
        parts += [f"## {title}", "", "```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(parts)


def notebook_files() -> list[Path]:
    """The notebooks, in the order of their numbers."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def notebook_page(path: Path) -> dict[str, str | bytes]:
    """A notebook as Markdown, and its figures as files beside it."""
    made: dict[str, str | bytes] = {}
    parts: list[str] = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            # In the repository pages lie in ../docs, on the site in the folder above.
            parts.append(source.replace("](../docs/", "](../"))
            continue
        parts.append(f"```python\n{source}\n```")
        for kind, content in _outputs(cell):
            if kind == "image/png":
                name = f"{path.stem}_{len(made) + 1}.png"
                made[name] = base64.b64decode(content)
                parts.append(f"![Output of the cell above]({name})")
            else:
                parts.append(f'<div class="output" markdown>\n\n```text\n{content.rstrip()}\n```\n\n</div>')
    parts.append(f"*This page is `notebooks/{path.name}` of the repository with its committed outputs.*")
    made[f"{path.stem}.md"] = "\n\n".join(parts) + "\n"
    return made


def _outputs(cell) -> Iterator[tuple[str, str]]:
    """What a cell printed and showed: a figure goes before its text."""
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            yield "text/plain", "".join(output["text"])
            continue
        data = output["data"]
        kind = "image/png" if "image/png" in data else "text/plain"
        yield kind, "".join(data[kind])


def _parsers(title: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """A parser and those of its commands."""
    yield title, parser
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for name, one in action.choices.items():
                yield from _parsers(name if title == "spiking-mlp" else f"{title} {name}", one)


def _pages(nav: Any) -> Iterator[str]:
    """All pages of a navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from _pages(entry)


def _title(path: Path) -> str:
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]
    return "".join(first).splitlines()[0].lstrip("# ")


def _page(path: Path) -> str:
    return f"notebooks/{path.stem}.md"


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _short(path: Path) -> str:
    return _module(path).removeprefix(f"{PACKAGE}.")


def _reference(path: Path) -> str:
    return f"reference/{_short(path).replace('.', '/')}.md"


def _folder_title(folder: str) -> str:
    return TITLES.get(folder, folder.replace("_", " ").capitalize())


def _first(docstring: str | None) -> str:
    """The first paragraph of a docstring, for a table."""
    return " ".join((docstring or "").split("\n\n")[0].split()).replace("|", "\\|")
