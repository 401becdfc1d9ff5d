"""Bounds on the speed of a training step, from its work per device and the chip's peak figures.

A step takes at least as long as its arithmetic at peak, its memory traffic at full bandwidth, and its communication at
full link bandwidth; the bound is the longest of the three, as if they overlapped perfectly. A real step is slower:
products reach a fraction of the peak, neurons and norms run on vector units, and messages have latency. These are
bounds, not forecasts.

The memory bound assumes that everything between two matrix products passes through memory once, in the compute dtype,
as XLA does at best. A kernel that holds layers on the chip could be faster.

References: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", CACM 2009; Thakur et al.,
"Optimization of collective communication operations in MPICH", 2005 (ring all-reduce).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.topology import neuron_counts
from spiking_mlp_jax.train.config import Config, model_config
from spiking_mlp_jax.train.sharding import bytes_of, device_bytes, is_sharded, size_of
from spiking_mlp_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator, with its vendor's figures.

    Attributes:
        flops: peak of matrix products, FLOP/s by the products' dtype; "float32" as JAX multiplies it by default, in
            bfloat16 on a TPU and in TF32 on a GPU.
        memory: bytes.
        bandwidth: of that memory, bytes/s.
        link: to the other devices of a group, bytes/s in one direction, all links together.
        group: number of devices connected by these links.
        outside: bandwidth between groups, one device's share; None where it is not published.
        source: of the figures.
    """

    flops: Mapping[str, float]
    memory: float
    bandwidth: float
    link: float
    group: int
    outside: float | None
    source: str


