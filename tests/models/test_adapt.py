"""Weights for another image size and another number of classes: against NumPy, and what must not change."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from spiking_mlp_jax import SpikingMLP
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.adapt import adapt, describe, resize_matrix
from spiking_mlp_jax.train.sharding import make_mesh
from spiking_mlp_jax.train.state import abstract_state, load_state
from tests.support.random_model import meta_for, random_model, variables
from tests.support.tiny import tiny_config

SHAPING = [
    {},
    {"norm": "layer"},
    {"norm": "tebn", "neuron": "plif"},
    {"norm": "tdbn", "norm_features": "channel"},
    {"encoding": "plain"},
]


def hat(old, new):
    """Each new position's weights of the old ones, straight from the definition."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    width = max(1.0, old / new)
    found = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(old)) / width)
    return found / found.sum(1, keepdims=True)


def adapted(network, **fields):
    """The network with other fields, in evaluation mode."""
    config = nnx.eval_shape(lambda: SpikingMLP(tiny_config(**fields), rngs=nnx.Rngs(0))).config
    graphdef = nnx.split(nnx.eval_shape(lambda: SpikingMLP(config, rngs=nnx.Rngs(0))), nnx.Param, nnx.BatchStat)[0]
    model = nnx.merge(graphdef, *adapt(network, config, 0), copy=True)
    model.eval()
    return model


@pytest.mark.parametrize(("old", "new"), [(4, 8), (4, 6), (8, 3), (5, 5), (1, 3)])
def test_resizing_is_linear_interpolation(old, new):
    np.testing.assert_allclose(resize_matrix(old, new), hat(old, new), atol=1e-6)
    if old == new:
        np.testing.assert_array_equal(resize_matrix(old, new), np.eye(old))


@pytest.mark.parametrize("fields", SHAPING, ids=str)
def test_shapes_and_what_is_kept(fields):
    network = random_model(**fields)
    before, after = variables(network), variables(adapted(network, image_size=24, **fields))
    expected = variables(nnx.eval_shape(lambda: SpikingMLP(tiny_config(image_size=24, **fields), rngs=nnx.Rngs(0))))
    assert {name: v.shape for name, v in after.items()} == {name: v.shape for name, v in expected.items()}
    for name, variable in after.items():
        assert variable.dtype == expected[name].dtype
        if variable.shape == before[name].shape:
            np.testing.assert_array_equal(variable[...], before[name][...])
        if name.endswith("var"):
            assert np.all(variable[...] > 0)


def test_against_numpy():
    network = random_model()
    grown = adapted(network, image_size=24)
    before, after = variables(network), variables(grown)
    there, back = hat(4, 6), hat(6, 4)
    for axis in ("height", "width"):
        prefix = f"stages.0.blocks.token.{axis}"
        old, new = before[f"{prefix}.kernel"][...], np.asarray(after[f"{prefix}.kernel"][...])
        np.testing.assert_allclose(new, there @ np.asarray(old) @ back, rtol=1e-5, atol=1e-6)
        # The output for equal inputs, and with it the mean, stays what it was.
        np.testing.assert_allclose(new.sum(2), np.asarray(old).sum(2) @ there.T, rtol=1e-4, atol=1e-6)
        for name in ("bias", "norm.scale", "norm.bias", "norm.mean", "norm.var"):
            old, new = before[f"{prefix}.{name}"][...], after[f"{prefix}.{name}"][...]
            # Independent inputs of variance 1 have the sum of the squared weights.
            squares = [np.square(variables(n)[f"{prefix}.kernel"][...]).sum(2) for n in (network, grown)]
            factor = squares[1] / (squares[0] @ there.T) if name == "norm.var" else 1
            np.testing.assert_allclose(new, old @ there.T * factor, rtol=1e-5, atol=1e-6)
    for norm in ("hidden_norm", "norm"):
        for name in ("scale", "bias", "mean", "var"):
            path = f"stages.0.blocks.channel.{norm}.{name}"
            old, new = np.asarray(before[path][...]).reshape(-1, 4, 4), np.asarray(after[path][...]).reshape(-1, 6, 6)
            np.testing.assert_allclose(new, there @ old @ there.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [8, 24, 32])
def test_equal_pixels_are_scored_alike_at_any_size(size):
    """Where all positions are alike the grid cannot matter: the same spikes everywhere, and the same scores."""
    fields: dict[str, Any] = dict(depths=(2,), image_size=16)
    network = random_model(**fields)
    for name, variable in variables(network).items():
        value = np.asarray(variable[...])
        if "token.height" in name or "token.width" in name or "channel.hidden_norm" in name or "channel.norm" in name:
            if name.endswith("kernel"):
                value = value / value.sum(-1, keepdims=True) * 0.7
            elif value.ndim == 2:
                value = np.broadcast_to(value[:, :1], value.shape)
            variable.set_value(jnp.asarray(value))
    network.eval()
    shades = jnp.linspace(-1, 1, 5)[:, None, None, None]
    run = jax.jit(lambda images: network(images, observe=lambda name, value: value.mean()))
    expected, seen = run(jnp.broadcast_to(shades, (5, 16, 16, 1)))
    assert any(0 < value < 1 for name, value in seen.items() if name.endswith("spikes"))
    model = adapted(network, **{**fields, "image_size": size})
    scores = jax.jit(lambda images: model(images))(jnp.broadcast_to(shades, (5, size, size, 1)))
    np.testing.assert_allclose(scores, expected, atol=2e-5)


def test_another_number_of_classes_gets_a_drawn_head(tmp_path):
    network = random_model()
    weights.save(tmp_path, network, meta_for(network))
    config, mesh = tiny_config(num_classes=5, image_size=32), make_mesh(jax.devices()[:1])
    states = [load_state(config, optax.trace(0.9), str(tmp_path), mesh, seed) for seed in (0, 0, 1)]
    heads = [state.params["head"] for state in states]
    assert heads[0]["kernel"].shape == (12, 5) and heads[0]["bias"].shape == (5,)
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(heads[0][name][...], heads[1][name][...])
        assert np.any(heads[0][name][...] != heads[2][name][...])
        assert 0 < np.abs(heads[0][name][...]).max() <= 12**-0.5
    abstract = abstract_state(config, optax.trace(0.9))[1]
    assert jax.tree.structure(states[0]) == jax.tree.structure(abstract)
    assert jax.tree.map(jnp.shape, states[0]) == jax.tree.map(jnp.shape, abstract)
    np.testing.assert_array_equal(states[0].params["norm"]["scale"][...], network.norm.scale[...])
    said = describe(str(tmp_path), config)
    assert "resampled from 16 to 32 px" in said and "a new head (3 classes there, 5 now)" in said
    assert describe(str(tmp_path), network.config) == f"the weights of {tmp_path}"
