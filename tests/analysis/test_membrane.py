"""Membrane potentials: for every kind of neuron, reset and norm they are what the network fired by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiking_mlp_jax.analysis.activity import membrane
from spiking_mlp_jax.analysis.activity.measure import measure
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.nn.dynamics import Constants
from tests.support.random_model import random_model, variables

IMAGES = np.random.default_rng(0).normal(0.3, 1, size=(3, 16, 16, 1)).astype(np.float32)

# Every neuron, reset, norm and encoding at least once; blocks are stacked, and learned time constants differ.
NETWORKS = [
    dict(neuron="plif", v_reset=None, norm="tebn"),
    dict(neuron="plif", tau_per_channel=True),
    dict(neuron="lif", v_reset=None, norm="layer", tau=1.25, decay_input=False),
    dict(neuron="lif", v_reset=-0.2, norm="tdbn", encoding="plain", v_threshold=0.7, tau=3.0),
    dict(neuron="if", norm_features="channel"),
    dict(neuron="plif", dtype="bfloat16", depths=(2,), decay_input=False, v_reset=0.1),
]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: "-".join(map(str, network.values())))
def test_potentials_reproduce_the_spikes(network):
    model = random_model(time_steps=3, **network)
    measured = measure(model, IMAGES, labelled=False, batch_size=2)
    found, rates = measured.membrane, measured.rates.layer
    assert found.mismatches == dict.fromkeys(found.counts, 0)
    assert list(found.counts) == list(rates)
    for name, rate in rates.items():
        assert found.above(name).mean() == pytest.approx(rate, abs=1e-6)
    assert sum(0.02 < rate < 0.98 for rate in rates.values()) >= len(rates) / 3
    assert found.v_threshold == model.config.v_threshold
    assert found.v_rest == (model.config.v_reset or 0)


def test_potentials_of_a_few_images_are_the_equations():
    """A network of PLIF neurons with soft reset: two blocks with time constants of their own, read by NumPy."""
    model = random_model(time_steps=3, depths=(2,), neuron="plif", v_reset=None)
    _, seen = jax.jit(lambda images: model(images, observe=lambda name, x: x))(IMAGES)
    found = membrane.membrane_potentials(model, jnp.asarray(IMAGES))
    paths = {
        "encode": "stages.0.neuron.w",
        "token.height": "stages.0.blocks.token.height.neuron.w",
        "token.width": "stages.0.blocks.token.width.neuron.w",
        "token": "stages.0.blocks.token_neuron.w",
        "channel.hidden": "stages.0.blocks.channel.neuron.w",
        "channel": "stages.0.blocks.channel_neuron.w",
    }
    assert len(found) == 11
    for layer, h in found.items():
        _, *block, part = layer.removesuffix(".spikes").replace(".block", ".").split(".", 2)
        w = np.asarray(variables(model)[paths[part]][...], float)
        tau = 1 + np.exp(-(w[int(block[0])] if block else w))
        x = np.asarray(seen[layer.replace("spikes", "potential")], float)
        spikes = np.asarray(seen[layer])
        assert h.shape == spikes.shape
        v = np.zeros(h[:, 0].shape)
        for t in range(3):
            charged = v + (x[:, min(t, x.shape[1] - 1)] - v) / tau
            np.testing.assert_allclose(h[:, t], charged, rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(h[:, t] >= 1, spikes[:, t] == 1)
            v = charged - spikes[:, t]


def test_other_dynamics_would_be_noticed(monkeypatch):
    model = random_model(time_steps=3, depths=(1,))
    real = membrane.equations

    def leakier(model, layer, dtype):
        mode, k = real(model, layer, dtype)
        return mode, Constants(k.tau * 1.5, k.v_threshold, k.v_reset)

    monkeypatch.setattr(membrane, "equations", leakier)
    assert sum(measure(model, IMAGES, labelled=False).membrane.mismatches.values()) > 0


def test_bins():
    model = random_model(time_steps=1, depths=(1,), v_threshold=2.0, v_reset=1.0)
    part = membrane.Potentials(model, width=0.25, below=1, above=0.5)
    # An IF neuron's potentials at rest plus its input: 1 + x.
    mode, k = membrane.equations(model, "stage0.encode.spikes")
    x = np.array([-9, 0, 0.9, 1.0, 1.1, 9], np.float32).reshape(1, 1, 1, 1, 6)
    of = (mode.__class__(False, False, True, True, mode.surrogate), k)
    sums = part._sums(jnp.asarray(x), jnp.asarray(x >= 1), jnp.ones(1, bool), of)
    result = part.result({"a.spikes": jax.device_get(sums)})
    np.testing.assert_allclose(result.edges, [1, 1.25, 1.5, 1.75, 2, 2.25, 2.5])
    assert result.counts["a.spikes"].tolist() == [[2, 0, 0, 1, 2, 1]]
    assert result.above("a.spikes") == pytest.approx(0.5)
    assert result.mismatches == {"a.spikes": 0}


@pytest.mark.parametrize("change", [dict(width=0.0), dict(width=1e-9), dict(below=-1.0), dict(above=float("nan"))])
def test_impossible_bins(change):
    with pytest.raises(InputError, match="make no histogram") as error:
        membrane.Potentials(random_model(depths=(1,)), **change)
    assert "\n" not in str(error.value)


def test_unknown_layer():
    with pytest.raises(InputError, match=r"stage0\.encode\.spikes"):
        membrane.equations(random_model(depths=(1,)), "stage0.encod.spikes")
