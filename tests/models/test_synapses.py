"""Fan-out against the network's own maps: one spike at a time goes in, and what it reaches is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spiking_mlp_jax import ModelConfig, SpikingMLP
from spiking_mlp_jax.models import encoding as patch_module
from spiking_mlp_jax.models import mixing
from spiking_mlp_jax.models.spiking_mlp import intermediate_names
from spiking_mlp_jax.models.synapses import dense_operations, fan_out, neurons
from spiking_mlp_jax.nn.fused import potential_shape
from spiking_mlp_jax.nn.layers import Conv, Neuron
from spiking_mlp_jax.train.dry_run import macs_per_step


def config_of(encoding, depths, patch_size=1, **fields):
    base = dict(image_size=4 * patch_size, in_channels=1, num_classes=5, dim=3, expansion=2, time_steps=1)
    return ModelConfig(encoding=encoding, depths=depths, patch_size=patch_size, **{**base, **fields})


def layers_of(config):
    return [name for name in intermediate_names(config) if name.endswith(".spikes")]


class SingleSpikes:
    """Stands in for all neurons of a network: image n of the batch has one spike in all, neuron n of one layer."""

    def __init__(self, patch):
        patch.setattr(mixing, "fire", self.fire)
        patch.setattr(patch_module, "fire", self.fire)
        patch.setattr(Neuron, "__call__", lambda neuron, x: self.spikes(x))
        patch.setattr(mixing, "mix_axis", self.counting(mixing.mix_axis))
        patch.setattr(mixing, "spike_dense", self.counting(mixing.spike_dense))
        patch.setattr(patch_module, "convolve", self.counting(patch_module.convolve))
        patch.setattr(Conv, "__call__", self.counting(Conv.__call__))
        patch.setattr(nnx.Linear, "__call__", self.counting(nnx.Linear.__call__))

    def spikes(self, x):
        index, self.index = self.index, self.index + 1
        self.shapes.append(x.shape[2:])
        if index != self.layer:
            return jnp.zeros(x.shape)
        # One batch size for all layers, so that little is compiled: the images beyond the neurons stay without a spike.
        return jnp.eye(x.shape[0], x[0].size).reshape(x.shape)

    def fire(self, norm, neuron, z, **parts):
        skip = parts.get("skip")
        shape = z.shape if skip is None else potential_shape(z, skip)
        return self.spikes(jnp.zeros(shape)), jnp.zeros(shape) + (0 if skip is None else skip)

    def counting(self, function):
        def counted(*arguments):
            y = function(*arguments)
            # The stem's is 0, as its pixels are.
            self.reached += int(jnp.count_nonzero(y))
            return y

        return counted

    def count(self, model, layer, batch):
        """Synapses that all neurons of a layer reach together, and the shape [H, W, C] or [HW, C] of every layer."""
        self.layer, self.index, self.reached, self.shapes = layer, 0, 0, []
        model(jnp.zeros((batch, model.config.image_size, model.config.image_size, 1)))
        return self.reached, self.shapes


@pytest.mark.parametrize(
    ("encoding", "depths"), [("spe", (2,)), ("spe", (1, 2)), ("spe", (1, 1, 1)), ("plain", (1,)), ("plain", (2, 1, 1))]
)
def test_spikes_reach_what_is_counted(encoding, depths, monkeypatch):
    config = config_of(encoding, depths)
    names, counts, fans = layers_of(config), neurons(config), fan_out(config)
    assert list(counts) == list(fans) == names
    model = SpikingMLP(config, rngs=nnx.Rngs(0))
    model.eval()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable.set_value(jnp.full(variable.shape, 0.0 if path[-1] == "bias" else 1.0))
    spikes = SingleSpikes(monkeypatch)
    # Without jit a scan is a Python loop, so that blocks come one after the other.
    with jax.disable_jit():
        for layer, name in enumerate(names):
            reached, shapes = spikes.count(model, layer, max(counts.values()))
            assert reached / counts[name] == pytest.approx(fans[name], rel=1e-12), name
        assert [int(np.prod(shape)) for shape in shapes] == list(counts.values())


def test_borders_reach_less():
    config = config_of("spe", (1, 1), image_size=8)
    fans = fan_out(config)
    # 8 positions in 4 windows of 3 that step by 2: the first window lacks one. 4 positions in 4 windows: both ends do.
    assert fans["stage0.block0.channel.spikes"] == pytest.approx(6 * (11 / 8) ** 2)
    assert fans["stage1.encode.node1.spikes"] == pytest.approx(2 * (10 / 4) ** 2)
    plain = fan_out(config_of("plain", (1, 1), image_size=8))
    assert plain["stage0.block0.channel.spikes"] == 6 and all(isinstance(fan, int) for fan in plain.values())


@pytest.mark.parametrize("depths", [(1,), (2, 1, 3)])
def test_the_dense_count_is_that_of_the_dry_run(depths):
    """Where nothing is padded; the dry run counts the stem as well, and the head after the mean over tokens."""
    config = config_of("plain", depths, patch_size=2, time_steps=3)
    last = config.stages - 1
    tokens = config.stage_side(last) ** 2
    stem = config.stage_side(0) ** 2 * config.patch_size**2 * config.dim
    head = config.stage_dim(last) * config.num_classes
    assert dense_operations(config) == 3 * (macs_per_step(config) - stem + (tokens - 1) * head)


@pytest.mark.parametrize("name", ["mlp_s", "mlp_spe_t"])
def test_the_papers_networks_have_all_layers(name):
    config = ModelConfig.variant(name, image_size=32)
    assert list(fan_out(config)) == layers_of(config)
