"""Makes the neuron kernels shardable by XLA and batchable by vmap.

Kernels are opaque to XLA: without a rule GPUs would gather the batch on every device, and TPUs reject the program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec


def shardable(kernel: Callable[..., Any], target: str, steps_out: int, states_out: int) -> Callable[..., Any]:
    """Make a kernel shardable by XLA, over all axes but time, and batchable by vmap.

    TPUs ignore the sharding rule, see `on_one_device`.

    Args:
        kernel: function from (k [3], x, ..., v, ...) in the kernel's layout to a list of such arrays.
        target: "gpu" or "tpu".
        steps_out, states_out: number of outputs with a time axis, which come first, and without.

    Returns:
        the same function, to a tuple.
    """
    rest = "i" if target == "gpu" else "r c"
    names = {True: f"o t {rest}", False: f"o {rest}"}

    def partition(mesh, inputs, outputs):
        x = inputs[1]
        spec = (*x.sharding.spec, *[None] * (len(x.shape) - len(x.sharding.spec)))
        over = {len(spec): PartitionSpec(spec[0], None, *spec[2:]), len(spec) - 1: PartitionSpec(spec[0], *spec[2:])}
        over[1] = PartitionSpec()
        place = functools.partial(jax.tree.map, lambda array: NamedSharding(mesh, over[len(array.shape)]))
        return mesh, kernel, place(outputs), place(inputs)

    def split(*inputs):
        rank = inputs[1].ndim
        call = custom_partitioning(lambda *arrays: kernel(*arrays))
        operands = ", ".join(["k", *(names[x.ndim == rank] for x in inputs[1:])])
        results = ", ".join([names[True]] * steps_out + [names[False]] * states_out)
        call.def_partition(
            partition=partition, sharding_rule=f"{operands} -> {results}", need_replication_factors=("k", "t")
        )
        return tuple(call(*inputs))

    call = jax.custom_batching.custom_vmap(split)

    @call.def_vmap
    def batched(size, is_batched, *inputs):
        inputs = [
            x if has else jnp.broadcast_to(x, (size, *x.shape)) for x, has in zip(inputs, is_batched, strict=True)
        ]
        if is_batched[0]:
            outputs = jax.lax.map(lambda arrays: call(*arrays), tuple(inputs))
        else:
            merged = [x.reshape(-1, *x.shape[2:]) for x in inputs[1:]]
            outputs = tuple(x.reshape(size, -1, *x.shape[1:]) for x in call(inputs[0][0], *merged))
        return outputs, (True,) * len(outputs)

    return call


def match_vma(arrays: Any) -> Any:
    """A tree of arrays, each cast to vary over all mesh axes over which any of them varies.

    `jax.shard_map` tracks these axes (`check_vma`). After this the cotangents of a custom_vjp vary like its inputs, and
    JAX sums those of arrays that devices share. Outside of shard_map nothing changes.
    """
    leaves, tree = jax.tree.flatten(arrays)
    over = [jax.typeof(x).manual_axis_type.varying for x in leaves]
    every = frozenset().union(*over)
    leaves = [jax.lax.pcast(x, tuple(sorted(every - axes)), to="varying") for x, axes in zip(leaves, over, strict=True)]
    return jax.tree.unflatten(tree, leaves)


def on_one_device(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel in programs for one device and inside shard_map, else the plain function.

    For TPUs, whose compiler does not support sharding rules of kernels (jax-ml/jax issue 38196). The number of devices
    is known at lowering, which takes a primitive.

    Args:
        kernel, plain: functions of the same arrays, with results of the same shapes and dtypes.
    """

    def call(*inputs):
        flat, tree = jax.tree.flatten(inputs)
        results = jax.tree.structure(jax.eval_shape(plain, *inputs))

        def of_leaves(function):
            return lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))

        outputs = _on_one_device.bind(*flat, kernel=of_leaves(kernel), plain=of_leaves(plain))
        return jax.tree.unflatten(results, outputs)

    return call


_on_one_device = Primitive("neuron_kernel_if_alone")
_on_one_device.multiple_results = True
_on_one_device.def_impl(lambda *inputs, kernel, plain: plain(*inputs))


@_on_one_device.def_abstract_eval
def _on_one_device_shapes(*inputs, kernel, plain):
    return _output_avals(inputs, plain)


def _output_avals(inputs, function):
    outputs = jax.eval_shape(function, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs))
    return [inputs[0].update(shape=x.shape, dtype=x.dtype, weak_type=False) for x in outputs]


def _on_one_device_batched(inputs, axes, *, kernel, plain):
    axes = tuple(axis if isinstance(axis, int) else None for axis in axes)
    outputs = _on_one_device.bind(*inputs, kernel=jax.vmap(kernel, axes), plain=jax.vmap(plain, axes))
    return outputs, [0] * len(outputs)


def _on_one_device_lowered(context, *inputs, kernel, plain):
    where = context.module_context.axis_context
    if hasattr(where, "manual_axes"):
        one = where.mesh.size == 1 or set(where.manual_axes) == set(where.mesh.axis_names)
    else:
        one = where.num_devices == 1
    return mlir.lower_fun(kernel if one else plain, multiple_results=True)(context, *inputs)


batching.primitive_batchers[_on_one_device] = _on_one_device_batched
mlir.register_lowering(_on_one_device, _on_one_device_lowered)


def untyped(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function in which no array varies over mesh axes; its results vary as its inputs do.

    For interpreted kernels: the interpreter does not track these axes and fails inside shard_map.

    Args:
        call: function from arrays that vary over the same axes to a list of arrays.
    """
    return functools.partial(_untyped.bind, call=call)


_untyped = Primitive("neuron_kernel_untyped")
_untyped.multiple_results = True
_untyped.def_impl(lambda *inputs, call: call(*inputs))


@_untyped.def_abstract_eval
def _untyped_shapes(*inputs, call):
    return _output_avals(inputs, call)


def _untyped_lowered(context, *inputs, call):
    nowhere = jax.sharding.ManualAxisType()
    context = context.replace(avals_in=[x.update(manual_axis_type=nowhere) for x in context.avals_in])
    return mlir.lower_fun(call, multiple_results=True)(context, *inputs)


mlir.register_lowering(_untyped, _untyped_lowered)
