"""What training carries from step to step, and what it starts with."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import adapt as finetune
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.train.sharding import state_shardings


@flax.struct.dataclass
class TrainState:
    """State of a training run.

    Attributes:
        step: steps taken, int32 scalar.
        params: parameters, an nnx.State of nnx.Param.
        stats: running averages of the normalisation layers, an nnx.State of nnx.BatchStat.
        opt_state: the optimiser's state.
        average: moving averages of params and stats, an `average.Average`; None where none is kept.
    """

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any
    average: Any = None


def abstract_state(model: ModelConfig, optimizer: optax.GradientTransformation) -> tuple[nnx.GraphDef, TrainState]:
    """The structure of a run's state, without allocating any of it.

    Args:
        model: the network.
        optimizer: the optimiser.

    Returns:
        the network's graph definition, and a TrainState of jax.ShapeDtypeStruct.
    """
    graphdef = nnx.split(nnx.eval_shape(lambda: SpikingMLP(model, rngs=nnx.Rngs(0))), nnx.Param, nnx.BatchStat)[0]
    return graphdef, jax.eval_shape(lambda: _fresh(model, optimizer, 0))


def init_state(model: ModelConfig, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """A fresh state, made on the devices where it will live.

    Args:
        model: the network.
        optimizer: the optimiser.
        seed: of the initial weights.
        mesh: the devices.
    """
    _, abstract = abstract_state(model, optimizer)
    shardings = state_shardings(abstract, mesh)
    return jax.jit(lambda: _fresh(model, optimizer, seed), out_shardings=shardings)()


def load_state(
    model: ModelConfig, optimizer: optax.GradientTransformation, where: str, mesh: Mesh, seed: int = 0
) -> TrainState:
    """A state at step 0 with the parameters and running averages of saved weights.

    Args:
        model: the network; what changes no variable's shape, such as tau or time_steps (but with TEBN), may differ
            from that of the weights, and so may the image size and the number of classes, see `finetune.adapt`.
        optimizer: the optimiser, which starts anew.
        where: a workdir, a weights folder or the name of a shipped network, as `weights.find` takes it.
        mesh: the devices.
        seed: of a head for another number of classes.

    Raises:
        InputError: there are no such weights, they are damaged, or they are another architecture's; the sentence
            names the fields.
    """
    folder = weights.find(where)
    saved, _ = weights.read_config(folder)
    shapes = _shapes(model)
    if not _fits(model, saved, shapes):
        raise InputError(
            f"the weights in {folder}, which init_weights names, do not fit: they differ in "
            f"{', '.join(_shaping(model, saved, shapes))}; take the same values or other weights"
        )
    params, stats = finetune.adapt(weights.load(folder)[0], model, seed)
    state = TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params))
    # Copies: the training step takes the memory of what it is given.
    return jax.device_put(state, state_shardings(state, mesh), may_alias=False)


def _fits(model, saved, shapes):
    try:
        return (
            _shapes(dataclasses.replace(saved, **{name: getattr(model, name) for name in finetune.ADAPTABLE})) == shapes
        )
    except InputError:
        return False  # other patches or stages, which do not divide these images


def _shapes(model):
    network = nnx.eval_shape(lambda: SpikingMLP(model, rngs=nnx.Rngs(0)))
    return {path: variable.shape for path, variable in nnx.to_flat_state(nnx.state(network))}


def _shaping(model, saved, shapes):
    """The fields that differ and, of these, change shapes by themselves, in words."""
    for field in dataclasses.fields(model):
        there, now = getattr(saved, field.name), getattr(model, field.name)
        if there == now or field.name in finetune.ADAPTABLE:
            continue
        try:
            changed = _shapes(dataclasses.replace(model, **{field.name: there})) != shapes
        except InputError:
            changed = True  # with this field alone there is no such network
        if changed:
            yield f"{field.name} ({there} there, {now} now)"


def _fresh(model, optimizer, seed):
    _, params, stats = nnx.split(SpikingMLP(model, rngs=nnx.Rngs(seed)), nnx.Param, nnx.BatchStat)
    return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params))
