"""The wheel and the sdist, built as for publishing, and the demo run from the wheel's files alone."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import spiking_mlp_jax
from spiking_mlp_jax.cli import main as cli
from spiking_mlp_jax.models import weights

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
VERSION = spiking_mlp_jax.__version__


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), built offline from this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def files_of(folder):
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    wheel, _ = built
    assert wheel.name == f"spiking_mlp_jax-{VERSION}-py3-none-any.whl"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    configs = {f"spiking_mlp_jax/{name}" for name in files_of("configs")}
    assert "spiking_mlp_jax/configs/sweeps/norm.py" in configs
    assert names == files_of("spiking_mlp_jax") | configs
    assert wheel.stat().st_size < 20e6


def test_the_wheel_says_what_it_is(built):
    with zipfile.ZipFile(built[0]) as wheel:
        info = f"spiking_mlp_jax-{VERSION}.dist-info"
        metadata = wheel.read(f"{info}/METADATA").decode()
        assert wheel.read(f"{info}/entry_points.txt").decode().split() == [
            *("[console_scripts]", "spiking-mlp", "=", "spiking_mlp_jax.cli.main:main")
        ]
        # Our licence, and that of the data in the package.
        licences = {name for name in wheel.namelist() if name.startswith(f"{info}/licenses/")}
        assert len(licences) == 2
    assert f"\nVersion: {VERSION}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata
    # Nothing that only development needs is asked of users.
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert any("jax" in line for line in needed)
    assert not [line for line in needed if re.search("pytest|torch|onnx|mkdocs|hypothesis", line)]


def test_the_sdist_is_enough_to_test_and_build_from(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("spiking_mlp_jax", "tests", "configs", "docs", "scripts", "benchmarks"):
        assert files_of(folder) <= names
    for name in (
        ".ci/run",
        ".github/workflows/test.yml",
        "train.py",
        "Makefile",
        "requirements.lock",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
    ):
        assert name in names


def test_the_wheel_runs_in_an_empty_folder(built, tmp_path):
    site, home = tmp_path / "site", tmp_path / "empty"
    home.mkdir()
    zipfile.ZipFile(built[0]).extractall(site)
    # Before the checkout, which the environment knows, too.
    environment = {**os.environ, "PYTHONPATH": str(site)}
    program = (
        "import sys; from spiking_mlp_jax.cli import main; print(main.__file__); sys.exit(main.main(sys.argv[1:]))"
    )
    picture = str(ROOT / "tests" / "data" / "fashion_ankle_boot.png")
    command = [sys.executable, "-c", program, "predict", "fashion_mnist", picture, "--top", "1"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert done.stdout.splitlines()[-1].endswith("Ankle boot")
    command = [sys.executable, "-c", program, "train", "--config", "fashion_mnist:demo", "--config.dry_run=True"]
    command += ["--config.dim=6", "--config.depths=(1,)", "--config.time_steps=1", "--config.batch_size=16"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode, list(home.iterdir())) == (0, []), done.stderr
    assert "GMAC per time step" in done.stdout
    done = subprocess.run([*command, "--config.dimm=6"], cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and 'error: there is no config field "dimm"' in done.stderr


def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # The process's own cache stays as it is.
    monkeypatch.setattr("spiking_mlp_jax.utils.compilation_cache.use_compilation_cache", lambda where: None)
    # The two that take longest are only read; they have tests of their own, and `make package` runs everything.
    run = cli.run

    def run_the_short(words):
        long = words[0] == "report" or words[:2] == ["evaluate", "spiking_mlp_demo/fashion.smlp"]
        return cli.make_parser().parse_args(words) and 0 if long else run(words)

    monkeypatch.setattr("spiking_mlp_jax.cli.main.run", run_the_short)
    assert run(["demo", "--limit", "24"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["spiking_mlp_demo"]
    files = {path.name for path in (tmp_path / "spiking_mlp_demo").iterdir()}
    assert {"fashion.smlp", "fashion.c", "ankle_boot.png"} <= files
    printed = capsys.readouterr().out
    commands = [line.split()[2] for line in printed.splitlines() if line.startswith("$ spiking-mlp ")]
    assert commands == ["predict", "evaluate", "compile", "evaluate", "audit", "export-c", "report"]
    # Each picture is one of the class that its file is named after, and is recognised.
    best = re.findall(r"^\S*/(\w+)\.png\n +[\d.]+ %  (.*)$", printed, re.M)
    assert len(best) == 4 and all(name == said.lower().replace(" ", "_") for name, said in best)
    assert "of 24 test images" in printed
    assert "ok: no multiplication" in printed


def test_a_demo_that_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "-o", str(tmp_path / "file")]) == 2
    assert re.fullmatch(r"error: .*file cannot be created .* -o\n", capsys.readouterr().err)


def test_version_and_citation_and_changelog_agree():
    numbers = r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
    assert re.fullmatch(numbers, VERSION)
    assert f'\nversion = "{VERSION}"\n' in (ROOT / "pyproject.toml").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(rf"^## ({numbers}) \((\d{{4}}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest
    assert (citation["version"], citation["date-released"]) == (newest[1], newest[5]) == (VERSION, newest[5])
    paper = citation["preferred-citation"]
    assert paper["doi"] == "10.1109/TNNLS.2024.3394837"
    assert paper["identifiers"][0]["value"] == "arXiv:2306.12465"
    assert len(paper["authors"]) == 7


def test_workflow_tests_each_python_that_is_promised():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    offered = set(workflow["jobs"]["package"]["strategy"]["matrix"]["python"])
    promised = set(re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text()))
    assert offered == promised == {"3.11", "3.12", "3.13"}
    runs = {step.get("run") for job in workflow["jobs"].values() for step in job["steps"]}
    assert {"bash .ci/run", "make package PYTHON=python", "make test-tools"} <= runs
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {"package", "test-tools", "test"} <= set(targets)


def test_shipped_networks_are_in_the_package():
    assert {"fashion_mnist", "fashion_mnist_sparse", "cifar10"} <= set(weights.pretrained_names())
