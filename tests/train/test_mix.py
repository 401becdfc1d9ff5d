"""Mixup and cutmix against their definitions in NumPy, and over eight devices."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiking_mlp_jax.train import mix
from spiking_mlp_jax.train.config import default_config
from spiking_mlp_jax.train.loss import make_loss
from spiking_mlp_jax.train.mix import make_mix
from spiking_mlp_jax.train.optimizer import make_optimizer
from spiking_mlp_jax.train.sharding import make_mesh, replicated, shard_batch
from spiking_mlp_jax.train.state import abstract_state, init_state
from spiking_mlp_jax.train.step import make_train_step
from tests.support.tiny import tiny_batches, tiny_config

HEIGHT, WIDTH = 24, 32


def draw(count, **settings):
    """Many draws at once: weights [count, HEIGHT, WIDTH] and shares [count]."""
    keys = jax.random.split(jax.random.key(0), count)
    return jax.device_get(jax.vmap(lambda key: mix.mix_weights(key, HEIGHT, WIDTH, **settings))(keys))


def is_flat(weights):
    return (weights == weights[:, :1, :1]).all((1, 2))


def test_mixup_draws_a_beta():
    weights, shares = draw(4000, mixup=0.8, cutmix=0.0)
    assert is_flat(weights).all()
    np.testing.assert_allclose(shares, weights[:, 0, 0], rtol=1e-5)
    assert 0 <= shares.min() < 0.01 and 0.99 < shares.max() <= 1.00001
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.05)


def test_cutmix_draws_rectangles():
    weights, shares = draw(3000, mixup=0.0, cutmix=1.0)
    assert np.isin(weights, [0, 1]).all()
    removed = 1 - weights
    rows, columns = removed.any(2), removed.any(1)
    # A rectangle: as many pixels as rows times columns, and both without gaps.
    np.testing.assert_array_equal(removed.sum((1, 2)), rows.sum(1) * columns.sum(1))
    for places in (rows, columns):
        assert (np.abs(np.diff(np.pad(places, ((0, 0), (1, 1))).astype(int))).sum(1) <= 2).all()
    np.testing.assert_allclose(shares, 1 - removed.sum((1, 2)) / (HEIGHT * WIDTH), rtol=1e-5)
    # The same draw with NumPy, as timm writes it.
    rng = np.random.default_rng(0)
    expected = []
    for _ in range(20_000):
        ratio = np.sqrt(1 - rng.beta(1.0, 1.0))
        sides = []
        for length in (HEIGHT, WIDTH):
            cut, centre = int(length * ratio), rng.integers(length)
            sides.append(np.clip(centre + cut // 2, 0, length) - np.clip(centre - cut // 2, 0, length))
        expected.append(1 - sides[0] * sides[1] / (HEIGHT * WIDTH))
    assert shares.mean() == pytest.approx(np.mean(expected), abs=0.015)
    np.testing.assert_allclose(np.quantile(shares, [0.1, 0.5, 0.9]), np.quantile(expected, [0.1, 0.5, 0.9]), atol=0.03)


def test_switching():
    weights, _ = draw(2000, mixup=0.8, cutmix=1.0, switch=0.3, probability=0.75)
    untouched = (weights == 1).all((1, 2))
    cut = np.isin(weights, [0, 1]).all((1, 2)) & ~untouched
    # A few rectangles are empty: they count as untouched.
    assert untouched.mean() == pytest.approx(0.25, abs=0.035)
    assert cut.mean() == pytest.approx(0.75 * 0.3, abs=0.03)
    assert (is_flat(weights) & ~untouched).mean() == pytest.approx(0.75 * 0.7, abs=0.03)


def test_blending():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(6, HEIGHT, WIDTH, 3)).astype(np.float32)
    labels = rng.integers(5, size=6).astype(np.int32)
    weights = rng.random((HEIGHT, WIDTH)).astype(np.float32)
    mixed, probabilities = mix.mix_batch(images, labels, weights, jnp.float32(0.3), 5)
    partner = [1, 0, 3, 2, 5, 4]
    for i, j in enumerate(partner):
        w = weights[..., None]
        np.testing.assert_allclose(mixed[i], w * images[i] + (1 - w) * images[j], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(probabilities[i], 0.3 * np.eye(5)[labels[i]] + 0.7 * np.eye(5)[labels[j]], rtol=1e-6)
    with pytest.raises(AssertionError):
        mix.mix_batch(images[:5], labels[:5], weights, jnp.float32(0.3), 5)


def test_smoothing_is_timms():
    """timm smooths the two labels, then mixes; here the loss smooths the mixture."""
    config = default_config()
    config.label_smoothing = 0.1
    logits = np.random.default_rng(0).normal(size=(2, 4, 10)).astype(np.float32)
    labels = np.array([3, 1, 1, 9], np.int32)
    _, probabilities = mix.mix_batch(jnp.zeros((4, 2, 2, 1)), labels, jnp.ones((2, 2)), jnp.float32(0.7), 10)
    smooth = np.full((4, 10), 0.1 / 10)
    smooth[range(4), labels] = 0.9 + 0.1 / 10
    wanted = 0.7 * smooth + 0.3 * smooth[[1, 0, 3, 2]]
    scores = logits.mean(0) - np.log(np.exp(logits.mean(0)).sum(-1, keepdims=True))
    assert make_loss(config)(logits, probabilities) == pytest.approx(-(wanted * scores).sum(-1).mean(), rel=1e-5)


# --- in the training step

BATCH = 16


def experiment(mesh):
    config = default_config()
    config.update(epochs=1, mixup=0.8, cutmix=1.0, num_classes=3, mean=(0.5,), std=(0.25,))
    optimizer = make_optimizer(config, 10)
    model = tiny_config(depths=(1, 1))
    graphdef, abstract = abstract_state(model, optimizer)
    step = make_train_step(config, graphdef, optimizer, mesh)
    return types.SimpleNamespace(model=model, optimizer=optimizer, abstract=abstract, step=step)


@pytest.mark.slow
def test_one_and_eight_devices_mix_alike_and_exchange_no_images(x64):
    results, fresh = [], None
    for count in (1, 8):
        mesh = make_mesh(jax.devices()[:count])
        parts = experiment(mesh)
        if fresh is None:
            fresh = jax.device_get(init_state(parts.model, parts.optimizer, 3, mesh))
        state, losses = jax.device_put(fresh, replicated(mesh)), []
        step = parts.step.lower(state, shard_batch(next(tiny_batches(1, BATCH)), mesh)).compile()
        for batch in tiny_batches(3, BATCH):
            state, metrics = step(state, shard_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
        results.append((losses, jax.device_get((state.params, state.stats))))
    program = step.as_text()  # the one for eight devices
    assert "all-reduce" in program
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in program
    chex.assert_trees_all_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_steps_and_seeds_differ():
    config = default_config()
    config.mixup, config.num_classes, config.batch_size = 0.8, 3, 4
    images, labels = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 3, 1))), jnp.array([0, 1, 2, 0])
    found = [make_mix(config)(step, images, labels)[1] for step in (0, 1, 0)]
    config.seed = 1
    found.append(make_mix(config)(0, images, labels)[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert len({float(probabilities[0, 0]) for probabilities in found}) == 3
    config.mixup = 0.0
    assert make_mix(config) is None
