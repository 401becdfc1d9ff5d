"""What an experiment would take, found without allocating any of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import numpy as np

from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.topology import layers
from spiking_mlp_jax.train.average import with_average
from spiking_mlp_jax.train.config import Config, model_config
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.roofline import CHIPS, Work, bounds, bytes_of, device_bytes, device_work
from spiking_mlp_jax.train.sharding import make_mesh, placed, split_batch
from spiking_mlp_jax.train.state import TrainState, abstract_state
from spiking_mlp_jax.train.step import step_from_config


def macs_per_step(model: ModelConfig) -> int:
    """Multiply-accumulate operations of one image and time step, as if every spike were a number ("dense").

    Convolutions and linear maps count, the head included; norms, neurons and sums do not.
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
        lines with the parameters, dense GMAC per time step, the memory of each device (parameters, running averages,
        optimiser state, a batch), what it computes and moves in a step with the bounds that follow on some chips and,
        last because the training step has to be compiled for it, the step's temporaries as this machine's compiler
        plans them.
    """
    model = model_config(config)
    # The number of steps an epoch shapes only the learning rate.
    optimizer = make_optimizer(config, steps_per_epoch=1)
    graphdef, state = abstract_state(model, optimizer)
    mesh = make_mesh(fsdp=config.fsdp)
    shape = (config.batch_size, model.image_size, model.image_size, model.in_channels)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, np.uint8, sharding=split_batch(mesh)),
        "label": jax.ShapeDtypeStruct(shape[:1], np.int32, sharding=split_batch(mesh)),
    }
    macs = macs_per_step(model)
    yield _row("parameters", f"{parameter_count(state):,}")
    yield _row("GMAC per time step", f"{macs / 1e9:.2f} dense, for one image")
    yield _row("GMAC per image", f"{macs * model.time_steps / 1e9:.2f} dense, over {model.time_steps} time steps")
    yield _row("devices", f"{mesh.size} x {jax.devices()[0].device_kind}")
    yield _row("images per device", f"{config.batch_size // mesh.size} a step")
    yield "memory per device"
    yield _row("  parameters", _size(device_bytes(state.params, config.fsdp)))
    yield _row("  running averages", _size(bytes_of(state.stats)))
    yield _row("  optimiser state", _size(device_bytes(state.opt_state, config.fsdp)))
    if config.ema_decay:
        state = jax.eval_shape(with_average, state)
        yield _row("  averaged weights", _size(device_bytes(state.average, config.fsdp)))
    yield _row("  batch", _size(bytes_of(batch) / mesh.size))
    yield from _bounds(config, device_work(config, state, macs, mesh.size), mesh.size)
    step = step_from_config(config, graphdef, optimizer, mesh)
    memory = step.lower(placed(state, mesh), batch).compile().memory_analysis()
    size = "unknown on this platform" if memory is None else _size(memory.temp_size_in_bytes)
    yield _row("  temporaries", f"{size}, gradients included")


def _row(name, value):
    return f"{name:<22}{value}"


def _bounds(config: Config, work: Work, devices: int) -> Iterator[str]:
    images = config.batch_size // config.accumulate // (devices if config.norm_statistics == "device" else 1)
    yield _row("norm statistics", f"of {images} images")
    yield "each device and step"
    yield _row("  computes", f"{work.flops / 1e12:.2f} TFLOP")
    yield _row("  moves in memory", f"at least {_size(work.memory_bytes)}")
    yield _row("  sends", f"at least {_size(work.link_bytes)} in {work.messages} message(s)")
    yield f"not faster on {devices} chips than (computed from the vendors' figures, not measured)"
    for name, chip in CHIPS.items():
        if devices <= chip.group or chip.outside is not None:
            least = bounds(work, chip, config.dtype, devices)
            speed = config.batch_size / least.step
            yield _row(f"  {name}", f"{1 / least.step:.2f} steps/s, {speed:,.0f} images/s: limited by {least.limit}")
    yield "memory per device, as compiled on this machine"


def _size(count):
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