CHIPS = {
    "TPU v4": Chip(
        flops={"bfloat16": 275e12, "float32": 275e12},
        memory=32 * 2**30,
        bandwidth=1200e9,
        link=6 * 50e9,
        group=4096,
        outside=None,
        source="docs.cloud.google.com/tpu/docs/v4; links: Jouppi et al., ISCA 2023 (arXiv 2304.01433), 6 of 50 GB/s",
    ),
    "TPU v5e": Chip(
        flops={"bfloat16": 197e12, "float32": 197e12},
        memory=16e9,
        bandwidth=819e9,
        link=400e9 / 2,
        group=256,
        outside=6.4e12 / 8 / 256,
        source="docs.cloud.google.com/tpu/docs/v5e: 400 GB/s a chip in both directions, 6.4 Tb/s a pod of 256 chips",
    ),
    "H100 SXM": Chip(
        flops={"bfloat16": 989.4e12, "float32": 494.7e12},
        memory=80e9,
        bandwidth=3350e9,
        link=900e9 / 2,
        group=8,
        outside=400e9 / 8,
        source="NVIDIA's H100 datasheet, without sparsity: NVLink 900 GB/s in both directions; 400 Gb/s a GPU between "
        "machines (DGX H100)",
    ),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one device in one step.

    Attributes:
        flops: of matrix products and convolutions, two for each multiply-accumulate.
        memory_bytes: read from and written to the device's memory, at least.
        link_bytes: sent to other devices, at least.
        messages: sequential collective operations, at least; their latencies are not in the bounds.
    """

    flops: float
    memory_bytes: float
    link_bytes: float
    messages: int


def macs_per_image(model: ModelConfig, macs_per_step: int) -> int:
    """Multiply-accumulates of one image: the stem's once, everything else's at each time step."""
    stem = model.stage_side(0) ** 2 * model.patch_size**2 * model.in_channels * model.dim
    return model.time_steps * (macs_per_step - stem) + stem


def training_flops(model: ModelConfig, macs_per_step: int, images: int) -> float:
    """FLOPs of a training step: forward, twice that backward, and the blocks' forward again with remat."""
    forward = 2.0 * macs_per_image(model, macs_per_step) * images
    return forward * (4 if model.remat == "block" else 3)


def bytes_per_neuron(model: ModelConfig) -> int:
    """Memory traffic of a training step in bytes per neuron and time step.

    Assumes that everything between two matrix products is one pass that reads its inputs and writes its results once,
    with s bytes per entry of the compute dtype. Forward: the product's result is written once and read twice
    (statistics first); spikes are written, and read by one product: 5 s. Backward: the result is read twice (sums,
    gradient), saved spikes of one byte are read, the neuron's gradient is written and read twice, that of the product's
    result written and read: 7 s + 1. Remat repeats the forward pass.
    """
    s = jnp.dtype(model.dtype).itemsize
    return 5 * s * (2 if model.remat == "block" else 1) + 7 * s + 1


def neuron_steps(model: ModelConfig) -> int:
    """Neurons times time steps of one image."""
    return model.time_steps * sum(neuron_counts(model).values())


def moved_in_memory(model: ModelConfig, images: int, parameter_bytes: float, state_bytes: float) -> float:
    """Memory traffic of a device in a step, in bytes.

    Args:
        model: the network.
        images: per device.
        parameter_bytes: of all parameters: read forward and backward, their gradient written and read.
        state_bytes: of this device's shard of parameters and optimizer state, which is read and written.
    """
    return neuron_steps(model) * images * bytes_per_neuron(model) + 4 * parameter_bytes + 2 * state_bytes


def all_reduce_bytes(size: float, devices: int) -> float:
    """Bytes that each device sends in a ring all-reduce of `size` bytes: 2 (n - 1) / n of them."""
    return 2 * (devices - 1) / devices * size


def gather_bytes(size: float, devices: int) -> float:
    """Bytes that each device sends in a ring all-gather or reduce-scatter: (n - 1) / n of `size`."""
    return (devices - 1) / devices * size


def moved_between(config: Config, state: TrainState, devices: int) -> tuple[float, int]:
    """Bytes that a device sends in a step, and the number of sequential messages.

    Args:
        config: the experiment.
        state: shapes of the training state.
        devices: their number.

    Returns:
        bytes; messages, at least: one for all that is reduced once a step, two more with `fsdp`, and with global
        statistics two forward (four with remat) and one backward per norm, block and micro-batch.
    """
    if devices == 1:
        return 0.0, 0
    model, fsdp, accumulate = model_config(config), config.fsdp, config.accumulate
    shared_bytes = sum(size_of(x) for x in jax.tree.leaves(state.params) if is_sharded(x.shape, config.fsdp))
    averages = sum(size_of(x) for x in jax.tree.leaves(state.stats) if _is_average(x))
    sent = all_reduce_bytes(bytes_of(state.params) - shared_bytes + averages, devices)
    # All-gather of parameters and reduce-scatter of gradients along "fsdp"; each shard is summed along "data".
    sent += 2 * gather_bytes(shared_bytes, fsdp) + all_reduce_bytes(shared_bytes / fsdp, devices // fsdp)
    messages = 1 if fsdp == 1 else 3
    if config.norm_statistics == "global":
        again = model.remat == "block"
        blocks = sum(size_of(x) for path, x in nnx.to_flat_state(state.stats) if "blocks" in path and _is_average(x))
        # Means and variances are reduced forward, two sums of the same size backward.
        sent += accumulate * all_reduce_bytes(2 * averages + again * blocks, devices)
        messages += accumulate * (3 * norms(model) + again * 2 * norms_of_block(model) * sum(model.depths))
    return sent, messages


def norms(model: ModelConfig) -> int:
    """Sequential batch norms of the network, including every block's."""
    encoding = 5 if model.encoding == "spe" else 1
    return 2 + encoding * (model.stages - 1) + norms_of_block(model) * sum(model.depths)


def norms_of_block(model: ModelConfig) -> int:
    """Batch norms of a block: height, width, fusion, two in the channel block; with "plain" also the identity's."""
    return (1 if model.norm == "layer" else 5) + (model.encoding == "plain")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Lower bounds on a step's three parts, in seconds."""

    compute: float
    memory: float
    link: float

    @property
    def step(self) -> float:
        """Lower bound on a step, in seconds."""
        return max(self.compute, self.memory, self.link)

    @property
    def limit(self) -> str:
        """The part that bounds a step."""
        return max(("compute", "memory", "link"), key=lambda name: getattr(self, name))

    def hours(self, steps: int) -> float:
        """Lower bound on this many steps, in hours."""
        return steps * self.step / 3600


def bounds(work: Work, chip: Chip, dtype: str, devices: int) -> Bounds:
    """Lower bounds on a step's time.

    Args:
        work: of one device.
        chip: the kind of device.
        dtype: of the products, "bfloat16" or "float32".
        devices: their number; beyond one group all traffic counts as between groups, as the slowest link of a ring
            decides.

    Raises:
        InputError: more than a group, and the bandwidth between groups is unknown.
    """
    link = chip.link if devices <= chip.group else chip.outside
    if link is None:
        raise InputError(f"at most {chip.group} of these chips can be connected, got {devices}")
    return Bounds(work.flops / chip.flops[dtype], work.memory_bytes / chip.bandwidth, work.link_bytes / link)


def device_work(config: Config, state: TrainState, macs_per_step: int, devices: int) -> Work:
    """The work of one device in a step.

    Args:
        config: the experiment.
        state: shapes of its training state.
        macs_per_step: `dry_run.macs_per_step` of its network.
        devices: their number.
    """
    model, images = model_config(config), config.batch_size // devices
    own = sum(device_bytes(tree, config.fsdp) for tree in (state.params, state.opt_state))
    in_memory = moved_in_memory(model, images, bytes_of(state.params), own)
    return Work(training_flops(model, macs_per_step, images), in_memory, *moved_between(config, state, devices))


def _is_average(x):
    # Integers are batch counters.
    return jnp.issubdtype(x.dtype, jnp.floating)


def training_steps(images: int, batch_size: int, epochs: int) -> int:
    """Steps of a run; an epoch's incomplete last batch is dropped."""
    return images // batch_size * epochs
