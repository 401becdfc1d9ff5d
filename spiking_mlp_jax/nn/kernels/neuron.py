"""Neurons as one kernel for all time steps, forward and backward, for GPUs (Triton) and TPUs (Mosaic).

Each program computes all steps of a block of neurons with the step of `nn/dynamics.py`; potentials stay on the chip,
spikes or gradients are written once. Layouts, with T steps:

    GPU    [outer, T, neurons]          axes after time are merged, for coalesced reads
    TPU    [outer, T, rows, lanes]      the last axis stays: TPUs tile the last two axes, and merging the last one
                                        would copy the array

The backward pass recomputes the potentials. On a GPU with few steps they stay in registers; otherwise each lies in the
block of dx until the gradient of its step replaces it, so that no memory is needed besides the outputs.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from spiking_mlp_jax.nn.dynamics import Constants, Mode, step, step_backward
from spiking_mlp_jax.nn.kernels.sharding import shardable, untyped

if TYPE_CHECKING:
    from jaxtyping import Array

# GPU: neurons of a block, a power of two, four for each thread of four warps.
GPU_BLOCK = 512
GPU_WARPS = 4
# GPU: axes behind time with fewer neurons are moved in front of it, for whole blocks and neighbouring reads.
GPU_LEAST_NEURONS = 128
# GPU: up to this many steps the loop is unrolled and potentials stay in registers, four for each thread and step.
MAX_REGISTER_STEPS = 16
# TPU: a tile of float32 is [8, 128], one of int8, as which spikes are written, [32, 128].
TPU_ROWS, TPU_LANES = 32, 128
# TPU: bytes of a float32 block with all its steps. The backward kernel has three of them, each twice, as the next one
# is read while this one is computed: 6 MiB of the 16 that a kernel may use.
TPU_BLOCK_BYTES = 2**20


def fits(x_shape: tuple[int, ...], axis: int, target: str) -> bool:
    """Whether a kernel can take this input: on a TPU the steps of the smallest block must fit into its memory."""
    if math.prod(x_shape) == 0:
        return False
    return target == "gpu" or TPU_ROWS * TPU_LANES * x_shape[axis] * 4 <= 2 * TPU_BLOCK_BYTES


def forward(
    mode: Mode, axis: int, k: Constants, x: Array, v: Array, *, target: str = "gpu", interpret: bool = False
) -> tuple[Array, Array]:
    """`dynamics.forward` as a kernel.

    Args:
        mode, k, x, v, axis: as there; not float64.
        target: "gpu" or "tpu".
        interpret: run the kernel in JAX's interpreter, slowly, on any device.

    Returns:
        as there.
    """
    flat = _Layout(x.shape, axis, target)
    kernel = _kernel(_forward_call, mode, target, interpret)
    fired, after = shardable(kernel, target, 1, 1)(jnp.stack(k), flat.steps(x), flat.state(v))
    return flat.steps_back(fired).astype(bool), flat.state_back(after)


def backward(
    mode: Mode,
    axis: int,
    k: Constants,
    x: Array,
    v: Array,
    ds: Array,
    dv: Array,
    *,
    target: str = "gpu",
    interpret: bool = False,
) -> tuple[Array, Array, Constants | None]:
    """`dynamics.backward` as a kernel.

    Args:
        mode, k, x, v, axis, ds, dv: as there; not float64.
        target, interpret: as in `forward`.

    Returns:
        as there.
    """
    flat = _Layout(x.shape, axis, target)
    kernel = _kernel(_backward_call, mode, target, interpret)
    call = shardable(kernel, target, 1, 4 if mode.learned else 1)
    dx, dv, *dk = call(jnp.stack(k), flat.steps(x), flat.steps(ds), flat.state(v), flat.state(dv))
    # The kernel sums over steps, XLA over neurons.
    return flat.steps_back(dx), flat.state_back(dv), Constants(*map(jnp.sum, dk)) if dk else None


class _Layout:
    """How [*before, T, *after] becomes the kernel's layout, and back."""

    def __init__(self, shape: tuple[int, ...], axis: int, target: str):
        self.axis, self.first = axis, False
        after = shape[axis + 1 :]
        if axis and (not after if target == "tpu" else math.prod(after) < GPU_LEAST_NEURONS):
            self.first, shape, axis = True, (shape[axis], *shape[:axis], *after), 0
        self.shape, self.rest = shape, shape[:axis] + shape[axis + 1 :]
        after = shape[axis + 1 :]
        block = (math.prod(after),) if target == "gpu" else (math.prod(after[:-1]), *(after[-1:] or (1,)))
        self.flat_rest = (math.prod(shape[:axis]), *block)
        self.flat_shape = (self.flat_rest[0], shape[axis], *block)

    def steps(self, x: Array) -> Array:
        return (jnp.moveaxis(x, self.axis, 0) if self.first else x).reshape(self.flat_shape)

    def steps_back(self, x: Array) -> Array:
        x = x.reshape(self.shape)
        return jnp.moveaxis(x, 0, self.axis) if self.first else x

    def state(self, v: Array) -> Array:
        return v.reshape(self.flat_rest)

    def state_back(self, v: Array) -> Array:
        return v.reshape(self.rest)


