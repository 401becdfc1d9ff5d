import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiking_mlp_jax.analysis.activity.rates import rates
from spiking_mlp_jax.analysis.activity.stream import in_network_order, spikes_of_first
from spiking_mlp_jax.models.topology import intermediate_names
from spiking_mlp_jax.train.evaluate import silent_and_saturated
from tests.support.random_model import random_model, set_value, variables


@pytest.fixture(scope="module")
def model():
    """A network whose first layer is silent and whose last one always fires."""
    model = random_model(depths=(1,))
    set_value(model, "stages.0.encode.norm.bias", -100)
    set_value(model, "stages.0.blocks.channel.norm.bias", 1e4)
    return model


def test_rates_spikes_and_silence_agree(model):
    before = {name: np.asarray(variable[...]) for name, variable in variables(model).items()}
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 1)), jnp.float32)
    logits, spikes = spikes_of_first(model, images)
    layers = rates(model, images[:1]).layer
    names = [name for name in intermediate_names(model.config) if name.endswith(".spikes")]
    assert list(layers) == list(spikes) == names
    for name, fired in spikes.items():
        assert fired.dtype == bool
        assert fired.shape[:3] == (2, 4, 4)
        assert layers[name] == pytest.approx(fired.mean(), abs=1e-6)
    assert spikes["stage0.block0.channel.hidden.spikes"].shape == (2, 4, 4, 12)
    np.testing.assert_allclose(logits, np.asarray(model(images)), rtol=1e-5, atol=1e-5)
    silent, saturated = silent_and_saturated(layers)
    assert "stage0.encode.spikes" in silent
    assert "stage0.block0.channel.spikes" in saturated
    for name, variable in variables(model).items():
        np.testing.assert_array_equal(variable[...], before[name])


def test_network_order(model):
    names = intermediate_names(model.config)
    shuffled = dict.fromkeys(sorted(names), 1) | {"no such layer": 2}
    assert list(in_network_order(shuffled, model.config)) == names


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1)))
def test_silent_and_saturated(rates):
    silent, saturated = silent_and_saturated(rates)
    for name, rate in rates.items():
        assert (name in silent) == (rate < 0.001)
        assert (name in saturated) == (rate > 0.95)


def test_the_bounds_themselves_are_healthy():
    assert silent_and_saturated({"a": 0.001, "b": 0.95, "c": 0.0, "d": 1.0}) == (["c"], ["d"])
    assert silent_and_saturated({}) == ([], [])
