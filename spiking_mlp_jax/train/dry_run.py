"""What an experiment would take, found without allocating any of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax

from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.topology import layers
from spiking_mlp_jax.train.config import Config, model_config
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.sharding import abstract_batch, abstract_with_sharding, bytes_of, device_bytes, make_mesh
from spiking_mlp_jax.train.state import TrainState, abstract_state
from spiking_mlp_jax.train.step import make_train_step


def macs_per_step(model: ModelConfig) -> int:
    """Multiply-accumulate operations of one image and time step, as if every spike were a number ("dense").

    Convolutions and linear layers count, the head included; norms, neurons and sums do not.
    """
    return sum(layer.macs for layer in layers(model))


def parameter_count(state: TrainState) -> int:
    """Number of trained parameters of a state, abstract or not."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))


def describe(config: Config) -> Iterator[str]:
    """The report of a dry run.

    Args:
        config: an experiment that `validate` has accepted.

    Yields:
        lines with the devices, parameters, dense GMAC per time step, the memory of each device (parameters, running
        averages, optimizer state, a batch) and, last because the training step has to be compiled for it, the step's
        temporaries as this machine's compiler plans them.
    """
    model = model_config(config)
    # Only the learning rate depends on the number of steps an epoch.
    optimizer = make_optimizer(config, steps_per_epoch=1)
    graphdef, state = abstract_state(model, optimizer, average=bool(config.ema_decay))
    mesh = make_mesh(fsdp=config.fsdp)
    batch = abstract_batch(config.batch_size, model.image_size, model.in_channels, mesh)
    gmac = macs_per_step(model) / 1e9
    together = config.batch_size // config.accumulate // (mesh.size if config.norm_statistics == "device" else 1)
    yield _row("devices", f"{mesh.size} x {jax.devices()[0].device_kind}")
    yield _row("parameters", f"{parameter_count(state):,}")
    yield _row("GMAC per time step", f"{gmac:.2f} dense, for one image")
    yield _row("GMAC per image", f"{gmac * model.time_steps:.2f} dense, over {model.time_steps} time steps")
    yield _row("images per device", f"{config.batch_size // mesh.size} a step")
    yield _row("norm statistics", f"of {together} images")
    yield "memory per device"
    yield _row("  parameters", _size(device_bytes(state.params, config.fsdp)))
    yield _row("  running averages", _size(bytes_of(state.stats)))
    yield _row("  optimizer state", _size(device_bytes(state.opt_state, config.fsdp)))
    if config.ema_decay:
        yield _row("  averaged weights", _size(device_bytes(state.average, config.fsdp)))
    yield _row("  batch", _size(bytes_of(batch) / mesh.size))
    step = make_train_step(config, graphdef, optimizer, mesh)
    # CPUs: the same plan of the memory, and machine code in a quarter of the time, which nothing runs.
    cpu = jax.default_backend() == "cpu"
    quick = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False} if cpu else None
    memory = step.lower(abstract_with_sharding(state, mesh), batch).compile(quick).memory_analysis()
    size = "unknown on this platform" if memory is None else _size(memory.temp_size_in_bytes)
    yield _row("  temporaries", f"{size}, gradients included, as compiled on this machine")


def _row(name, value):
    return f"{name:<22}{value}"


def _size(count):
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
