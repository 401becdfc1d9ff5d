"""The arithmetic of the bounds, by hand and against what the compiled step really moves."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import roofline, scaling
from spiking_mlp_jax import SpikingMLP
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import VARIANTS, ModelConfig
from spiking_mlp_jax.nn.norm import BatchNorm
from spiking_mlp_jax.train.config import default_config, model_config
from spiking_mlp_jax.train.dry_run import macs_per_step
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.sharding import make_mesh, shared_axis
from spiking_mlp_jax.train.state import abstract_state

CHIP = roofline.Chip({"bfloat16": 100.0, "float32": 50.0}, 1000, 20.0, 4.0, 8, 1.0, "made up")


def test_bounds_by_hand():
    work = roofline.Work(flops=200.0, memory_bytes=60.0, link_bytes=4.0, messages=1)
    least = roofline.bounds(work, CHIP, "bfloat16", 8)
    assert (least.compute, least.memory, least.link) == (2.0, 3.0, 1.0)
    assert (least.step, least.limit) == (3.0, "memory")
    assert least.hours(2400) == 2.0
    # Half the peak in float32; between groups a quarter of the links.
    assert roofline.bounds(work, CHIP, "float32", 8).limit == "compute"
    assert roofline.bounds(work, CHIP, "bfloat16", 16).link == 4.0
    assert roofline.training_steps(1_281_167, 512, 100) == 250_200
    alone = types.SimpleNamespace(**{**vars(CHIP), "outside": None})
    with pytest.raises(InputError, match="at most 8 of these chips can be connected, got 16"):
        roofline.bounds(work, alone, "bfloat16", 16)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_collectives_by_simulation(devices):
    """A ring of devices that really sum: each sends one of n parts a turn, and adds or takes over what it gets."""
    held = np.random.default_rng(0).normal(size=(devices, devices, 3))  # device, part, values
    total, sent = held.sum(0), 0
    for turn in range(2 * (devices - 1)):
        parts = [(device - turn) % devices for device in range(devices)]
        messages = [held[device, parts[device]].copy() for device in range(devices)]
        sent += messages[0].nbytes
        for device, message in enumerate(messages):
            receiver, part = (device + 1) % devices, parts[device]
            held[receiver, part] = message + (held[receiver, part] if turn < devices - 1 else 0)
        if turn == devices - 2:
            assert roofline.gather_bytes(held[0].nbytes, devices) == sent
    np.testing.assert_allclose(held, np.broadcast_to(total, held.shape), rtol=1e-12)
    assert roofline.all_reduce_bytes(held[0].nbytes, devices) == sent


def test_a_small_network_by_hand():
    model = ModelConfig(
        image_size=4, in_channels=1, num_classes=2, patch_size=2, dim=3, depths=(1,), expansion=2, time_steps=5
    )
    # 2 x 2 tokens; stem 2 x 2 x 1 -> 3; rows and columns 2 x 2; fusion 9 -> 3; 3 -> 6 -> 3; head 3 -> 2.
    stem, rest = 4 * 4 * 3, 2 * 2 * 4 * 3 + 4 * 27 + 2 * 4 * 18 + 3 * 2
    assert roofline.macs_per_image(model, macs_per_step(model)) == stem + 5 * rest
    assert roofline.training_flops(model, macs_per_step(model), 7) == 2 * 3 * 7 * (stem + 5 * rest)
    # Six layers of 12 neurons, but the hidden one has 24.
    assert roofline.neuron_steps(model) == 5 * (5 * 12 + 24)
    assert roofline.bytes_per_neuron(model) == 4 * 12 + 1
    remat = ModelConfig(dtype="bfloat16", remat="block")
    assert roofline.bytes_per_neuron(remat) == 2 * 17 + 1
    assert roofline.training_flops(remat, 10**9, 1) / roofline.training_flops(ModelConfig(), 10**9, 1) == 4 / 3


def experiment(**fields):
    config = default_config()
    config.update(image_size=16, in_channels=1, num_classes=3, dim=48, depths=(1, 2), expansion=2, batch_size=64)
    config.update(fields)
    model = model_config(config)
    return config, model, abstract_state(model, make_optimizer(config, 1))[1]


@pytest.mark.parametrize("encoding", ["spe", "plain"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_norms_are_the_networks(encoding, norm):
    _, model, _ = experiment(encoding=encoding, norm=norm)
    network = nnx.eval_shape(lambda: SpikingMLP(model, rngs=nnx.Rngs(0)))
    # A stage's blocks are stacked: a norm there has a leading axis.
    counts = [
        node.num_batches.shape[0] if node.num_batches.shape else 1
        for _, node in nnx.iter_graph(network)
        if isinstance(node, BatchNorm)
    ]
    assert roofline.norms(model) == sum(counts)


def test_what_is_sent():
    config, _, state = experiment(norm_statistics="device")
    parameters = roofline.bytes_of(state.params)
    averages = sum(4 * x.size for x in jax.tree.leaves(state.stats) if x.dtype == jnp.float32)
    assert roofline.moved_between(config, state, 1) == (0.0, 0)
    assert roofline.moved_between(config, state, 8) == (2 * 7 / 8 * (parameters + averages), 1)
    config.accumulate = 4  # changes nothing: one reduction a step
    assert roofline.moved_between(config, state, 8) == (2 * 7 / 8 * (parameters + averages), 1)
    # Global statistics: means and variances, and two sums backward, in every micro-batch.
    config.norm_statistics = "global"
    sent, messages = roofline.moved_between(config, state, 8)
    assert sent == 2 * 7 / 8 * (parameters + averages + 4 * 2 * averages)
    assert messages == 1 + 4 * 3 * (1 + 5 + 1 + 5 * 3)
    # With remat a block's means and variances again.
    config.remat = "block"
    again, messages = roofline.moved_between(config, state, 8)
    blocks = [stage["blocks"] for stage in state.stats["stages"].values()]
    assert again - sent == 2 * 7 / 8 * 4 * sum(4 * x.size for x in jax.tree.leaves(blocks) if x.dtype == jnp.float32)
    assert messages == 1 + 4 * (3 * (1 + 5 + 1) + 5 * 5 * 3)


def test_shared_out_memory_and_what_it_sends():
    config, _, state = experiment(norm_statistics="device", fsdp=4)
    mesh = make_mesh(fsdp=4)
    shared = sum(
        4 * math.prod(x.shape) for x in jax.tree.leaves(state.params) if shared_axis(x.shape, mesh) is not None
    )
    whole = roofline.bytes_of(state.params)
    assert 0 < shared < whole
    assert roofline.device_bytes(state.params, 4) == whole - shared * 3 / 4
    averages = sum(4 * x.size for x in jax.tree.leaves(state.stats) if x.dtype == jnp.float32)
    sent, messages = roofline.moved_between(config, state, 8)
    # Small arrays as ever; parts gathered and scattered among 4, each summed between 2.
    assert sent == 2 * 7 / 8 * (whole - shared + averages) + 2 * 3 / 4 * shared + 2 * 1 / 2 * shared / 4
    assert messages == 3


@pytest.mark.slow
def test_the_papers_networks_in_one_table(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["scaling", "--devices", "256", "--no-compile", "--json", str(tmp_path / "scaling.json")]
    )
    assert scaling.main() == 0
    printed = capsys.readouterr().out
    rows = [row for row in printed.splitlines() if row.startswith("| mlp_spe_t | ")]
    # Memory, work, and one for each chip.
    assert len(rows) == 2 + 3
    assert all(name in printed for name in VARIANTS)
    assert (tmp_path / "scaling.json").exists()


def test_what_cannot_be_computed(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scaling", "--devices", "7"])
    assert scaling.main() == 2
    assert "not divisible by the 7 devices" in capsys.readouterr().err
