"""Folded networks give the logits of the network in evaluation mode, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_mlp_jax.deploy.fold import fold
from spiking_mlp_jax.errors import InputError
from tests.models.test_official import close, golden_model
from tests.support.random_model import random_model, set_value, variables

NORMS = ("batch", "tdbn", "tebn")
CASES = [(e, f, n) for e in ("spe", "plain") for f in ("token", "channel") for n in NORMS]


@functools.cache
def evaluations(**fields):
    """Two compiled functions of variables and images: the network's logits and the folded network's."""
    graphdef, _ = nnx.split(random_model(**fields))
    network = jax.jit(lambda variables, x: nnx.merge(graphdef, variables, copy=True)(x))
    return network, jax.jit(lambda folded, x: folded(x))


def assert_folds(model, **fields):
    network, folded = evaluations(**fields)
    images = jax.random.normal(jax.random.key(0), (3, 16, 16, 1), float)
    expected = network(nnx.state(model), images)
    np.testing.assert_allclose(folded(fold(model), images), expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def with_scales(model, rng, zero=0.2, negative=0.3):
    """Makes a share of the norms' scales negative or zero."""
    for name, variable in variables(model).items():
        if name.endswith("scale"):
            draw = rng.random(variable.shape)
            factor = np.where(draw < zero, 0.0, np.where(draw < zero + negative, -1.0, 1.0))
            set_value(model, name, np.asarray(variable[...]) * factor)
    return model


@pytest.mark.parametrize(("encoding", "features", "norm"), CASES)
def test_every_norm(encoding, features, norm, x64):
    fields = dict(encoding=encoding, norm_features=features, norm=norm)
    assert_folds(with_scales(random_model(seed=1, **fields), np.random.default_rng(0)), **fields)


@pytest.mark.parametrize(
    "fields",
    [
        dict(neuron="if"),
        dict(neuron="plif", encoding="plain"),
        dict(neuron="plif", tau_per_channel=True),
        dict(v_reset=None),
        dict(v_reset=-0.25, v_threshold=0.7, norm="tdbn"),
        dict(decay_input=False, tau=3.0),
        dict(decay_input=False, v_reset=None, tau=1.25, norm="tebn"),
        dict(depths=(2, 1, 1), time_steps=1),
        dict(depths=(1,), in_channels=1, patch_size=2, dim=5),
    ],
    ids=str,
)
def test_every_neuron_and_geometry(fields, x64):
    model = random_model(seed=2, **fields)
    if fields.get("neuron") == "plif":
        for i, name in enumerate(name for name in variables(model) if name.endswith(".w")):
            set_value(model, name, 0.3 * i - 1)
    assert_folds(with_scales(model, np.random.default_rng(1)), **fields)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    case=st.sampled_from([("spe", "token", "batch"), ("plain", "token", "tebn"), ("spe", "channel", "tdbn")]),
    zero=st.sampled_from([0.0, 0.2, 1.0]),
    negative=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_random_parameters(seed, case, zero, negative):
    with jax.enable_x64(True):
        fields = dict(zip(("encoding", "norm_features", "norm"), case, strict=True))
        rng = np.random.default_rng(seed)
        model = with_scales(random_model(seed=seed, **fields), rng, zero, negative)
        assert_folds(model, **fields)


@pytest.mark.parametrize("file", ["spe_small", "conv_small", "spe_tdbn", "spe_tebn"])
def test_official_numbers(file, x64):
    golden, model, images = golden_model(file)
    close(jax.jit(lambda f, x: f(x))(fold(model), images), golden["eval_logits"])


def test_a_norm_too_small_to_divide_by(x64):
    model = random_model(seed=3)
    for name in variables(model):
        if name.endswith("hidden_norm.scale"):
            set_value(model, name, 1e-320)
    assert_folds(model)


@pytest.mark.slow
def test_float32_agrees_nearly():
    model = random_model(seed=4)
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 1))
    folded = fold(model)
    assert {x.dtype for e in folded.arrays.values() for x in e.values()} == {np.dtype("float32"), np.dtype(bool)}
    np.testing.assert_allclose(folded(images), model(images), atol=0.2)


def test_the_model_is_not_changed():
    model = random_model(seed=5)
    before = jax.tree.map(np.asarray, nnx.state(model))
    model.train()
    first = fold(model)
    model.eval()
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model)))
    jax.tree.map(np.testing.assert_array_equal, first.arrays, fold(model).arrays)


def test_layer_norm_is_refused():
    with pytest.raises(InputError, match="LayerNorm"):
        fold(random_model(norm="layer"))


def test_wrong_images():
    folded = fold(random_model())
    for images in (jnp.zeros((2, 16, 16)), jnp.zeros((2, 8, 8, 1)), jnp.zeros((0, 16, 16, 1))):
        with pytest.raises(InputError, match="images must be"):
            folded(images)
    with pytest.raises(InputError, match="normalized"):
        folded(jnp.zeros((2, 16, 16, 1), jnp.uint8))


def test_what_is_no_model_and_no_images():
    folded = fold(random_model())
    for wrong in (None, folded, "model"):
        with pytest.raises(InputError, match="fold takes a SpikingMLP, got a"):
            fold(wrong)  # pyright: ignore[reportArgumentType]
    for wrong in (None, "images", [[1.0], [1.0, 2.0]]):
        with pytest.raises(InputError, match="images must be"):
            folded(wrong)  # pyright: ignore[reportArgumentType]


def test_a_scale_whose_reciprocal_float32_cannot_hold():
    model = random_model(depths=(1,))
    norm = model.stages[0].blocks.channel.hidden_norm
    norm.scale.set_value(norm.scale[...].at[:, 0].set(1e-39))
    folded = fold(model)
    entries = folded.arrays["stage0.block0.expand"]
    assert bool(entries["constant"][0]) and not bool(entries["constant"][1])
    assert all(np.isfinite(x).all() for entries in folded.arrays.values() for x in entries.values())
