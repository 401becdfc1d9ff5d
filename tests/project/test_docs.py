"""What the documentation says is run: examples in docstrings, Python blocks of pages, command lines."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest

from spiking_mlp_jax.cli import main as cli
from spiking_mlp_jax.cli import train
from tests.support.tiers import rest_slow

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "spiking_mlp_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# Those of nn/ first, which run in the fast tier.
EXAMPLES = sorted((path for path in FILES if ">>> " in path.read_text()), key=lambda path: "nn" not in path.parts)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def relative(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    return [text for found, text in FENCE.findall(path.read_text()) if found == language]


@pytest.mark.parametrize("path", rest_slow(EXAMPLES, fast=6), ids=relative)
def test_examples_in_docstrings(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    results = doctest.testmod(module)
    # doctest finds no docstring of what only looks like a function, and would say nothing.
    assert (results.failed, results.attempted) == (0, path.read_text().count(">>> "))


@pytest.mark.parametrize("path", rest_slow([path for path in PAGES if blocks(path, "python")]), ids=relative)
def test_python_blocks_run(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    names: dict = {}
    for block in blocks(path, "python"):
        exec(compile(block, relative(path), "exec"), names)
        printed = iter(capsys.readouterr().out.splitlines())
        # What a comment behind a print says is what it prints, up to an explanation behind a colon.
        for said in re.findall(r"^print\(.*\)  # (.*)$", block, re.M):
            assert said.partition(": ")[0] in next(printed)


def commands(path):
    """Command lines of a page's blocks, continuation lines joined, comments left out."""
    for block in blocks(path, "sh") + blocks(path, "bash"):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def commands_of(parser):
    """The commands of a parser by name."""
    return {
        name: one
        for action in parser._actions
        if isinstance(action.choices, dict)
        for name, one in action.choices.items()
    }


def command_of(words):
    """The parser of the innermost command that words name, and the words that follow its name."""
    parser = cli.make_parser()
    while words and words[0] in commands_of(parser):
        parser, words = commands_of(parser)[words[0]], words[1:]
    return parser, words


def options(parser):
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_command_lines_are_understood(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for program, *words in commands(path):
        if program == "spiking-mlp":
            cli.make_parser().parse_args([word for word in words if not word.startswith("--config.")])
        elif words[:1] == ["train.py"]:
            train.experiment(*train.parser().parse_known_args(words[1:]))
        elif program == "python" and words[0] == "-m":
            assert importlib.util.find_spec(words[1]), words


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_commands_in_sentences_exist(path):
    text = FENCE.sub("", path.read_text())
    for span in re.findall(r"`([^`]+)`", text):
        for line in span.split(";"):
            words = line.split()
            if words[:1] != ["spiking-mlp"] or len(words) < 2 or words[1].startswith("-") or words[1] == "COMMAND":
                continue
            parser, rest = command_of(words[1:])
            # A command that has commands of its own has been given one, too.
            assert len(rest) < len(words) - 1 and (not commands_of(parser) or not rest), line
            used = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
            assert {option for option in used if not option.startswith("--config.")} <= options(parser), line


def test_everything_public_has_a_docstring():
    missing = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        if tree.body and not ast.get_docstring(tree):
            missing.append(relative(path))
        missing += [f"{relative(path)}: {name}" for name in undocumented(tree, "") if not inherited(path, name)]
    assert not missing


def inherited(path, name):
    """Whether a method overrides a documented one."""
    if "." not in name:
        return False
    found = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for part in name.split("."):
        found = getattr(found, part)
    return bool(inspect.getdoc(found))


def undocumented(tree, prefix):
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        overload = any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)
        if not ast.get_docstring(node) and not overload:
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node, f"{prefix}{node.name}.")


def test_the_reader_of_commands_finds_them():
    parser, rest = command_of(["compile", "fashion_mnist", "--bits", "4"])
    assert rest == ["fashion_mnist", "--bits", "4"]
    assert {"--bits", "-o", "--output"} <= options(parser)
