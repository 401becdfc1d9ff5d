"""The comparison with SpikingJelly, where neither PyTorch nor SpikingJelly is needed."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import compare, ours, report, tpu
from benchmarks.cases import CASES, CPU_SIDES, GPU_CASES, GPU_SIDES, PEER, QUICK_CASES
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.train.config import load_config, model_config

ROOT = Path(__file__).parents[2]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    return command.main()


@pytest.mark.slow
def test_quick_run_of_this_package_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "--quick", "--no-peer", "--runs", "2", "--tasks", "inference", "--json", "out.json") == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| inference \| ours \| \d+\.\d{3} \|", printed) and "not compared with a peer" in printed
    document = json.loads((tmp_path / "out.json").read_text())
    (row,) = document["rows"]
    assert row["case"] == "quick" and len(row["seconds"]) == 2 and min(row["seconds"]) > 0
    assert row["peak_bytes"] > 1e8 and row["compile_s"] > 0 and row["jax"] == jax.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "spe_x"], 'no case "spe_x": the known ones are spe_t'),
        (["--no-peer", "--json", "nowhere/out.json"], 'no folder "nowhere" for out.json'),
        (["--no-peer", "--gpu"], "JAX sees no GPU here"),
        (["--no-peer", "--json", "."], '"." is a folder: name a file'),
    ],
)
def test_mistakes_are_answered_with_one_message(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_pipe_and_a_folder_that_takes_no_file_are_refused(monkeypatch, tmp_path, capsys):
    def full(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    monkeypatch.setattr(compare, "write_weights", None)
    for name in ("pipe", "link"):
        assert run(monkeypatch, "--quick", "--no-peer", "--json", str(tmp_path / name)) == 2
        assert capsys.readouterr().err == f'error: "{tmp_path / name}" is not a regular file: name another\n'
    monkeypatch.setattr(report.tempfile, "TemporaryFile", full)
    assert run(monkeypatch, "--quick", "--no-peer", "--json", str(tmp_path / "out.json")) == 2
    assert capsys.readouterr().err == f'error: "{tmp_path / "out.json"}" cannot be written: Read-only file system\n'
    assert (tmp_path / "pipe").is_fifo() and sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_what_is_named_twice_is_measured_once(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(compare, "write_weights", lambda *arguments: None)
    monkeypatch.setattr(compare, "alternate", lambda name, task, *rest: asked.append((name, task)) or [])
    options = ["--quick", "--no-peer", "--only", "quick", "quick", "--tasks", "train", "train"]
    assert run(monkeypatch, *options, "--json", str(tmp_path / "out.json")) == 0
    assert asked == [("quick", "train")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], 'argument --runs: must be a whole number of at least 1, got "0"'),
        (["--threads", "100000"], "at most"),
        (["--taks", "x"], "--taks"),
    ],
)
def test_wrong_options(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


def test_without_the_peer_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    assert run(monkeypatch, "--quick") == 2
    assert "torch is not installed" in capsys.readouterr().err


def test_a_side_that_fails_is_named_and_ends_with_status_1(monkeypatch, tmp_path, capsys):
    def broken(name, settings, progress):
        raise compare.BenchmarkError("ours (quick, weights) ended with status 1: no memory")

    monkeypatch.setattr(compare, "write_weights", broken)
    assert run(monkeypatch, "--quick", "--no-peer", "--json", str(tmp_path / "out.json")) == 1
    assert "ended with status 1: no memory" in capsys.readouterr().err


def test_a_dying_process_is_reported(tmp_path):
    settings = compare.Settings(tmp_path, 0, 1, 0, {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "no_such_platform"})
    with pytest.raises(compare.BenchmarkError, match=r"ours \(quick, inference\) ended with status 1: .*"):
        compare.alternate("quick", "inference", [CPU_SIDES["inference"][1]], settings, lambda what: None)


def test_nothing_is_timed_when_outputs_differ():
    arrays = {"training": np.ones((2, 3)), "gradient.bias": np.zeros(3)}
    same = {"training": np.ones((2, 3)) + 1e-12, "gradient.bias": np.full(3, 1e-15)}
    assert 0 < compare.largest_difference(arrays, same) < 1e-11
    for name, wrong in (("training", 1e-6), ("gradient.bias", 1e-6), ("training", np.nan)):
        with pytest.raises(compare.BenchmarkError, match=rf"in {name}: nothing was timed"):
            compare.largest_difference({**arrays, name: arrays[name] + wrong}, arrays)
    with pytest.raises(compare.BenchmarkError, match=r"only one side has gradient.bias"):
        compare.largest_difference({"training": arrays["training"]}, arrays)


def test_summary_pairs_the_rounds():
    peer = {"side": PEER.title, "seconds": [2.0, 9.0, 4.0], "peak_bytes": 8e9}
    side = {"side": "ours", "seconds": [1.0, 3.0, 4.0], "peak_bytes": 2e9}
    # The ratio of the medians would be 4 / 3.
    assert report.summary(side, [peer, side], 6) == dict(median_s=3.0, images_per_s=2.0, faster=2.0, memory_share=0.25)
    assert "faster" not in report.summary(peer, [peer, side], 4)


def test_memory_of_unlike_kinds_is_not_compared():
    peer = {"side": PEER.title, "seconds": [2.0], "peak_bytes": 8e9}
    side = {"side": "ours", "seconds": [1.0], "peak_bytes": 2e9, "device_peak_bytes": 1e9}
    assert "memory_share" not in report.summary(side, [peer, side], 1)
    both = {**peer, "device_peak_bytes": 4e9}
    assert report.summary(side, [both, side], 1)["memory_share"] == 0.25


def test_every_distinct_side_is_compared_and_a_wrong_one_stops_the_timing(monkeypatch, tmp_path, capsys):
    asked, timed = [], []

    def finish(case, do, side, settings):
        asked.append(side.overrides)
        wrong = side.overrides.get("remat") == "block"
        np.savez(settings.folder / compare.OUTPUTS, loss=np.float64(2.0 if wrong else 1.0))

    monkeypatch.setattr(compare, "_finish", finish)
    monkeypatch.setattr(compare, "write_weights", lambda *arguments: None)
    monkeypatch.setattr(compare, "alternate", lambda *arguments: timed.append(arguments))
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: name)
    assert run(monkeypatch, "--quick", "--json", str(tmp_path / "out.json")) == 1
    assert "the sides differ by 1.0e+00 in loss" in capsys.readouterr().err
    assert asked == [{}, {"neuron_backend": "xla"}, {"neuron_backend": "xla", "remat": "block"}] and not timed


def test_a_gpu_that_only_one_side_sees_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(compare, "jax_has_gpu", lambda: True)
    monkeypatch.setattr(compare, "torch_has_gpu", lambda: False)
    assert run(monkeypatch, "--gpu") == 2
    assert "PyTorch sees no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize(("no_peer", "groups"), [(True, [1, 1, 1]), (False, [2, 2, 2])])
def test_large_networks_run_with_few_at_a_time(no_peer, groups, monkeypatch, tmp_path):
    alive = []

    def alternate(name, task, sides, settings, progress):
        alive.append(len(sides))
        return [{"side": side.title, "seconds": [1.0], "each": [[1.0]], "peak_bytes": 1e9} for side in sides]

    monkeypatch.setattr(compare, "alternate", alternate)
    monkeypatch.setattr(compare, "write_weights", lambda *arguments: None)
    monkeypatch.setattr(compare, "compare_outputs", lambda *arguments: 0.0)
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: name)
    options = ["--only", "spe_t_T8", "--tasks", "train", "--json", str(tmp_path / "out.json")]
    assert run(monkeypatch, *options, *(["--no-peer"] if no_peer else [])) == 0
    assert alive == groups


def test_outputs_hold_every_gradient(x64):
    config = ModelConfig(image_size=8, in_channels=1, num_classes=3, patch_size=2, dim=6, depths=(1, 1), time_steps=2)
    state = ours.initial_state(config, 0)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 1))
    values = ours.outputs(config, lambda: state, images, np.array([0, 2]))
    gradients = {name.removeprefix("gradient.") for name in values if name.startswith("gradient.")}
    assert gradients == {name for name in state if not name.endswith(ours.NOT_TRAINED)}
    assert values["training"].dtype == np.float64 and values["training"].shape == (2, 2, 3)
    assert not np.allclose(values["training"], values["evaluation"])


def test_small_networks_are_those_of_the_configs():
    config = model_config(load_config(str(ROOT / "configs" / "cifar10.py")))
    assert CASES["cifar10"].config == config and CASES["cifar10"].batch == 128
    for case in {**CASES, **GPU_CASES, **QUICK_CASES}.values():
        assert f"T={case.config.time_steps}" in case.title or "as above" in case.title
        assert f"B={case.batch}" in case.title or "as above" in case.title
    for sides in (*CPU_SIDES.values(), *GPU_SIDES.values()):
        assert sides[0] is PEER and sides[-1].module == "ours"
        assert len({side.title for side in sides}) == len(sides)


def test_instructions_of_a_compiled_program_are_counted():
    def function(x, kernel):
        def body(carry, _):
            return jnp.tanh(carry @ kernel), ()

        return jax.lax.scan(body, x, length=5)[0].T @ kernel

    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    text = jax.jit(function).lower(shape, shape).compile().as_text()
    assert text is not None
    program, entry = tpu.computations(text)
    # The loop's body counts once, wherever the compiler puts its two products and what it fuses.
    assert tpu.counts(text)["products"] == 2
    (loop,) = [row for opcode, row in program[entry] if opcode == "while"]
    assert tpu._iterations(program, loop) == 5 and tpu._named("body", loop) in program
    # Only a TPU's compiler estimates.
    assert tpu.cycles(text) == (0, 0)


TPU_PROGRAM = """
%inner (p.1: f32[8,8]) -> f32[8,8] {
  %p.1 = f32[8,8]{1,0:T(8,128)} parameter(0)
  %copy.9 = f32[8,8]{0,1:T(8,128)} copy(%p.1)
  ROOT %transpose.1 = f32[8,8]{1,0:T(8,128)} transpose(%copy.9), dimensions={1,0}
}

