"""Networks by name."""

import dataclasses
import inspect

import jax
import numpy as np
import pytest
from flax import nnx

import spiking_mlp_jax
from spiking_mlp_jax import ModelConfig, SpikingMLP, create_model, list_models
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.config import VARIANTS
from spiking_mlp_jax.models.registry import from_pretrained
from spiking_mlp_jax.models.spiking_mlp import Block
from spiking_mlp_jax.nn.layers import Neuron

SMALL = {"depths": (1, 1), "dim": 6, "image_size": 16}


def arrays(model):
    return {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))}


def test_the_front_door_is_light():
    assert set(spiking_mlp_jax.__all__) <= set(dir(spiking_mlp_jax))
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        spiking_mlp_jax.creat_model  # noqa: B018


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_with_other_fields(name):
    model = create_model(name, num_classes=7, **SMALL)
    assert model.config == ModelConfig.variant(name, num_classes=7, **SMALL)
    model.eval()
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), np.float32)
    assert jax.eval_shape(model, images).shape == (4, 2, 7)
    assert model.pixels is None


def test_the_paper_s_smallest_at_cifar_s_size():
    model = nnx.eval_shape(lambda: create_model("mlp_spe_t", num_classes=10, image_size=32))
    assert [model.config.stage_side(i) for i in range(4)] == [8, 4, 2, 1]
    assert model.head.kernel.shape == (8 * 78, 10)


def test_seeds():
    one, same, other = (create_model("mlp_spe_t", seed=seed, **SMALL) for seed in (0, 0, 1))
    for path, value in arrays(one).items():
        np.testing.assert_array_equal(value, arrays(same)[path])
    assert any(np.any(value != arrays(other)[path]) for path, value in arrays(one).items())


@pytest.mark.parametrize("name", ["MLP-SPE-T", "mlp-spe-t", " mlp_spe_T "])
def test_names_are_read_kindly(name):
    assert create_model(name, **SMALL).config == ModelConfig.variant("mlp_spe_t", **SMALL)


def test_trained_networks_carry_their_preprocessing():
    model = create_model("fashion_mnist", pretrained=True)
    expected, meta = weights.load(weights.find("fashion_mnist"))
    for path, value in arrays(expected).items():
        np.testing.assert_array_equal(value, arrays(model)[path])
    assert model.pixels.class_names == tuple(meta["data"]["class_names"])
    assert model.pixels.mean == tuple(meta["data"]["mean"])
    assert (model.pixels.resize_mode, model.pixels.eval_resize) == (
        meta["data"]["resize_mode"],
        meta["data"]["eval_resize"],
    )
    # Evaluation mode: a call changes nothing.
    before = arrays(model)
    model(np.ones((1, 32, 32, 1), np.float32))
    for path, value in before.items():
        np.testing.assert_array_equal(value, arrays(model)[path])


def test_trained_architecture_with_fresh_weights():
    model = create_model("fashion_mnist", num_classes=3)
    trained = create_model("fashion_mnist", pretrained=True)
    assert model.config == dataclasses.replace(trained.config, num_classes=3)
    assert np.any(model.stages[0].encode.conv.kernel[...] != trained.stages[0].encode.conv.kernel[...])


def test_trained_weights_for_other_classes_and_sizes():
    trained = create_model("fashion_mnist", pretrained=True)
    model = create_model("fashion_mnist", pretrained=True, num_classes=3, image_size=64, time_steps=2)
    assert model(np.zeros((1, 64, 64, 1), np.float32)).shape == (2, 1, 3)
    kernel = ("stages", 0, "encode", "conv", "kernel")
    np.testing.assert_array_equal(arrays(model)[kernel], arrays(trained)[kernel])
    assert model.pixels.class_names == () and model.pixels.mean == trained.pixels.mean


def test_another_time_constant_keeps_all_weights():
    trained = create_model("fashion_mnist", pretrained=True)
    model = create_model("fashion_mnist", pretrained=True, tau=4.0)
    assert model.config.tau == 4.0 and model.pixels == trained.pixels
    for path, value in arrays(trained).items():
        np.testing.assert_array_equal(value, arrays(model)[path])


@pytest.mark.parametrize(
    "name, fields, sentence",
    [
        ("mlp_spe_x", {}, 'there is no model "mlp_spe_x": did you mean "mlp_spe_'),
        ("fashion-mnits", {}, 'did you mean "fashion_mnist"'),
        (None, {}, 'there is no model "None"'),
        ("mlp_spe_t", {"num_class": 10}, 'no argument "num_class": did you mean "num_classes"'),
        ("mlp_spe_t", {"image_size": 40}, "image_size 40 does not divide into patches of 4 .* multiple of 32"),
        ("mlp_spe_t", {"num_classes": 0}, "num_classes must be at least 1"),
        ("mlp_spe_t", {"pretrained": True}, 'no trained weights of "mlp_spe_t" .* `spiking-mlp convert`'),
        ("mlp_spe_t", {"pretrained": "yes"}, "pretrained must be True or False, got 'yes'"),
        ("mlp_spe_t", {"seed": 2**32}, "got 4294967296"),
        ("mlp_spe_t", {"seed": 1.5}, "seed must be a whole number from 0 to 4294967295, got 1.5"),
        ("mlp_spe_t", {"norm": "bacth"}, 'norm cannot be "bacth"'),
        ("fashion_mnist", {"pretrained": True, "dim": 24}, "have no place for another dim: leave that"),
        ("fashion_mnist", {"pretrained": True, "depths": (1, 1), "tau": 3.0}, "no place for another depths"),
        ("fashion_mnist", {"pretrained": True, "image_size": 36}, "image_size 36 does not divide"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(name, fields, sentence):
    with pytest.raises(InputError, match=sentence):
        create_model(name, **fields)


def test_names():
    assert set(list_models()) == {*VARIANTS, *weights.pretrained_names()}
    assert list_models() == sorted(list_models())
    assert list_models(pretrained=True) == weights.pretrained_names()
    assert list_models("*SPE-?") == ["mlp_spe_b", "mlp_spe_s", "mlp_spe_t"]
    assert list_models("resnet*") == []


def test_from_pretrained(tmp_path):
    model = SpikingMLP.from_pretrained("fashion_mnist")
    _, meta = weights.load(weights.find("fashion_mnist"))
    weights.save(tmp_path / "run" / "weights", model, meta)
    for where in (tmp_path / "run", str(tmp_path / "run" / "weights")):
        again = SpikingMLP.from_pretrained(where)
        assert again.pixels == model.pixels
        for path, value in arrays(model).items():
            np.testing.assert_array_equal(value, arrays(again)[path])
    with pytest.raises(InputError, match="there is no folder"):
        SpikingMLP.from_pretrained(tmp_path / "none")


def test_a_trained_network_carries_its_metadata():
    model = from_pretrained("fashion_mnist")
    _, meta = weights.load(weights.find("fashion_mnist"))
    assert model.meta == meta and model.meta["result"]["images"] == 10_000
    assert nnx.clone(model).meta == meta and hash(nnx.graphdef(model))
    assert create_model("mlp_spe_t", image_size=32, depths=(1,), dim=12).meta is None


def test_layers_show_the_signature_of_their_constructor():
    assert list(inspect.signature(SpikingMLP).parameters) == ["config", "rngs"]
    assert list(inspect.signature(Block).parameters) == ["config", "stage", "rngs"]
    assert list(inspect.signature(Neuron).parameters)[:3] == ["kind", "channels", "tau"]