def _forward_kernel(mode, block, k_ref, x_ref, v_ref, fired_ref, after_ref):
    block.enter()
    k = Constants(*(k_ref[i] for i in range(3)))

    def body(t, v):
        v, (fired, _) = step(mode, k, v, block.read(x_ref, t))
        block.write(fired_ref, fired.astype(fired_ref.dtype), t)
        return v

    block.write(after_ref, block.loop(body, block.read(v_ref)))


def _backward_kernel(mode, block, k_ref, x_ref, ds_ref, v_ref, dv_ref, dx_ref, *out_refs):
    block.enter()
    k = Constants(*(k_ref[i] for i in range(3)))
    kept = {}

    def again(t, v):
        if block.unrolled:
            kept[t] = v
        else:
            block.write(dx_ref, v, t)
        return step(mode, k, v, block.read(x_ref, t))[0]

    def back(i, carry):
        t = block.steps - 1 - i
        dv, sums = carry
        v = kept[t] if block.unrolled else block.read(dx_ref, t)
        x = block.read(x_ref, t)
        _, (fired, h) = step(mode, k, v, x)
        dv, (dx, dk) = step_backward(mode, k, dv, block.read(ds_ref, t), v, x, fired, h)
        block.write(dx_ref, dx, t)
        return dv, jax.tree.map(jnp.add, sums, dk)

    v = block.read(v_ref)
    block.loop(again, v)
    block.barrier()
    zeros = jnp.zeros_like(v)
    dv, sums = block.loop(back, (block.read(dv_ref), Constants(zeros, zeros, zeros) if mode.learned else None))
    for ref, value in zip(out_refs, (dv, *(sums or ())), strict=True):
        block.write(ref, value)


