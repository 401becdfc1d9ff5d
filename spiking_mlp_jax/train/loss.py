"""Losses of a spiking classifier: of the logits of every time step, and of the firing rates of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spiking_mlp_jax.models.spiking_mlp import mean_logits
from spiking_mlp_jax.models.topology import fan_out, neuron_counts
from spiking_mlp_jax.nn.neuron import potential_dtype
from spiking_mlp_jax.train.config import Config, model_config

Labels = Int[Array, " B"] | Float[Array, "B K"]
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def targets(labels: Labels, num_classes: int, smoothing: float = 0.0) -> Float[Array, "B K"]:
    """Class probabilities to learn.

    Args:
        labels: class numbers [B], or probabilities [B, K].
        num_classes: K.
        smoothing: share of the probability that is spread evenly over all classes, in [0, 1).

    Returns:
        probabilities [B, K].
    """
    chex.assert_rank(labels, {1, 2})
    soft = jax.nn.one_hot(labels, num_classes, dtype=float) if labels.ndim == 1 else labels
    return soft * (1 - smoothing) + smoothing / num_classes


def image_cross_entropy(logits: Float[Array, "T B K"], labels: Labels, smoothing: float = 0.0) -> Float[Array, " B"]:
    """Cross-entropy of each image's time-mean logits, in nats."""
    chex.assert_rank(logits, 3)
    wanted = targets(labels, logits.shape[-1], smoothing)
    return -jnp.sum(wanted * jax.nn.log_softmax(mean_logits(logits)), axis=-1)


def cross_entropy(logits: Float[Array, "T B K"], labels: Labels, *, smoothing: float = 0.0) -> Float[Array, ""]:
    """Cross-entropy of the time-mean logits, in nats, mean over the batch.

    Args:
        logits: of every time step.
        labels: class numbers [B], or probabilities [B, K].
        smoothing: label smoothing, in [0, 1).
    """
    return image_cross_entropy(logits, labels, smoothing).mean()


def tet(
    logits: Float[Array, "T B K"], labels: Labels, *, weight: float = 0.05, smoothing: float = 0.0
) -> Float[Array, ""]:
    """Temporal efficient training: each time step has to classify by itself.

    (1 - weight) * CE(logits[t]) + weight * MSE(logits[t], 1), summed over time, mean over the batch.

    Args:
        logits: of every time step.
        labels: class numbers [B], or probabilities [B, K].
        weight: lambda, the share of the regulariser.
        smoothing: label smoothing, in [0, 1).

    References: Deng et al., "Temporal efficient training of spiking neural network via gradient
    re-weighting", ICLR 2022.
    """
    chex.assert_rank(logits, 3)
    # bfloat16 would lose the loss's last digits.
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    wanted = targets(labels, logits.shape[-1], smoothing)
    entropy = -jnp.sum(wanted * jax.nn.log_softmax(logits), axis=-1).mean(-1)
    regulariser = jnp.square(logits - 1).mean((1, 2))
    return jnp.sum((1 - weight) * entropy + weight * regulariser)


def mse(logits: Float[Array, "T B K"], labels: Labels, *, smoothing: float = 0.0) -> Float[Array, ""]:
    """Squared distance of the time-mean logits from the class probabilities, mean over batch and classes."""
    chex.assert_rank(logits, 3)
    return jnp.square(mean_logits(logits) - targets(labels, logits.shape[-1], smoothing)).mean()


def make_loss(config: Config) -> Loss:
    """The loss of an experiment: a function (logits [T, B, K], labels) -> scalar."""
    smoothing = config.label_smoothing
    weight = config.tet_lambda
    return {
        "cross_entropy": lambda logits, labels: cross_entropy(logits, labels, smoothing=smoothing),
        "tet": lambda logits, labels: tet(logits, labels, weight=weight, smoothing=smoothing),
        "mse": lambda logits, labels: mse(logits, labels, smoothing=smoothing),
    }[config.loss]


class Activity(NamedTuple):
    """Penalty on firing rates.

    Attributes:
        weight: of the measure in the loss.
        shares: each layer's share of the measure, by name; they sum to 1.
    """

    weight: float
    shares: dict[str, float]

    def measure(self, rates: Mapping[str, Float[Array, ""]]) -> Float[Array, ""]:
        """The weighted mean of the layers' firing rates, between 0 and 1."""
        return sum((self.shares[name] * rates[name] for name in self.shares), jnp.zeros(()))


def make_activity(config: Config) -> Activity | None:
    """The penalty of an experiment, None where its weight is 0.

    "rates" gives all layers of spikes equal shares. "synops" gives each the share that its neurons have in the synaptic
    operations of a network in which all fire (neurons * fan_out, see `spiking_mlp_jax.models.topology`): its measure is
    the share of those that is left.
    """
    if not config.activity_weight:
        return None
    model = model_config(config)
    counts, fans = neuron_counts(model), fan_out(model)
    loads = {name: fans[name] * counts[name] if config.activity_measure == "synops" else 1.0 for name in counts}
    total = sum(loads.values())
    return Activity(config.activity_weight, {name: load / total for name, load in loads.items()})


def mean_rate(name: str, value: Float[Array, "..."]) -> Float[Array, ""] | None:
    """Mean firing rate of a layer of spikes, summed in float32 or wider; None for other intermediates.

    Pass it to `SpikingMLP.__call__` as `observe`: gradients flow through the neurons' surrogate.
    """
    return value.mean(dtype=potential_dtype(value.dtype)) if name.endswith(".spikes") else None
