"""The training step and the evaluation step, each compiled once.

Every device computes the loss of its own images, so a batch's loss is the mean of the devices', and so is its gradient.
All that crosses devices is written here or in `nn.norm`: sharded parameters, the gradient, the running averages and the
metrics once a step, however many micro-batches there are; and with global statistics the sums of each norm.

Micro-batch i of k takes every k-th image of a device, from the i-th on. As all devices have equally many, these are
every k-th image of the whole batch, whatever the number of devices. A batch norm sees the images of one micro-batch: of
this device, or with global statistics of all. Everything else is the same as in one pass: the running averages start
each micro-batch from those of the step and become their mean.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.models.spiking_mlp import mean_logits
from spiking_mlp_jax.train.config import Config, model_config
from spiking_mlp_jax.train.loss import image_cross_entropy, make_activity, make_loss, mean_rate
from spiking_mlp_jax.train.mix import make_mix
from spiking_mlp_jax.train.nonfinite import Guard, keep_if_sound
from spiking_mlp_jax.train.qat import make_quantized
from spiking_mlp_jax.train.sharding import (
    FSDP,
    batch_sharding,
    parameter_specs,
    replicated,
    shared_axis,
    state_shardings,
)
from spiking_mlp_jax.train.state import TrainState, update_average

Batch = dict[str, jax.Array]
# (params, stats, images, labels) -> (loss, (metrics, new stats))
LossOf = Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, tuple[dict[str, jax.Array], Any]]]


def make_train_step(
    config: Config, graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the training step of an experiment.

    Args:
        config: the experiment.
        graphdef: its network.
        optimizer: its optimiser.
        mesh: the devices.

    Returns:
        a compiled function (state, {"image": uint8 [B, H, W, C], "label"}) -> (state, {"loss", "accuracy",
        "grad_norm"}), scalars of this batch; with activity_weight, "loss" contains the penalty, and "activity" is its
        measure without the weight. With a `Guard` as third argument, a loss or gradient that is not finite changes
        nothing, and the metric "sound" says so. It donates the state. Batches of another shape or type raise
        AssertionError instead of compiling again.
    """
    loss, activity, mix = make_loss(config), make_activity(config), make_mix(config)
    quantized = make_quantized(config, model_config(config))

    def loss_of(params, stats, images, labels):
        if quantized is not None:
            params = quantized(params, stats)
        model = nnx.merge(graphdef, params, stats, copy=True)
        model.train()
        if config.norm_statistics == "global" and mesh.size > 1:
            model.set_attributes(sync_axes=mesh.axis_names)
        if activity is None:
            logits, metrics = model(images), {}
            value = loss(logits, labels)
        else:
            logits, rates = model(images, observe=mean_rate)
            metrics = {"activity": activity.measure(rates)}
            value = loss(logits, labels) + activity.weight * metrics["activity"]
        hard = labels if labels.ndim == 1 else labels.argmax(-1)
        metrics["accuracy"] = (mean_logits(logits).argmax(-1) == hard).mean(dtype=jnp.float32)
        return value, (metrics, nnx.state(model, nnx.BatchStat))

    gradients = make_gradients(loss_of, mesh, config.accumulate)

    def train_step(state: TrainState, batch: Batch, guard: Guard | None = None):
        images, labels = normalize(batch["image"], config.mean, config.std), batch["label"]
        if mix is not None:
            images, labels = mix(state.step, images, labels)
        value, metrics, stats, grads = gradients(state.params, state.stats, images, labels)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)))
        metrics = {"loss": value, "grad_norm": norm, **metrics}
        params = optax.apply_updates(state.params, updates)
        step, average = state.step + 1, state.average
        if average is not None:
            average = update_average(average, params, stats, step, config.ema_decay)
        new = TrainState(step, params, stats, opt_state, average)
        if guard is not None:
            new, metrics = keep_if_sound(state, new, metrics, guard)
        if FSDP in mesh.shape:
            new = jax.lax.with_sharding_constraint(new, state_shardings(new, mesh))
        return new, metrics

    # With "fsdp" each array of the state has its own sharding, which depends on its shape.
    shardings = (None if FSDP in mesh.shape else replicated(mesh), replicated(mesh))
    return _compile_once(train_step, out_shardings=shardings, donate_argnums=0)


