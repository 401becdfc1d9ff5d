"""One training step and one evaluation step, compiled once."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.train.average import update_average
from spiking_mlp_jax.train.config import Config, model_config
from spiking_mlp_jax.train.gradients import make_gradients
from spiking_mlp_jax.train.loss import (
    Activity,
    Loss,
    class_scores,
    image_cross_entropy,
    make_activity,
    make_loss,
    mean_rate,
)
from spiking_mlp_jax.train.mix import Mix, make_mix
from spiking_mlp_jax.train.nonfinite import Guard, keep_if_sound
from spiking_mlp_jax.train.qat import make_quantized
from spiking_mlp_jax.train.sharding import FSDP, replicated, state_shardings
from spiking_mlp_jax.train.state import TrainState

Batch = dict[str, jax.Array]


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    mean: Sequence[float],
    std: Sequence[float],
    mesh: Mesh,
    activity: Activity | None = None,
    quantized: Callable[[Any, Any], Any] | None = None,
    mix: Mix | None = None,
    accumulate: int = 1,
    norm_statistics: str = "global",
    ema_decay: float = 0.0,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the training step.

    Args:
        graphdef: the network.
        optimizer: the optimiser.
        loss: function of logits [T, B, K] and labels.
        mean: of the pixels in [0, 1], per channel.
        std: likewise.
        mesh: the devices.
        activity: penalty on firing that is added to the loss, or None.
        quantized: function of params and stats to the params that the network computes with, or None.
        mix: function of the step's number, normalised images and labels that blends them, or None.
        accumulate: micro-batches that a batch is computed in, see `gradients`.
        norm_statistics: whose images a batch norm's statistics are of: "global", all devices', or "device", each
            device's own; of one micro-batch.
        ema_decay: of the state's average, where it has one.

    Returns:
        a compiled function (state, {"image": uint8 [B, H, W, C], "label"}) -> (state, {"loss", "accuracy",
        "grad_norm"}), scalars of this batch; with a penalty, "loss" contains it, and "activity" is its measure
        without the weight. With a `Guard` as third argument, a loss or gradient that is not finite changes nothing,
        and the metric "sound" says so. It takes the old state's memory. Batches of another shape or type raise
        AssertionError instead of compiling again.
    """

    def train_step(state: TrainState, batch: Batch, guard: Guard | None = None):
        images = normalize(batch["image"], mean, std)
        labels = batch["label"]
        if mix is not None:
            images, labels = mix(state.step, images, labels)

        def loss_of(params, stats, images, labels):
            if quantized is not None:
                params = quantized(params, stats)
            model = nnx.merge(graphdef, params, stats, copy=True)
            model.train()
            if norm_statistics == "global" and mesh.size > 1:
                model.set_attributes(sync_axes=mesh.axis_names)
            if activity is None:
                logits, measured = model(images), {}
                value = loss(logits, labels)
            else:
                logits, rates = model(images, observe=mean_rate)
                measured = {"activity": activity.measure(rates)}
                value = loss(logits, labels) + activity.weight * measured["activity"]
            hard = labels if labels.ndim == 1 else labels.argmax(-1)
            measured["accuracy"] = (class_scores(logits).argmax(-1) == hard).mean(dtype=jnp.float32)
            return value, (measured, nnx.state(model, nnx.BatchStat))

        gradients = make_gradients(loss_of, mesh, accumulate)
        value, measured, stats, grads = gradients(state.params, state.stats, images, labels)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": value,
            "grad_norm": jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads))),
            **measured,
        }
        params = optax.apply_updates(state.params, updates)
        step, average = state.step + 1, state.average
        if average is not None:
            average = update_average(average, params, stats, step, ema_decay)
        new = TrainState(step, params, stats, opt_state, average)
        if guard is not None:
            new, metrics = keep_if_sound(state, new, metrics, guard)
        if FSDP in mesh.shape:
            new = jax.lax.with_sharding_constraint(new, state_shardings(new, mesh))
        return new, metrics

    # With "fsdp" each array of the state has its own place, which is only known with its shape.
    shardings = (None if FSDP in mesh.shape else replicated(mesh), replicated(mesh))
    return _compile_once(train_step, out_shardings=shardings, donate_argnums=0)


def step_from_config(
    config: Config, graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The training step that a configuration asks for; arguments and result as for `make_train_step`."""
    return make_train_step(
        graphdef,
        optimizer,
        make_loss(config),
        config.mean,
        config.std,
        mesh,
        make_activity(config),
        make_quantized(config, model_config(config)),
        make_mix(config),
        config.accumulate,
        config.norm_statistics,
        config.ema_decay,
    )


def make_eval_step(
    graphdef: nnx.GraphDef, mean: Sequence[float], std: Sequence[float], mesh: Mesh
) -> Callable[[Any, Any, Batch], dict[str, Any]]:
    """Builds the evaluation step.

    Args:
        graphdef: the network.
        mean: of the pixels in [0, 1], per channel.
        std: likewise.
        mesh: the devices.

    Returns:
        a compiled function (params, stats, {"image", "label", "mask" bool [B]}) -> sums over the images whose
        mask is set: "loss" (cross-entropy of the time-mean logits), "confusion" int32 [K, K] (row: label,
        column: predicted class) and "rates" {layer: sum of the images' mean firing rates}.
    """

    def eval_step(params, stats, batch: Batch):
        # Shared-out parameters are put together first: the compiler might take it for a wish to split activations.
        params = jax.lax.with_sharding_constraint(params, replicated(mesh))
        model = nnx.merge(graphdef, params, stats, copy=True)
        model.eval()
        images = normalize(batch["image"], mean, std)
        logits, rates = model(images, observe=_image_rates)
        mask = batch["mask"]
        classes = logits.shape[-1]
        # One number for each pair of label and prediction; padding gets a pair that does not exist.
        pairs = jnp.where(mask, batch["label"] * classes + class_scores(logits).argmax(-1), classes * classes)
        counts = jnp.zeros(classes * classes + 1, jnp.int32).at[pairs].add(1)
        return {
            "loss": jnp.sum(jnp.where(mask, image_cross_entropy(logits, batch["label"]), 0.0)),
            "confusion": counts[:-1].reshape(classes, classes),
            "rates": {name: jnp.sum(jnp.where(mask, rate, 0.0)) for name, rate in rates.items()},
        }

    return _compile_once(eval_step, out_shardings=replicated(mesh))


def _image_rates(name, value):
    if not name.endswith(".spikes"):
        return None
    return value.astype(jnp.float32).mean(tuple(range(1, value.ndim)))


def _compile_once(step, **options):
    # Chex counts traces under a function's name and source: each step needs a name of its own there. The program
    # keeps the common name, under which the compilation cache finds it again.
    name = step.__name__
    step.__name__ = f"{name}_{uuid.uuid4().hex}"
    guarded = chex.assert_max_traces(step, n=1)
    guarded.__name__ = name
    return jax.jit(guarded, **options)
