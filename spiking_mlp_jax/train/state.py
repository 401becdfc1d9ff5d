"""What training carries from step to step, what it starts from, and the moving average of the weights."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

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


class Average(NamedTuple):
    """Moving averages over the steps so far, shaped like what they are averages of.

    Attributes:
        params: of the parameters.
        stats: of the running averages of the norms. They belong to the parameters of their steps, so they are averaged
            alike; counters are those of the last step.
    """

    params: Any
    stats: Any


@flax.struct.dataclass
class TrainState:
    """State of a training run.

    Attributes:
        step: steps taken, int32 scalar.
        params: parameters, an nnx.State of nnx.Param.
        stats: running averages of the norms, an nnx.State of nnx.BatchStat.
        opt_state: the optimiser's state.
        average: moving averages of params and stats; None without ema_decay.
    """

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any
    average: Any = None


def abstract_state(
    model: ModelConfig, optimizer: optax.GradientTransformation, average: bool = False
) -> tuple[nnx.GraphDef, TrainState]:
    """The structure of a run's state, without allocating it.

    Args:
        model: the network.
        optimizer: the optimiser.
        average: whether the state holds a moving average.

    Returns:
        the network's graph definition, and a TrainState of jax.ShapeDtypeStruct.
    """
    graphdef = nnx.split(nnx.eval_shape(lambda: SpikingMLP(model, rngs=nnx.Rngs(0))), nnx.Param, nnx.BatchStat)[0]
    state = jax.eval_shape(lambda: _fresh(model, optimizer, 0))
    return graphdef, jax.eval_shape(with_average, state) if average else state


def init_state(model: ModelConfig, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """A state at step 0 with weights drawn from the seed, allocated on the devices where it will live."""
    _, abstract = abstract_state(model, optimizer)
    shardings = state_shardings(abstract, mesh)
    return jax.jit(lambda: _fresh(model, optimizer, seed), out_shardings=shardings)()


def load_state(
    model: ModelConfig, optimizer: optax.GradientTransformation, where: str, mesh: Mesh, seed: int = 0
) -> TrainState:
    """A state at step 0 with the parameters and running averages of saved weights.

    Args:
        model: the network; what changes no variable's shape, e.g. tau or time_steps (but with TEBN), may differ from
            that of the weights, and so may the image size and the number of classes, see `finetune.adapt`.
        optimizer: the optimiser, which starts fresh.
        where: a workdir, a weights folder or the name of a shipped network, as `weights.find` takes it.
        mesh: the devices.
        seed: of a head for another number of classes.

    Raises:
        InputError: there are no such weights, they are damaged, or they are another architecture's; the message names
            the fields.
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
    # Copies, because the training step donates its state.
    return jax.device_put(state, state_shardings(state, mesh), may_alias=False)


def with_average(state: TrainState) -> TrainState:
    """A state before its first step, with averages: copies, because the training step donates its state."""
    average = jax.jit(lambda *values: jax.tree.map(jnp.copy, Average(*values)))(state.params, state.stats)
    return dataclasses.replace(state, average=average)


def update_average(average: Average, params: Any, stats: Any, step: jax.Array, decay: float) -> Average:
    """The average after a step: average * d + new * (1 - d), d = min(decay, (1 + step) / (10 + step)).

    The second term is the warm-up: early on it forgets the first weights, of which a constant decay near 1 would
    keep much for thousands of steps.

    Args:
        average: before the step.
        params, stats: after the step.
        step: steps taken, this one included.
        decay: 0 < decay < 1.

    References: TensorFlow's tf.train.ExponentialMovingAverage (`num_updates`); Polyak, Juditsky, "Acceleration of
    stochastic approximation by averaging", 1992.
    """
    kept = jnp.minimum(decay, (1 + step) / (10 + step))

    def mean(old, new):
        if not jnp.issubdtype(new.dtype, jnp.floating):
            return new
        return (old + (1 - kept).astype(old.dtype) * (new - old)).astype(old.dtype)

    return jax.tree.map(mean, average, Average(params, stats))


def _fits(model, saved, shapes):
    adapted = {name: getattr(model, name) for name in finetune.ADAPTABLE}
    try:
        return _shapes(dataclasses.replace(saved, **adapted)) == shapes
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
