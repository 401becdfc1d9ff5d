"""The gradient of one training step, over devices and over micro-batches.

Every device computes the loss of its own images, so a batch's loss is the mean of the devices', and so is its gradient.
All that crosses devices is written here or in `norm`: the parts of shared-out parameters, once a step; the gradient,
the running averages and the metrics, once a step, however many micro-batches there are; and with global statistics the
sums of each norm.

Micro-batch i of k takes every k-th image of a device, from the i-th on. As all devices have equally many, these are
every k-th image of the whole batch, whatever the number of devices.

A batch norm sees the images of one micro-batch: of this device, or with global statistics of all. Everything else is
the same as in one pass: the running averages start each micro-batch from those of the step and become their mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from spiking_mlp_jax.train.sharding import FSDP, parameter_specs, shared_axis, split_batch

# (params, stats, images, labels) -> (loss, (metrics, new stats))
LossOf = Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, tuple[dict[str, jax.Array], Any]]]


def make_gradients(loss_of: LossOf, mesh: Mesh, accumulate: int = 1) -> Callable[..., Any]:
    """Builds the function that differentiates a loss.

    Args:
        loss_of: function of params, stats, images [b, ...] and labels [b, ...] to a mean over these images and
            (metrics, which are means as well, and the new stats). Gradients flow to params.
        mesh: the devices; what `loss_of` computes across them it does over `mesh.axis_names`, inside `jax.shard_map`.
            With one device there is no shard_map.
        accumulate: micro-batches, one after the other; they divide the images of a device.

    Returns:
        function of the same arguments, of the whole batch, to (loss, metrics, new stats, gradient); the gradient lies
        where the parameters do.
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
        # -1 for None, which is no leaf of a tree.
        shared = jax.tree.map(lambda x: -1 if (axis := shared_axis(x.shape, mesh)) is None else axis, params)

        def each_device(params, stats, images, labels):
            whole = jax.tree.map(lambda x, axis: _vary(_gather(x, axis), axes), params, shared)
            stats = jax.tree.map(lambda x: _vary(x, axes), stats)
            *rest, grads = one_device(whole, stats, images, labels)
            means = jax.tree.map(lambda x: _device_mean(x, axes), rest)
            return *means, jax.tree.map(lambda x, axis: _scatter_mean(x, axis, axes), grads, shared)

        where, split, same = parameter_specs(params, mesh), split_batch(mesh).spec, PartitionSpec()
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
    return jax.lax.pcast(
        x, tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying), to="varying"
    )


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