%body (p.2: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p.2 = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %buffer = f32[8,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %kernel = f32[8,8]{1,0} custom-call(%buffer), custom_call_target="tpu_custom_call"
  %copy.1 = f32[8,8]{0,1:T(8,128)} copy(%kernel), backend_config={"estimated_cycles":"30"}
  %fusion.1 = f32[8,8]{1,0:T(8,128)} fusion(%copy.1), calls=%inner, backend_config={"estimated_cycles":"100"}
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) tuple(%p.2, %fusion.1)
}

%condition (p.3: (s32[], f32[8,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(14)
  ROOT %compare.1 = pred[]{:T(512)} compare(%p.3, %constant.1), direction=LT
}

ENTRY %main (p.4: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %fusion.2 = f32[8,8]{1,0:T(8,128)} fusion(%p.4), calls=%inner, backend_config={"estimated_cycles":"7"}
  ROOT %while.1 = (s32[]{:T(128)}, /*index=1*/f32[8,8]{1,0:T(8,128)}) while(%p.4), condition=%condition, body=%body
}
"""


def test_counts_and_cycles_of_a_tpu_program():
    expected = {"fusions": 2, "copies": 1, "transposes": 1, "products": 0, "custom calls": 1}
    assert tpu.counts(TPU_PROGRAM) == expected
    assert tpu.cycles(TPU_PROGRAM) == (14 * 130 + 7, 14 * 30)
    with pytest.raises(NotImplementedError, match="unknown number of iterations of this loop"):
        tpu.cycles(TPU_PROGRAM.replace("constant(14)", "parameter(1)"))


@pytest.mark.parametrize(
    ("installed", "arguments", "message"),
    [
        (False, [], "libtpu, the TPU compiler, is not installed: pip install libtpu"),
        (True, ["--topology", "v0:1x1"], 'libtpu cannot compile for --topology "v0:1x1": no such topology'),
    ],
)
def test_mistakes_of_the_tpu_command_are_answered_with_one_message(installed, arguments, message, monkeypatch, capsys):
    def refuse(**arguments):
        raise jax.errors.JaxRuntimeError("no such topology\nand much more")

    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(tpu.topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(sys, "argv", ["tpu", *arguments])
    assert tpu.main() == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_our_side_needs_only_jax_flax_optax_and_numpy():
    """So that it runs where nothing can be installed; what these four bring along themselves is allowed."""
    code = """
import importlib.metadata, re, sys
def closure(names):
    found, todo = set(), list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found: continue
        try: requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError: continue
        found.add(name)
        todo += [re.match(r"[\\w.-]+", r)[0] for r in requires if "extra ==" not in r]
    return found
import jax, flax.nnx, optax, numpy
before = set(sys.modules)
from benchmarks import __main__, compare, counts, memory, ours, report, tpu, worker
from spiking_mlp_jax import SpikingMLP
from spiking_mlp_jax.nn.kernels import neuron
allowed = closure(["jax", "jaxlib", "flax", "optax", "numpy"])
packages = importlib.metadata.packages_distributions()
for name in sorted({m.split(".")[0] for m in set(sys.modules) - before}):
    for distribution in packages.get(name, []):
        plain = re.sub(r"[-_.]+", "-", distribution).lower()
        if plain not in allowed | {"spiking-mlp-jax"}: print(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_no_document_has_a_placeholder():
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
    for path in documents:
        marked = re.findall(r"^@[A-Z_]+$", path.read_text(), re.M)
        assert not marked, f"{path.name}: {marked}"
