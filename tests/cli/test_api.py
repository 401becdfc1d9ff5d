"""`import spiking_mlp_jax as smlp`: its names, what they do, and what importing it costs."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import spiking_mlp_jax as smlp
from spiking_mlp_jax.errors import InputError
from tests.support.random_model import make_data, meta_for, random_model


def test_importing_is_quick_and_loads_nothing_large():
    code = "import sys, spiking_mlp_jax; print(*sys.modules)"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    bare = time.perf_counter() - started
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert time.perf_counter() - started - bare < 0.3
    assert not {"jax", "flax", "numpy", "numba", "matplotlib"} & set(done.stdout.split())


def test_every_name_exists_is_listed_and_has_a_docstring():
    assert dir(smlp) == sorted(smlp.__all__)
    for name in smlp.__all__:
        assert getattr(smlp, name) is not None
        assert name == "__version__" or getattr(smlp, name).__doc__ or name in smlp._HOMES.values(), name
    with pytest.raises(AttributeError, match="no attribute 'infer'"):
        _ = smlp.infer  # pyright: ignore


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(str(smlp.__file__)).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    seen |= {target.id for node in block.body if isinstance(node, ast.Assign) for target in node.targets}
    assert seen == set(smlp._HOMES) == set(smlp.__all__) - {"__version__"}


def test_sub_packages_without_importing_them():
    code = "import spiking_mlp_jax as smlp; print(smlp.deploy.__name__, smlp.fold.__name__, callable(smlp.compile))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["spiking_mlp_jax.deploy", "fold", "True"]


def test_from_a_trained_network_to_integers(tmp_path):
    model = random_model(norm_features="channel")
    model.pixels = smlp.models.pixels.Pixels.from_data(meta_for(model)["data"])
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 1), np.uint8)
    net = smlp.quantize(smlp.fold(model), images, bits=8)
    smlp.save(net, tmp_path / "net.smlp")
    scores = smlp.Engine(tmp_path / "net.smlp").predict(images)
    np.testing.assert_array_equal(scores, smlp.Engine(net).predict(images))
    report = smlp.audit(net, images[:1])
    assert report.ok and report.rows

    data = make_data(make_data(tmp_path / "data"), split="train")
    compiled = smlp.compile(model, images=4, dataset="folder", data_dir=data)
    found = smlp.evaluate(compiled, data_dir=data, against=model)
    trained = smlp.evaluate(model, "folder", data)
    assert found.images == trained.images == 12 and found.agreement is not None
    guesses = smlp.classify(compiled, list(images), top=3)
    exact = smlp.Engine(compiled).predict(images).argmax(1)
    assert [best[0].label for best in guesses] == exact.tolist()

    smlp.save(model, tmp_path / "weights")
    again = smlp.from_pretrained(tmp_path / "weights")
    assert again.pixels == model.pixels
    np.testing.assert_array_equal(
        again(np.zeros((1, 16, 16, 1), np.float32)), model(np.zeros((1, 16, 16, 1), np.float32))
    )
    with pytest.raises(InputError, match="network is a int"):
        smlp.save(5, tmp_path / "x")  # pyright: ignore
    with pytest.raises(InputError, match="give dataset"):
        smlp.compile(model)


def test_python_m():
    done = subprocess.run([sys.executable, "-m", "spiking_mlp_jax", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"spiking-mlp-jax {smlp.__version__}\n")
