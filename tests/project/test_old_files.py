"""Files that version 0.1.0 wrote open as they did: weights folders, compiled networks, a run's checkpoint."""

import json
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from spiking_mlp_jax.deploy import artifact, reference
from spiking_mlp_jax.deploy.engine import Engine
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.train.checkpoint import Checkpoints
from spiking_mlp_jax.train.config import default_config, model_config, to_dict
from spiking_mlp_jax.train.logging import read_metrics
from spiking_mlp_jax.train.loop import fit
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.state import abstract_state, with_average

OLD = Path(__file__).parents[1] / "oracles" / "v0_1_0"


@pytest.fixture(scope="module")
def expected():
    with np.load(OLD / "expected.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", ["spe", "plain"])
def test_a_weights_folder_opens_and_computes_what_it_did(name, expected):
    model, meta = weights.load(OLD / name)
    assert meta["data"]["class_names"] == ["bird", "cat", "dog"]
    data = meta["data"]
    logits = model(normalize(expected["images"], data["mean"], data["std"]))
    # Potentials near the threshold would flip a spike; the random network has none on these images.
    np.testing.assert_allclose(logits, expected[f"{name}_logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_compiled_network_gives_the_same_integers(bits, expected):
    file = OLD / f"int{bits}.smlp"
    net = artifact.load(file)
    assert net.description.bits == bits
    np.testing.assert_array_equal(reference.run(net, expected["images"]), expected[f"int{bits}_logits"])
    np.testing.assert_array_equal(Engine(file).predict(expected["images"]), expected[f"int{bits}_logits"].sum(0))


def test_saving_a_compiled_network_again_writes_the_same_bytes(tmp_path):
    artifact.save(artifact.load(OLD / "int8.smlp"), tmp_path / "again.smlp")
    assert (tmp_path / "again.smlp").read_bytes() == (OLD / "int8.smlp").read_bytes()


def test_a_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    with tarfile.open(OLD / "run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "run")
    workdir = Path("workdir").absolute()
    config = default_config()
    config.update(json.loads((OLD / "run.json").read_text()))
    # The state at step 5, bit for bit. The averaged weights are those of with_average, a copy of the state's structure.
    checkpoints = Checkpoints(workdir / "checkpoints", to_dict(config), config.keep)
    _, abstract = abstract_state(model_config(config), make_optimizer(config, 6))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.eval_shape(with_average, abstract) if config.ema_decay else abstract
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract)
    restored = checkpoints.restore(abstract)
    checkpoints.close()
    with np.load(OLD / "state5.npz") as file:
        leaves = jax.tree.leaves(restored.state)
        assert len(leaves) == len(file.files)
        for i, leaf in enumerate(leaves):
            np.testing.assert_array_equal(leaf, file[str(i)])
    before = read_metrics(workdir)
    result = fit(config, workdir)
    assert (result.step, result.finished) == (12, True)
    lines = read_metrics(workdir)
    assert lines[: len(before)] == before
    old = [json.loads(line) for line in (OLD / "metrics_12.jsonl").read_text().splitlines()]
    assert [(x["step"], x["split"]) for x in lines] == [(x["step"], x["split"]) for x in old]
    # The step after the checkpoint sees the same images with the same weights: its loss is the old one.
    for new, was in zip(lines, old, strict=True):
        if new["split"] == "train" and new["step"] <= 6:
            np.testing.assert_allclose(new["loss"], was["loss"], rtol=1e-3)
    shutil.rmtree(workdir)
