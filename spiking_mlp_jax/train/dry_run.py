"""What an experiment would take, found without allocating any of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import numpy as np

from spiking_mlp_jax.config import ModelConfig
from spiking_mlp_jax.train.average import with_average
from spiking_mlp_jax.train.config import Config, model_config
from spiking_mlp_jax.train.loss import make_activity, make_loss
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.sharding import make_mesh, replicated, split_batch
from spiking_mlp_jax.train.state import TrainState, abstract_state
from spiking_mlp_jax.train.step import make_train_step


def macs_per_step(model: ModelConfig) -> int:
    """Multiply-accumulate operations of one image and time step, as if every spike were a number ("dense").

    Convolutions and linear maps count, the head included; norms, neurons and sums do not.
    """
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


def parameter_count(state: TrainState) -> int:
    """Number of trained parameters of a state, abstract or not."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))


def describe(config: Config) -> Iterator[str]:
    """The report of a dry run.

    Args:
        config: an experiment that `validate` has accepted.

    Yields:
        lines with the parameters, dense GMAC per time step and the memory of each device: parameters, running
        averages, optimiser state, a batch and, last because the training step has to be compiled for it, the
        step's temporaries as this machine's compiler plans them.
    """
    model = model_config(config)
    # The number of steps an epoch shapes only the learning rate.
    optimizer = make_optimizer(config, steps_per_epoch=1)
    graphdef, state = abstract_state(model, optimizer)
    mesh = make_mesh()
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
    yield _row("  parameters", _size(_bytes(state.params)))
    yield _row("  running averages", _size(_bytes(state.stats)))
    yield _row("  optimiser state", _size(_bytes(state.opt_state)))
    if config.ema_decay:
        state = jax.eval_shape(with_average, state)
        yield _row("  averaged weights", _size(_bytes(state.average)))
    yield _row("  batch", _size(_bytes(batch) / mesh.size))
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), state)
    step = make_train_step(
        graphdef,
        optimizer,
        make_loss(config),
        config.mean,
        config.std,
        mesh,
        make_activity(config),
        ema_decay=config.ema_decay,
    )
    memory = step.lower(placed, batch).compile().memory_analysis()
    size = "unknown on this platform" if memory is None else _size(memory.temp_size_in_bytes)
    yield _row("  temporaries", f"{size}, gradients included")


def _row(name, value):
    return f"{name:<22}{value}"


def _bytes(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _size(count):
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