class _GpuBlock:
    """How a program reads and writes its block [T, GPU_BLOCK] and goes through its steps."""

    def __init__(self, shape: tuple[int, ...], interpret: bool):
        _, self.steps, self.neurons = shape
        self.size = min(GPU_BLOCK, pl.next_power_of_2(self.neurons))
        self.count = pl.cdiv(self.neurons, self.size)
        self.unrolled = self.steps <= MAX_REGISTER_STEPS
        self.interpret = interpret

    def enter(self):
        # Once per kernel: the last block may reach past the end, and only the kernel can mask it.
        self.inside = None
        if self.neurons % self.size:
            start = pl.program_id(0) % self.count * self.size
            self.inside = start + jax.lax.broadcasted_iota(jnp.int32, (1, self.size), 1) < self.neurons

    def read(self, ref, t=0):
        # Values are [1, size] throughout: one step, or the one row of a state.
        return plgpu.load(ref.at[pl.ds(t, 1), :], mask=self.inside)

    def write(self, ref, value, t=0):
        plgpu.store(ref.at[pl.ds(t, 1), :], value, mask=self.inside)

    def loop(self, body, carry):
        if not self.unrolled:
            return jax.lax.fori_loop(0, self.steps, body, carry)
        for t in range(self.steps):
            carry = body(t, carry)
        return carry

    def barrier(self):
        # Threads read what others have written.
        if not self.unrolled and not self.interpret:
            plgpu.debug_barrier()

    def call(self, kernel, outer, state_like, outputs, inputs):
        # One grid axis: CUDA allows 2^31 blocks on the first, but 65535 on the others.
        count = self.count
        steps = pl.BlockSpec((None, self.steps, self.size), lambda i: (i // count, 0, i % count))
        state = pl.BlockSpec((1, self.size), lambda i: (i // count, i % count))
        constants = pl.BlockSpec((4,), lambda i: (0,))
        k, *arrays = inputs
        return pl.pallas_call(
            kernel,
            out_shape=outputs,
            grid=(outer * count,),
            in_specs=[constants, *(state if state_like(x) else steps for x in arrays)],
            out_specs=[state if state_like(x) else steps for x in outputs],
            compiler_params=plgpu.CompilerParams(num_warps=GPU_WARPS),
            interpret=self.interpret,
        )(jnp.pad(k, (0, 1)), *arrays)  # every array of a Triton kernel has a power of two of elements


class _TpuBlock:
    """How a program reads and writes its block [T, rows, lanes] and goes through its steps."""

    unrolled = False

    def __init__(self, shape: tuple[int, ...], interpret: bool):
        _, self.steps, rows, lanes = shape
        self.lanes = lanes if lanes <= 4 * TPU_LANES else 4 * TPU_LANES
        width = pl.cdiv(self.lanes, TPU_LANES) * TPU_LANES
        most = TPU_BLOCK_BYTES // (4 * self.steps * width) // TPU_ROWS * TPU_ROWS
        if not most:
            self.lanes, most = min(lanes, TPU_LANES), TPU_ROWS
        self.rows = min(rows, most)
        self.grid = (pl.cdiv(rows, self.rows), pl.cdiv(lanes, self.lanes))
        self.interpret = interpret

    def enter(self):
        pass

    def read(self, ref, *t):
        return ref[(*t, ...)]

    def write(self, ref, value, *t):
        ref[(*t, ...)] = value

    def loop(self, body, carry):
        return jax.lax.fori_loop(0, self.steps, body, carry)

    def barrier(self):
        pass

    def call(self, kernel, outer, state_like, outputs, inputs):
        steps = pl.BlockSpec((None, self.steps, self.rows, self.lanes), lambda o, r, c: (o, 0, r, c))
        state = pl.BlockSpec((None, self.rows, self.lanes), lambda o, r, c: (o, r, c))
        k, *arrays = inputs
        return pl.pallas_call(
            kernel,
            out_shape=outputs,
            grid=(outer, *self.grid),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                *(state if state_like(x) else steps for x in arrays),
            ],
            out_specs=[state if state_like(x) else steps for x in outputs],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
            interpret=self.interpret,
        )(k, *arrays)


def _kernel(call, mode, target, interpret):
    kernel = functools.partial(call, mode, target, interpret)
    return untyped(kernel) if interpret else kernel


def _forward_call(mode, target, interpret, k, x, v):
    outputs = [_like(x, jnp.int8), _like(v, v.dtype)]
    return _call(functools.partial(_forward_kernel, mode), target, interpret, outputs, (k, x, v))


def _backward_call(mode, target, interpret, k, x, ds, v, dv):
    outputs = [_like(x, v.dtype), *[_like(v, v.dtype)] * (4 if mode.learned else 1)]
    return _call(functools.partial(_backward_kernel, mode), target, interpret, outputs, (k, x, ds, v, dv))


def _like(x, dtype):
    # Inside shard_map an output has to say over which mesh axes it varies: over those of every input, see `match_vma`.
    return jax.ShapeDtypeStruct(x.shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _call(kernel, target, interpret, outputs, inputs):
    x = inputs[1]
    block = (_TpuBlock if target == "tpu" else _GpuBlock)(x.shape, interpret)
    return block.call(functools.partial(kernel, block), x.shape[0], lambda array: array.ndim < x.ndim, outputs, inputs)
