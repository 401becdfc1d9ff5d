"""The table against the Flax model: its intermediates, its parameters, and its synapses, counted spike by spike."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spiking_mlp_jax import ModelConfig, SpikingMLP
from spiking_mlp_jax.models import spiking_mlp
from spiking_mlp_jax.models.topology import (
    Walk,
    dense_operations,
    fan_out,
    intermediate_names,
    intermediate_shapes,
    layers,
    neuron_counts,
    neurons,
)
from spiking_mlp_jax.nn.fused import potential_shape
from spiking_mlp_jax.nn.layers import Conv, Neuron
from spiking_mlp_jax.train.dry_run import macs_per_step
from tests.support.tiers import rest_slow


def config_of(encoding, depths, patch_size=1, **fields):
    base = dict(image_size=4 * patch_size, in_channels=1, num_classes=5, dim=3, expansion=2, time_steps=1)
    return ModelConfig(encoding=encoding, depths=depths, patch_size=patch_size, **{**base, **fields})


def layers_of(config):
    return [name for name in intermediate_names(config) if name.endswith(".spikes")]


def random_config(seed, **fields):
    rng = np.random.default_rng(seed)
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    depths = pick((1,), (2, 1), (1, 2), (1, 1, 2))
    patch = pick(1, 2, 3)
    return ModelConfig(**{
        "image_size": patch * 2 ** (len(depths) - 1) * pick(1, 2, 3), "in_channels": pick(1, 3),
        "num_classes": pick(1, 5), "patch_size": patch, "dim": 3 * pick(1, 2, 3), "depths": depths,
        "expansion": pick(1, 2, 3), "norm_features": pick("token", "channel"), "time_steps": pick(2, 3), **fields,
    })  # fmt: skip


KINDS = [
    *[
        dict(encoding=encoding, norm=norm)
        for encoding in ("spe", "plain")
        for norm in ("batch", "layer", "tdbn", "tebn")
    ],
    *[dict(encoding=encoding, neuron=neuron) for encoding in ("spe", "plain") for neuron in ("if", "plif")],
]


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_the_models_intermediates_are_the_tables_neurons(kind):
    for seed in range(2):
        config, shapes = random_config(seed, **KINDS[kind]), {}

        def trace(images, config=config, shapes=shapes):
            model = SpikingMLP(config, rngs=nnx.Rngs(0))
            shapes.update({name: x.shape[1:] for name, x in model(images, observe=lambda name, x: x)[1].items()})

        jax.eval_shape(trace, jnp.zeros((1, config.image_size, config.image_size, config.in_channels)))
        assert shapes == intermediate_shapes(config)
        assert list(shapes) == intermediate_names(config)


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_every_array_of_the_model_belongs_to_a_layer(kind):
    config = random_config(kind, **KINDS[kind])
    model = nnx.eval_shape(lambda: SpikingMLP(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    arrays = {path: variable.shape for path, variable in nnx.to_flat_state(state)}
    owners = {path: [row.name for row in layers(config) if path[:-1] in row.paths] for path in arrays}
    for path, names in owners.items():
        # Those of blocks are stacked: one array for the same layer of each.
        depth = config.depths[int(str(path[1]))] if "blocks" in path else 1
        assert len(names) == depth and len({name.rpartition(".")[2] for name in names}) == 1, path
    for row in layers(config):
        skip = 0 if row.block is None else 1
        out, sides = 0, {"outputs": row.out, "inputs": row.fan_in, "tokens": row.positions}
        for kernel, norm in zip(row.kernels, row.norms, strict=True) if row.kernels else ():
            shape = arrays[*kernel, "kernel"][skip:]
            shape = shape[::-1] if row.kind in ("height", "width") else shape
            assert np.prod(shape[:-1]) == row.fan_in, row.name
            out += shape[-1]
            if row.norm == "sample":
                assert (*norm, "var") not in arrays
            else:
                assert arrays[*norm, "var"][skip:] == (sides[row.norm] // len(row.norms),)
        assert out == (row.out if row.kernels else 0), row.name


class Flow(Walk):
    """Values are (number of channels, names of the neurons that they come from); all that is visited is recorded."""

    def __init__(self, c):
        super().__init__(c)
        self.visited, self.fired, self.scopes = [], [], []

    def scope(self, name):
        self.scopes.append(name)
        return super().scope(name)

    def linear(self, layer, spikes):
        channels, come_from = spikes
        assert come_from == layer.reads
        # Windows take several positions of a channel; mixing takes positions and leaves the channels.
        assert channels == layer.fan_in // (layer.window[0] ** 2 if layer.window else 1) or layer.axis < -1
        self.visited.append(layer.name)
        return channels if layer.axis < -1 else layer.out, (layer.name,)

    def identity(self, layer, spikes):
        assert spikes == (layer.out, layer.reads)
        self.visited.append(layer.name)
        return layer.out, (layer.name,)

    def head(self, layer, spikes):
        return self.linear(layer, spikes)

    def fire(self, neurons, potential):
        assert potential[0] == neurons.shape[-1] and neurons.layer in potential[1]
        self.fired.append(neurons.name)
        return potential[0], (neurons.name,)

    def add(self, a, b, place):
        to = self.layers[b[1][-1]].neurons
        assert a[0] == b[0] and to is not None and place == to.place
        return a[0], a[1] + b[1]

    def split(self, potential):
        return [(potential[0] // 3, potential[1])] * 3

    def concat(self, parts):
        return sum(part[0] for part in parts), sum((part[1] for part in parts), ())


@pytest.mark.parametrize("encoding", ["spe", "plain"])
def test_the_walk_visits_the_table_in_order(encoding):
    config = random_config(3, encoding=encoding, depths=(1, 2), image_size=8, patch_size=1)
    flow = Flow(config)
    assert flow.run((config.in_channels, ())) == (config.num_classes, ("head",))
    assert flow.visited == [row.name for row in layers(config)]
    assert flow.fired == [row.name for row in neurons(config)]
    assert set(flow.scopes) >= {row.name for row in neurons(config) if ".node" not in row.name} | {"head"}


def test_the_table_needs_no_jax():
    program = "import sys; import spiking_mlp_jax.models.topology; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


class SingleSpikes:
    """Stands in for all neurons of a network: image n of the batch has one spike in all, neuron n of one layer."""

    def __init__(self, patch):
        patch.setattr(spiking_mlp, "fire", self.fire)
        patch.setattr(Neuron, "__call__", lambda neuron, x: self.spikes(x))
        patch.setattr(spiking_mlp, "mix_axis", self.counting(spiking_mlp.mix_axis))
        patch.setattr(spiking_mlp, "spike_dense", self.counting(spiking_mlp.spike_dense))
        patch.setattr(spiking_mlp, "convolve", self.counting(spiking_mlp.convolve))
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
    ("encoding", "depths"),
    rest_slow([("plain", (1,)), ("spe", (2,)), ("spe", (1, 2)), ("spe", (1, 1, 1)), ("plain", (2, 1, 1))]),
)
def test_spikes_reach_what_is_counted(encoding, depths, monkeypatch):
    config = config_of(encoding, depths)
    names, counts, fans = layers_of(config), neuron_counts(config), fan_out(config)
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


def written_out_macs(model):
    """Multiply-accumulates of an image and time step, without the table."""
    total = model.stage_side(0) ** 2 * model.patch_size**2 * model.in_channels * model.dim
    for stage, depth in enumerate(model.depths):
        side, channels = model.stage_side(stage), model.stage_dim(stage)
        tokens = side**2
        if stage and model.encoding == "spe":
            node = channels // 3
            total += tokens * 9 * (3 * (channels // 2) * node + 2 * node * node)
        elif stage:
            total += tokens * 4 * (channels // 2) * channels
        mixing = 2 * side * tokens * channels + 3 * tokens * channels**2
        total += depth * (mixing + 2 * model.expansion * tokens * channels**2)
    return total + model.stage_dim(model.stages - 1) * model.num_classes


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("encoding", ["spe", "plain"])
def test_dense_multiply_accumulates(encoding, seed):
    config = random_config(seed, encoding=encoding)
    assert macs_per_step(config) == written_out_macs(config)


@pytest.mark.parametrize("name", ["mlp_s", "mlp_spe_t"])
def test_the_papers_networks_have_all_layers(name):
    config = ModelConfig.variant(name, image_size=32)
    assert list(fan_out(config)) == layers_of(config)
