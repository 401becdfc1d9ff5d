"""NIR graphs of folded networks: they run as the folded network does, and say what NIR says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import random_model
from test_fold import with_scales

from spiking_mlp_jax.infer.fold import fold
from spiking_mlp_jax.infer.folded import _Forward
from spiking_mlp_jax.interop.nir_export import to_nir, write_nir
from spiking_mlp_jax.interop.nir_import import from_nir, read_nir


class Recorder(_Forward):
    """Keeps every layer's spikes [B, T, ...] under its node's name."""

    def fire(self, name, x, *constants):
        spikes = super().fire(name, x, *constants)
        self.__dict__.setdefault("seen", {})[name.replace(".", "_")] = spikes
        return spikes


def channels_first(spikes):
    """[B, T, tokens or rows and columns, C] as [B, T, C * tokens]."""
    return jnp.moveaxis(spikes, -1, 2).reshape(*spikes.shape[:2], -1)


def folded_spikes(net, images):
    run = Recorder(net, None)
    x = images[:, None]
    for i in range(net.config.stages):
        x = run.stage(i, x)
    return {name: channels_first(spikes) for name, spikes in run.seen.items()}


def graph_input(net, images):
    """Images [B, H, W, C] as the graph of either form takes them, but for the shape."""
    return np.moveaxis(np.asarray(images), 3, 1).reshape(len(images), -1)


VARIANTS = [
    dict(),
    dict(encoding="plain", depths=(1, 1)),
    dict(norm_features="channel", norm="tdbn", depths=(1, 1)),
    dict(neuron="if", depths=(1,)),
    dict(neuron="plif", encoding="plain", depths=(1, 1)),
    dict(decay_input=False, tau=3.0, depths=(1,)),
    dict(v_reset=-0.25, v_threshold=0.7, tau=1.25, depths=(1,)),
    dict(depths=(1, 1, 1), in_channels=3, time_steps=3),
    dict(depths=(1,), patch_size=1, image_size=4, dim=5),
]


def random_net(fields):
    net = fold(with_scales(random_model(seed=3, **fields), np.random.default_rng(0)))
    c = net.config
    images = jax.random.normal(jax.random.key(0), (3, c.image_size, c.image_size, c.in_channels), float)
    return net, images


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_a_graph_read_back_fires_as_the_folded_network_does(fields, x64, tmp_path):
    net, images = random_net(fields)
    expected, logits = jax.jit(lambda x: (folded_spikes(net, x), net(x)))(images)
    rates = [float(np.mean(spikes)) for spikes in expected.values()]
    assert 0.02 < np.mean(rates) < 0.98
    for form in ("rows", "dense"):
        write_nir(to_nir(net, form=form), tmp_path / "net.nir")
        back = from_nir(read_nir(tmp_path / "net.nir"))
        found, spikes = back.run(graph_input(net, images).reshape(-1, *back.input_shape))
        assert spikes.keys() == expected.keys()
        for name, values in spikes.items():
            assert (np.asarray(values).reshape(expected[name].shape) == (expected[name] > 0)).all(), name
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-9 * np.abs(logits).max())
