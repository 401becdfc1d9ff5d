"""Data parallelism: one device and eight compute the same, and only gradients and statistics travel."""

import types

import chex
import jax
import numpy as np
import pytest

from spiking_mlp_jax.train.config import default_config
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.sharding import batch_sharding, make_mesh, replicated, shard_batch
from spiking_mlp_jax.train.state import abstract_state, init_state
from spiking_mlp_jax.train.step import make_train_step
from tests.support.tiers import rest_slow
from tests.support.tiny import tiny_batches, tiny_config

BATCH = 16


def experiment(mesh, **fields):
    """A network and its training step on a mesh."""
    config = default_config()
    config.update(epochs=1, loss="tet", mean=(0.5,), std=(0.25,))
    model = tiny_config(depths=(1, 1), **fields)
    optimizer = make_optimizer(config, 10)
    graphdef, abstract = abstract_state(model, optimizer)
    step = make_train_step(config, graphdef, optimizer, mesh)
    return types.SimpleNamespace(model=model, optimizer=optimizer, abstract=abstract, step=step)


def compiled(abstract, step, mesh):
    def placed(tree, sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    state, batch = placed(abstract, replicated(mesh)), placed(next(tiny_batches(1, BATCH)), batch_sharding(mesh))
    return step.lower(state, batch).compile()


def test_one_and_eight_devices_agree(x64):
    results, fresh = [], None
    for count in (1, 8):
        mesh = make_mesh(jax.devices()[:count])
        parts = experiment(mesh)
        if fresh is None:
            fresh = jax.device_get(init_state(parts.model, parts.optimizer, 3, mesh))
        state, losses = jax.device_put(fresh, replicated(mesh)), []
        for batch in tiny_batches(3, BATCH):
            state, metrics = parts.step(state, shard_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
        assert state.step == 3
        results.append((losses, jax.device_get((state.params, state.stats, state.opt_state))))
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(results[0][1][0]))
    chex.assert_trees_all_close(results[0], results[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("encoding", rest_slow(["spe", "plain"]))
def test_only_reductions_cross_devices(encoding):
    mesh = make_mesh()
    assert mesh.size == 8
    parts = experiment(mesh, encoding=encoding)
    step = compiled(parts.abstract, parts.step, mesh)
    program = step.as_text()
    assert "all-reduce" in program
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in program
    if encoding == "spe":
        check_placement(parts, step, mesh)
        check_guard(parts, mesh)


def check_placement(parts, step, mesh):
    batch = shard_batch(next(tiny_batches(1, BATCH)), mesh)
    assert batch["image"].addressable_shards[0].data.shape == (BATCH // 8, 16, 16, 1)
    old = jax.device_put(
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), parts.abstract), replicated(mesh), may_alias=False
    )
    state, metrics = step(old, batch)
    for leaf in jax.tree.leaves((state, metrics)):
        assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8
    # Donated: the old parameters' memory now holds the new ones.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))


def check_guard(parts, mesh):
    """Once traced, a step refuses another shape instead of silently compiling again."""
    smaller = {name: values[:8] for name, values in next(tiny_batches(1, BATCH)).items()}
    with pytest.raises(AssertionError, match="traced"):
        parts.step.lower(parts.abstract, shard_batch(smaller, mesh))
