"""What NNX offers for flax's own layers works for ours: views, tables, modes, filters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spiking_mlp_jax.nn.norm import BatchNorm
from tests.support.tiny import tiny_model

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 1)), jnp.float32)
KINDS = [dict(), dict(encoding="plain", neuron="plif", tau_per_channel=True), dict(norm="tebn", remat="block")]


def statistics(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_evaluates_and_changes_no_statistics(kind):
    model = tiny_model(**kind)
    model(IMAGES)  # running averages that are not those of a new network
    before = statistics(model)
    view = nnx.view(model, use_running_average=True)
    logits = view(IMAGES)
    jax.tree.map(np.testing.assert_array_equal, statistics(model), before)
    assert all(not m.use_running_average for _, m in nnx.iter_graph(model) if isinstance(m, BatchNorm))
    model.eval()
    np.testing.assert_array_equal(logits, model(IMAGES))
    # And back: a view in training mode normalizes by the batch.
    training = nnx.view(model, use_running_average=False)(IMAGES)
    assert bool(jnp.any(training != logits))


def test_a_view_of_the_norms_alone():
    model = tiny_model()
    view = nnx.view(model, only=BatchNorm, use_running_average=True)
    assert view.norm.use_running_average and not view.stages[0].use_running_average
    with pytest.raises(ValueError, match="Unused keys"):
        nnx.view(model, deterministic=True)


@pytest.mark.parametrize("kind", KINDS)
def test_tabulate(kind):
    model = tiny_model(**kind)
    table = nnx.tabulate(model, IMAGES, console_kwargs=dict(width=200, force_terminal=False))
    for name in ("SpikingMLP", "stages/1/blocks/channel", "AxisMixing", "head"):
        assert name in table
    # It leaves the classes as they were.
    assert tiny_model(**kind)(IMAGES).shape == (2, 2, 3)


def test_filters_and_modes():
    model = tiny_model()
    params, stats, rest = nnx.state(model, nnx.Param, nnx.BatchStat, ...)
    assert jax.tree.leaves(params) and jax.tree.leaves(stats) and not jax.tree.leaves(rest)
    paths = {path for path, _ in nnx.iter_graph(model)}
    assert ("stages", 0, "encode", "norm") in paths
    for mode, evaluating in ((model.eval, True), (model.train, False)):
        mode()
        norms = [m for _, m in nnx.iter_graph(model) if hasattr(m, "use_running_average")]
        assert norms and all(m.use_running_average is evaluating for m in norms)