def make_eval_step(
    graphdef: nnx.GraphDef, mean: Sequence[float], std: Sequence[float], mesh: Mesh
) -> Callable[[Any, Any, Batch], dict[str, Any]]:
    """Builds the evaluation step.

    Args:
        graphdef: the network.
        mean, std: of the pixels in [0, 1], per channel.
        mesh: the devices.

    Returns:
        a compiled function (params, stats, {"image", "label", "mask" bool [B]}) -> sums over the images whose
        mask is set: "loss" (cross-entropy of the time-mean logits), "confusion" int32 [K, K] (row: label,
        column: predicted class) and "rates" {layer: sum of the images' mean firing rates}.
    """

    def eval_step(params, stats, batch: Batch):
        # Gathered first: the compiler might take sharded parameters for a wish to shard activations.
        params = jax.lax.with_sharding_constraint(params, replicated(mesh))
        model = nnx.merge(graphdef, params, stats, copy=True)
        model.eval()
        images = normalize(batch["image"], mean, std)
        logits, rates = model(images, observe=_image_rates)
        mask = batch["mask"]
        classes = logits.shape[-1]
        # One number for each pair of label and prediction; padding gets a pair that does not exist.
        pairs = jnp.where(mask, batch["label"] * classes + mean_logits(logits).argmax(-1), classes * classes)
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


def make_gradients(loss_of: LossOf, mesh: Mesh, accumulate: int = 1) -> Callable[..., Any]:
    """Builds the function that differentiates a loss.

    Args:
        loss_of: function of params, stats, images [b, ...] and labels [b, ...] to a mean over these images and
            (metrics, which are means as well, and the new stats). Gradients flow to params.
        mesh: the devices; what `loss_of` computes across them it does over `mesh.axis_names`, inside `jax.shard_map`.
            With one device there is no shard_map.
        accumulate: micro-batches, one after the other; they divide the images of a device.

    Returns:
        function of the same arguments, of the whole batch, to (loss, metrics, new stats, gradient); the gradient is
        sharded as the parameters are.
    """
    axes = mesh.axis_names if mesh.size > 1 else ()
    gradient = jax.value_and_grad(loss_of, has_aux=True)

    def one_device(params, stats, images, labels):
        if accumulate == 1:
            (value, (metrics, stats)), grads = gradient(params, stats, images, labels)
            return value, metrics, stats, grads

        def micro_batch(total, batch):
            (value, (metrics, after)), grads = gradient(params, stats, *batch)
            return jax.tree.map(jnp.add, total, grads), (value, metrics, after)

        batches = jax.tree.map(lambda x: _strided(x, accumulate), (images, labels))
        nothing = jax.tree.map(lambda x: _vary(jnp.zeros_like(x), axes), params)
        total, each = jax.lax.scan(micro_batch, nothing, batches)
        value, metrics, stats = jax.tree.map(_mean, each)
        return value, metrics, stats, jax.tree.map(lambda x: x / accumulate, total)

    def all_devices(params, stats, images, labels):
        # -1 for None, which is not a leaf of a tree.
        shared = jax.tree.map(lambda x: -1 if (axis := shared_axis(x.shape, mesh)) is None else axis, params)

        def each_device(params, stats, images, labels):
            gathered = jax.tree.map(lambda x, axis: _vary(_gather(x, axis), axes), params, shared)
            stats = jax.tree.map(lambda x: _vary(x, axes), stats)
            *rest, grads = one_device(gathered, stats, images, labels)
            means = jax.tree.map(lambda x: _device_mean(x, axes), rest)
            return *means, jax.tree.map(lambda x, axis: _scatter_mean(x, axis, axes), grads, shared)

        where, split, same = parameter_specs(params, mesh), batch_sharding(mesh).spec, PartitionSpec()
        over_devices = jax.shard_map(
            each_device, mesh=mesh, in_specs=(where, same, split, split), out_specs=(same, same, same, where)
        )
        return over_devices(params, stats, images, labels)

    return one_device if mesh.size == 1 else all_devices


def _strided(x, count):
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)


def _mean(x):
    # Counters count the step, not its micro-batches.
    return jnp.mean(x, 0) if jnp.issubdtype(x.dtype, jnp.floating) else x[0]


def _vary(x, axes):
    # Integers are counters, which are the same on every device and stay so.
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying")


def _device_mean(x, axes):
    return jax.lax.pmean(x, axes) if jax.typeof(x).manual_axis_type.varying else x


def _gather(x, axis):
    return x if axis < 0 else jax.lax.all_gather(x, FSDP, axis=axis, tiled=True)


def _scatter_mean(grad, axis, axes):
    if axis < 0:
        return jax.lax.pmean(grad, axes)
    part = jax.lax.psum_scatter(grad, FSDP, scatter_dimension=axis, tiled=True)
    others = tuple(name for name in axes if name != FSDP)
    return jax.lax.pmean(part, others) / jax.lax.axis_size(FSDP)
