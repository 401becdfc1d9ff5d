"""The penalty on firing: its value, its gradient, and that it works."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spiking_mlp_jax import SpikingMLP
from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.models.topology import dense_operations, fan_out, neuron_counts
from spiking_mlp_jax.train.config import MODEL_FIELDS, default_config
from spiking_mlp_jax.train.loss import make_activity
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.sharding import make_mesh, shard_batch
from spiking_mlp_jax.train.state import abstract_state, init_state
from spiking_mlp_jax.train.step import make_train_step
from tests.support.tiers import rest_slow
from tests.support.tiny import tiny_config

MEAN, STD = (0.5,), (0.25,)


def experiment(weight, measure="rates", optimizer="sgd", learning_rate=1.0, **fields):
    """A tiny network's state on one device and its training step, whose update is minus the gradient."""
    model = tiny_config(**fields)
    config = default_config()
    config.update({name: getattr(model, name) for name in MODEL_FIELDS})
    config.update(
        activity_weight=weight,
        activity_measure=measure,
        optimizer=optimizer,
        momentum=0.0,
        learning_rate=learning_rate,
        schedule="constant",
        mean=MEAN,
        std=STD,
    )
    mesh = make_mesh(jax.devices()[:1])
    rule = make_optimizer(config, 10)
    graphdef, _ = abstract_state(model, rule)
    step = make_train_step(config, graphdef, rule, mesh)
    state = init_state(model, rule, 0, mesh)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(256, size=(8, 16, 16, 1), dtype=np.uint8),
        "label": rng.integers(3, size=8, dtype=np.int32),
    }
    return types.SimpleNamespace(
        config=config, model=model, graphdef=graphdef, state=state, step=step, batch=shard_batch(batch, mesh)
    )


def loads(model):
    counts, fans = neuron_counts(model), fan_out(model)
    return {name: counts[name] * fans[name] for name in counts}


@functools.cache
def unpenalised():
    """The metrics of a first step without a penalty."""
    parts = experiment(0.0)
    return parts.step(parts.state, parts.batch)[1]


@pytest.mark.parametrize("measure", rest_slow(["synops", "rates"]))
def test_the_value_is_that_of_the_measured_rates(measure):
    parts = experiment(0.7, measure)
    state = jax.tree.map(jnp.copy, parts.state)  # a network in training mode changes its statistics
    network = nnx.merge(parts.graphdef, state.params, state.stats)
    network.train()
    images = normalize(jnp.asarray(parts.batch["image"]), MEAN, STD)
    _, rates = network(images, observe=lambda name, x: x.mean() if name.endswith(".spikes") else None)
    _, metrics = parts.step(parts.state, parts.batch)
    without = unpenalised()
    if measure == "rates":
        expected = np.mean([float(rate) for rate in rates.values()])
    else:
        synops = sum(float(rates[name]) * load for name, load in loads(parts.model).items()) * parts.model.time_steps
        expected = synops / dense_operations(parts.model)
    assert 0.01 < expected < 0.99
    assert float(metrics["activity"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["loss"] - without["loss"]) == pytest.approx(0.7 * expected, abs=1e-5)
    assert "activity" not in without


@pytest.mark.parametrize(("measure", "encoding"), rest_slow([("synops", "plain"), ("rates", "spe")]))
def test_the_gradient_is_that_of_the_written_out_loss(measure, encoding, x64):
    parts = experiment(2.0, measure, encoding=encoding)
    images = normalize(jnp.asarray(parts.batch["image"]), MEAN, STD)
    labels = np.asarray(parts.batch["label"])
    # Copies, because the step takes the state's memory.
    before = jax.tree.map(jnp.copy, (parts.state.params, parts.state.stats))

    def written_out(params):
        network = nnx.merge(parts.graphdef, params, before[1], copy=True)
        network.train()
        logits, seen = network(images, observe=lambda name, value: value)
        entropy = -jnp.mean(jax.nn.log_softmax(logits.mean(0))[np.arange(8), labels])
        spikes = {name: value for name, value in seen.items() if name.endswith(".spikes")}
        if measure == "rates":
            return entropy + 2.0 * sum(value.mean() for value in spikes.values()) / len(spikes)
        fans = fan_out(parts.model)
        operations = sum(value.sum() * fans[name] for name, value in spikes.items()) / len(images)
        return entropy + 2.0 * operations / dense_operations(parts.model)

    value, gradient = jax.jit(jax.value_and_grad(written_out))(before[0])
    state, metrics = parts.step(parts.state, parts.batch)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-12)
    moved = jax.tree.map(lambda old, new: old - new, before[0], state.params)
    chex.assert_trees_all_close(moved, gradient, rtol=1e-7, atol=1e-12)


@pytest.mark.slow
def test_remat_changes_nothing(x64):
    results = []
    for remat in ("none", "block"):
        parts = experiment(2.0, "synops", remat=remat)
        state, metrics = parts.step(parts.state, parts.batch)
        results.append(jax.device_get((state.params, state.stats, metrics)))
    chex.assert_trees_all_close(*results, rtol=1e-9, atol=1e-13)


@pytest.mark.slow
def test_a_heavy_penalty_lowers_the_rates():
    after = {}
    for weight in (1e-6, 10.0):
        parts = experiment(weight, "rates", optimizer="adam", learning_rate=0.01)
        state = parts.state
        for _ in range(10):
            state, metrics = parts.step(state, parts.batch)
        after[weight] = float(metrics["activity"])
    assert after[10.0] < 0.8 * after[1e-6]


def test_nothing_is_observed_without_a_weight(monkeypatch):
    seen = []
    call = SpikingMLP.__call__

    def watched(self, images, observe=None):
        seen.append(observe)
        return call(self, images, observe)

    monkeypatch.setattr(SpikingMLP, "__call__", watched)
    for weight in (0.0, 1.0):
        parts = experiment(weight)
        parts.step.trace(parts.state, parts.batch)
        assert (make_activity(parts.config) is None) == (weight == 0)
    assert seen[0] is None and seen[1] is not None


@pytest.mark.slow
def test_shares_sum_to_one():
    for measure in ("rates", "synops"):
        activity = make_activity(experiment(1.0, measure).config)
        assert activity is not None and sum(activity.shares.values()) == pytest.approx(1)
        assert activity.measure(dict.fromkeys(activity.shares, jnp.float32(0.25))) == pytest.approx(0.25)
    total = sum(loads(tiny_config()).values())
    assert activity.shares == {name: load / total for name, load in loads(tiny_config()).items()}


@pytest.mark.slow
def test_bfloat16_rates_are_summed_in_float32():
    parts = experiment(1.0, dtype="bfloat16")
    state, metrics = parts.step(parts.state, parts.batch)
    assert metrics["activity"].dtype == jnp.float32
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state.params))
