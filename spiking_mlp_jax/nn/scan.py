"""A scan over blocks of equal structure, whose variables are stacked on a leading axis."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

if TYPE_CHECKING:
    from jaxtyping import Array


def scan_blocks(
    blocks: nnx.Module, run: Callable[..., Any], x: Array, h: Array, *, remat: bool, update: bool
) -> tuple[Array, dict[str, Any]]:
    """Apply stacked blocks one after another.

    Args:
        blocks: a module whose nnx.Param and nnx.BatchStat variables have a leading axis for the blocks.
        run: function (block, x, h) -> (x, dict of arrays to stack).
        x: spikes, 0 or 1, input of the first block.
        h: second argument of every block.
        remat: recompute each block in the backward pass from its input, saved as bool: one byte per spike.
        update: write the blocks' new nnx.BatchStat values back. False leaves the module alone, so that a jitted
            function may close over it.

    Returns:
        spikes of the last block; and the dicts of all blocks, each array with a leading axis, in the order of `run`.
    """
    graphdef, params, stats = nnx.split(blocks, nnx.Param, nnx.BatchStat)
    order: list[str] = []

    def run_block(params, stats, x, h):
        block = nnx.merge(graphdef, params, stats, copy=True)
        x, seen = run(block, x, h)
        order[:] = seen  # JAX sorts the keys of dicts
        return x, nnx.state(block, nnx.BatchStat), seen

    if remat:
        run_block = remat_binary(run_block)
    select, each = block_selector((params, stats))

    def body(x, variables):
        params, stats = select(variables)
        x, stats, seen = run_block(params, stats, x, h)
        return x, (stats, seen)

    x, (stats, seen) = jax.lax.scan(body, x, each)
    if update:
        nnx.update(blocks, stats)
    return x, {name: seen[name] for name in order}


def block_selector(stacked):
    """What to scan over, and how to get a block's variables from it.

    A scan slices stacked arrays at an index known only at run time. On a CPU, such a slice of a vector ends up inside
    the loops of norms and neurons, which makes them four times slower. Therefore all vectors are packed into one array,
    and each iteration selects its row by a sum.

    Args:
        stacked: arrays with a leading axis for the blocks.

    Returns:
        function from one iteration's slice to the block's arrays, structured like `stacked`; what to scan over.
    """
    leaves, structure = jax.tree.flatten(stacked)
    depth = leaves[0].shape[0]
    dtype = next(leaf.dtype for leaf in leaves if leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating))
    is_vector = [leaf.ndim == 2 and leaf.dtype == dtype for leaf in leaves]
    vectors = [leaf for leaf, vector in zip(leaves, is_vector, strict=True) if vector]
    packed = jnp.concatenate(vectors, 1)
    ends = list(itertools.accumulate(leaf.shape[1] for leaf in vectors))

    def select(iteration):
        index, others = iteration
        # One row plus zeros is exact; `where` keeps other blocks' NaN out.
        row = jnp.sum(jnp.where(jnp.arange(depth)[:, None] == index, packed, 0), 0)
        parts, others = iter(jnp.split(row, ends[:-1])), iter(others)
        return jax.tree.unflatten(structure, [next(parts if vector else others) for vector in is_vector])

    others = [leaf for leaf, vector in zip(leaves, is_vector, strict=True) if not vector]
    return select, (jnp.arange(depth), others)


def remat_binary(run_block):
    """Recompute a block in the backward pass from its binary input, saved as bool: one byte per spike.

    `jax.checkpoint` would save the input as it is, four bytes per spike. Parameters and h are the same residuals for
    every block.
    """

    @jax.custom_vjp
    def run(params, stats, x, h):
        return run_block(params, stats, x, h)

    def forward(params, stats, x, h):
        return run(params, stats, x, h), (params, stats, x.astype(bool), h)

    def backward(residuals, cotangents):
        # Without the barrier XLA would merge the recomputation with the forward pass, and save everything.
        params, stats, x, h = jax.lax.optimization_barrier(residuals)
        spikes = x.astype(cotangents[0].dtype)
        _, pull_back = jax.vjp(run_block, params, stats, spikes, h)
        return pull_back(cotangents)

    run.defvjp(forward, backward)
    return run
