"""The losses against their definitions, written out in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiking_mlp_jax.models.spiking_mlp import mean_logits
from spiking_mlp_jax.train import loss
from spiking_mlp_jax.train.config import default_config

T, B, K = 3, 5, 4


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(T, B, K)).astype(np.float32) * 3, rng.integers(K, size=B).astype(np.int32)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def smoothed(labels, smoothing):
    return np.eye(K)[labels] * (1 - smoothing) + smoothing / K


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(batch, smoothing):
    logits, labels = batch
    expected = -(smoothed(labels, smoothing) * log_softmax(logits.mean(0))).sum(-1).mean()
    assert loss.cross_entropy(logits, labels, smoothing=smoothing) == pytest.approx(expected, rel=1e-5)
    each = loss.image_cross_entropy(logits, labels, smoothing)
    assert each.shape == (B,)
    assert each.mean() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_tet_sums_over_time(batch, smoothing):
    logits, labels = batch
    expected = 0.0
    for step in logits:
        entropy = -(smoothed(labels, smoothing) * log_softmax(step)).sum(-1).mean()
        expected += 0.95 * entropy + 0.05 * ((step - 1) ** 2).mean()
    assert loss.tet(logits, labels, smoothing=smoothing) == pytest.approx(expected, rel=1e-5)


def test_mse(batch):
    logits, labels = batch
    expected = ((logits.mean(0) - np.eye(K)[labels]) ** 2).mean()
    assert loss.mse(logits, labels) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "tet", "mse"])
def test_class_numbers_and_probabilities_agree(batch, name):
    logits, labels = batch
    config = default_config()
    config.loss, config.label_smoothing = name, 0.1
    function = loss.make_loss(config)
    chex.assert_trees_all_close(function(logits, labels), function(logits, jnp.eye(K)[labels]), rtol=1e-6)
    mixed = jnp.full((B, K), 1 / K)
    gradient = jax.grad(function)(jnp.asarray(logits), mixed)
    chex.assert_shape(gradient, (T, B, K))
    chex.assert_tree_all_finite(gradient)


def test_bfloat16_logits_give_a_float32_loss(batch):
    logits, labels = batch
    narrow = jnp.asarray(logits, jnp.bfloat16)
    value = loss.cross_entropy(narrow, labels)
    assert value.dtype == jnp.float32
    assert value == loss.cross_entropy(narrow.astype(jnp.float32), labels)


def test_large_logits_stay_finite():
    logits = jnp.full((T, B, K), 1e4).at[..., 0].set(-1e4)
    chex.assert_tree_all_finite(loss.cross_entropy(logits, jnp.zeros(B, jnp.int32)))


def test_wrong_rank_is_refused(batch):
    logits, labels = batch
    with pytest.raises(AssertionError):
        loss.cross_entropy(logits[0], labels)
    with pytest.raises(AssertionError):
        loss.targets(jnp.zeros((B, K, 1)), K)


def test_bfloat16_logits_are_averaged_in_float32():
    # The means differ by 2^-9, which bfloat16 cannot tell beside 1.
    logits = jnp.array([[[1.0, 1.0]], [[1.0, 1.0]], [[1.0, 1.0]], [[1.0, 1.0 + 2**-7]]], jnp.bfloat16)
    scores = mean_logits(logits)
    assert scores.dtype == jnp.float32
    assert scores.argmax() == 1 and logits.mean(0).argmax() == 0
    with jax.enable_x64(True):
        assert mean_logits(np.zeros((2, 1, 3))).dtype == jnp.float64
