"""What other simulators make of exported NIR graphs: snnTorch and SpikingJelly, both by way of nirtorch."""

import jax
import jax.numpy as jnp
import nir
import numpy as np
import pytest

from benchmarks.nir_agreement import channels_first, compare, folded_spikes, image_batches, in_torch
from spiking_mlp_jax.deploy.fold import fold
from spiking_mlp_jax.interop.nir.export import to_nir, write_nir
from spiking_mlp_jax.interop.nir.graph import DT
from spiking_mlp_jax.models import weights
from tests.deploy.test_fold import with_scales
from tests.support.random_model import random_model

pytestmark = [
    pytest.mark.tools,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def read_back(net, path, form="dense"):
    write_nir(to_nir(net, form=form), path)
    return nir.read(path)


@pytest.mark.parametrize("tool", ["snntorch", "spikingjelly"])
def test_a_trained_network_fires_alike_in_another_simulator(tool, tmp_path):
    net = fold(weights.load(weights.find("fashion_mnist"))[0])
    graph = read_back(net, tmp_path / "net.nir")
    shape = tuple(graph.nodes["input"].input_type["input"])
    simulate = in_torch(graph, tool, net.config.time_steps, DT)
    batches = image_batches("fashion_mnist", None, 20, 20)
    found = compare(net, {tool: simulate}, batches, {tool: shape})[tool]
    assert found["images"] == 20 and found["spikes"] > 100_000
    # Another order of the sums moves a spike now and then, and strict > one more.
    assert found["other"] <= 2e-3 * found["spikes"] and found["classes"] <= 1


@pytest.mark.parametrize(
    ("tool", "fields"),
    [
        ("snntorch", dict(decay_input=False, tau=3.0)),
        ("snntorch", dict(neuron="plif", encoding="plain")),
        ("spikingjelly", dict(decay_input=False, tau=3.0)),
        ("spikingjelly", dict(neuron="plif", encoding="plain")),
        ("spikingjelly", dict(neuron="if")),
        ("spikingjelly", dict(v_reset=-0.25, v_threshold=0.7)),
    ],
    ids=str,
)
def test_other_neurons_fire_alike_in_another_simulator(tool, fields, tmp_path):
    net = fold(with_scales(random_model(seed=5, depths=(1, 1), **fields), np.random.default_rng(0)))
    graph = read_back(net, tmp_path / "net.nir")
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 1), float)
    expected = {name: np.asarray(values) > 0 for name, values in folded_spikes(net, images).items()}
    simulate = in_torch(graph, tool, net.config.time_steps, DT)
    scores, spikes = simulate(channels_first(images, tuple(graph.nodes["input"].input_type["input"])))
    other = sum(int((expected[name] != spikes[name]).sum()) for name in expected)
    assert other <= 1e-3 * sum(values.size for values in expected.values())
    assert (scores.argmax(1) == jnp.mean(net(images), 0).argmax(1)).mean() >= 0.8


@pytest.mark.parametrize(
    ("tool", "fields", "form", "said"),
    [
        ("snntorch", dict(), "rows", "v_leak not supported"),
        ("spikingjelly", dict(), "rows", "must be uniform across all neurons"),
        ("snntorch", dict(neuron="if"), "dense", "r != 1 not supported"),
        ("snntorch", dict(v_reset=-0.25, v_threshold=0.7), "dense", "v_leak not supported"),
    ],
    ids=str,
)
def test_what_a_simulator_does_not_take(tool, fields, form, said, tmp_path):
    net = fold(random_model(seed=5, depths=(1,), **fields))
    with pytest.raises((AssertionError, ValueError), match=said):
        in_torch(read_back(net, tmp_path / "net.nir", form), tool, 2, DT)
