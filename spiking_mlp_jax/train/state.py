"""What training carries from step to step."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from spiking_mlp_jax.config import ModelConfig
from spiking_mlp_jax.model import SpikingMLP
from spiking_mlp_jax.train.sharding import replicated


@flax.struct.dataclass
class TrainState:
    """State of a training run.

    Attributes:
        step: steps taken, int32 scalar.
        params: parameters, an nnx.State of nnx.Param.
        stats: running averages of the normalisation layers, an nnx.State of nnx.BatchStat.
        opt_state: the optimiser's state.
    """

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any


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
    shardings = jax.tree.map(lambda _: replicated(mesh), abstract)
    return jax.jit(lambda: _fresh(model, optimizer, seed), out_shardings=shardings)()


def _fresh(model, optimizer, seed):
    _, params, stats = nnx.split(SpikingMLP(model, rngs=nnx.Rngs(seed)), nnx.Param, nnx.BatchStat)
    return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params))
