"""A moving average of the weights, which is often better than the weights of any one step."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spiking_mlp_jax.train.state import TrainState


class Average(NamedTuple):
    """Averages over the steps so far, shaped like what they are averages of.

    Attributes:
        params: of the parameters.
        stats: of the running averages of the normalisation layers. They belong to the parameters of their steps, so
            they are averaged alike; counters are those of the last step.
    """

    params: Any
    stats: Any


def with_average(state: TrainState) -> TrainState:
    """A state before its first step, with averages: copies, because the training step takes what it is given."""
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
