"""Training that starts from saved weights: which fit, and what is said of those that do not."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from spiking_mlp_jax import SpikingMLP
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.train.evaluate import evaluate, evaluate_model
from spiking_mlp_jax.train.sharding import make_mesh
from spiking_mlp_jax.train.state import abstract_state, load_state
from spiking_mlp_jax.train.step import make_eval_step
from tests.support.random_model import meta_for, random_model, variables
from tests.support.tiny import tiny_config

OPTIMIZER = optax.trace(0.9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network and its weights folder."""
    model = random_model()
    folder = tmp_path_factory.mktemp("saved") / "weights"
    weights.save(folder, model, meta_for(model))
    return model, folder


def load(config, folder, mesh=None):
    return load_state(config, OPTIMIZER, str(folder), make_mesh() if mesh is None else mesh)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"time_steps": 5, "tau": 3.0, "surrogate": "atan", "remat": "block", "dtype": "bfloat16", "v_threshold": 0.5},
        {"norm": "tdbn", "neuron": "if", "v_reset": None, "neuron_backend": "xla"},
    ],
)
def test_fitting_weights_are_taken_whole(saved, fields):
    model, folder = saved
    config = tiny_config(**fields)
    state = load(config, folder.parent)
    graphdef, abstract = abstract_state(config, OPTIMIZER)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    assert state.step == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    network = nnx.merge(graphdef, state.params, state.stats)
    assert isinstance(network, SpikingMLP) and network.config == config
    for name, variable in variables(network).items():
        np.testing.assert_array_equal(variable[...], variables(model)[name][...])
        assert len(variable[...].sharding.device_set) == 8


def test_evaluation_before_any_step_is_that_of_the_weights(saved):
    model, folder = saved
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(8, 16, 16, 1), dtype=np.uint8)
    batch = {"image": image, "label": np.arange(8, dtype=np.int32) % 3, "mask": np.arange(8) < 7}
    mesh = make_mesh(jax.devices()[:1])
    state = load(model.config, folder, mesh)
    graphdef, _ = abstract_state(model.config, OPTIMIZER)
    step = make_eval_step(graphdef, (0.25,), (0.5,), mesh)
    result = evaluate(step, state.params, state.stats, [batch], mesh)
    assert result.to_dict() == evaluate_model(model, [batch], (0.25,), (0.5,)).to_dict()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dim": 9, "tau": 3.0}, r"differ in dim \(6 there, 9 now\);"),
        ({"depths": (1, 1), "time_steps": 4}, r"differ in depths \(\(1, 2\) there, \(1, 1\) now\);"),
        ({"norm": "tebn", "expansion": 3}, r"in expansion \(2 there, 3 now\), norm \(batch there, tebn now\);"),
        ({"encoding": "plain", "dim": 4}, r"in dim \(6 there, 4 now\), encoding \(spe there, plain now\);"),
        ({"neuron": "plif"}, "neuron"),
        ({"num_classes": 4, "in_channels": 3}, r"differ in in_channels \(1 there, 3 now\);"),
        ({"image_size": 12, "patch_size": 2}, r"differ in patch_size \(4 there, 2 now\);"),
    ],
)
def test_other_architectures_are_named(saved, fields, said):
    with pytest.raises(InputError, match=said) as error:
        load(tiny_config(**fields), saved[1])
    assert "\n" not in str(error.value) and "init_weights" in str(error.value)


def test_steps_shape_a_network_with_tebn(tmp_path):
    model = random_model(norm="tebn")
    weights.save(tmp_path, model, meta_for(model))
    assert load(tiny_config(norm="tebn", tau=3.0), tmp_path).step == 0
    with pytest.raises(InputError, match=r"time_steps \(2 there, 3 now\)"):
        load(tiny_config(norm="tebn", time_steps=3), tmp_path)


def test_missing_weights_are_an_input_error(tmp_path):
    with pytest.raises(InputError, match="fashion_mnist"):
        load(tiny_config(), "fashion_mnits")
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        load(tiny_config(), tmp_path)
