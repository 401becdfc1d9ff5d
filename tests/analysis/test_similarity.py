"""Similarity of representations: closed forms, invariances, and SciPy's own distances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from scipy.stats import ortho_group, spearmanr

from spiking_mlp_jax.analysis.activity.similarity import _alignment, _centred, _from_mean, between_steps, rdm, rsa
from spiking_mlp_jax.analysis.activity.trains import Trains, intervals_of
from spiking_mlp_jax.errors import InputError

RNG = np.random.default_rng(0)


def normal(count, features, seed=0):
    return np.random.default_rng(seed).normal(size=(count, features))


def linear_cka(x, y):
    """As `between_steps` computes it for two steps."""
    return _alignment(*(_centred(z @ z.T) for z in map(_from_mean, (x, y))))


def plain_cka(x, y):
    """Kornblith et al. 2019: tr(K H L H) with the centring matrix H."""
    h = np.eye(len(x)) - 1 / len(x)
    k, m = x @ x.T, y @ y.T
    return np.trace(k @ h @ m @ h) / np.sqrt(np.trace(k @ h @ k @ h) * np.trace(m @ h @ m @ h))


def hsic_unbiased(k, m):
    """Song et al. 2012, equation 5, as it stands there."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def test_cka_is_the_quotient_of_the_published_estimates():
    x, y = normal(12, 5), normal(12, 5, 1) + 0.5 * normal(12, 5)
    k, m = x @ x.T, y @ y.T
    expected = hsic_unbiased(k, m) / np.sqrt(hsic_unbiased(k, k) * hsic_unbiased(m, m))
    assert linear_cka(x, y) == pytest.approx(expected)


@settings(max_examples=15)
@given(st.integers(5, 30), st.integers(1, 8), st.floats(0.01, 100), st.integers(0, 99))
def test_cka_ignores_rotation_scale_and_offset(count, features, scale, seed):
    x, y = normal(count, features, seed), normal(count, 3, seed + 1)
    turned = x @ (ortho_group.rvs(features, random_state=seed) if features > 1 else -np.eye(1))
    moved = scale * turned + 7
    assert linear_cka(x, moved) == pytest.approx(1)
    assert linear_cka(moved, y) == pytest.approx(linear_cka(x, y), abs=1e-6)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), abs=1e-9)


def test_cka_is_not_invariant_to_any_linear_map():
    x = normal(200, 4)
    assert linear_cka(x, x @ np.diag([1, 1, 1, 50])) < 0.9


def test_only_the_plain_estimate_finds_likeness_where_there_is_none():
    x, y = normal(40, 300), normal(40, 300, 1)
    assert plain_cka(x, y) > 0.8
    assert abs(linear_cka(x, y)) < 0.1


def test_cka_of_features_that_are_the_same_for_all_images():
    for value in (0.0, 1 / 3):
        assert np.isnan(linear_cka(np.full((9, 2), value), normal(9, 2)))
        assert np.isnan(linear_cka(np.full((9, 2), value), np.full((9, 2), value)))


def test_rdm_is_the_correlation_distance():
    x = normal(8, 5)
    np.testing.assert_allclose(rdm(x), pdist(x, "correlation"))
    x[3] = 0.7
    silent = rdm(x)
    assert np.isnan(silent).sum() == 7
    np.testing.assert_allclose(silent[np.isfinite(silent)], pdist(np.delete(x, 3, 0), "correlation"))


def test_rsa_is_a_rank_correlation():
    a, b = rdm(normal(8, 5)), rdm(normal(8, 5, 1))
    assert rsa(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rsa(a, np.exp(a)) == pytest.approx(1)
    assert rsa(a, -a) == pytest.approx(-1)
    assert np.isnan(rsa(a, np.ones_like(a)))
    assert np.isnan(rsa(a, np.full_like(a, np.nan)))
    a[:5] = np.nan
    assert rsa(a, b) == pytest.approx(spearmanr(a[5:], b[5:]).statistic)


def test_steps():
    shared = normal(60, 6)
    steps = np.stack([shared, 2 * shared + 1, normal(60, 6, 1), np.zeros((60, 6))], 1)
    found = between_steps(steps)
    for matrix in (found.rsa, found.cka):
        assert matrix.shape == (4, 4)
        np.testing.assert_allclose(matrix, matrix.T)
        np.testing.assert_allclose(np.diag(matrix)[:3], 1)
        assert matrix[0, 1] == pytest.approx(1)
        assert abs(matrix[0, 2]) < 0.2
        assert np.isnan(matrix[3]).all()
    assert abs(found.shuffled) < 0.1
    np.testing.assert_allclose(found.cka[0, 2], linear_cka(shared, steps[:, 2]))
    assert between_steps(steps, seed=1).shuffled != found.shuffled


def test_too_few_images():
    with pytest.raises(InputError, match="at least 4"):
        between_steps(normal(3, 4)[:, None])


@pytest.mark.parametrize("steps", [1, 3, 4, 6, 10])
def test_spike_trains_of_every_kind(steps):
    """All trains of up to 6 steps; of 10, where the loop is not written out, some."""
    from tests.analysis.test_activity import check_trains

    every = (
        np.arange(2 ** min(steps, 6) * (1 + steps // 10))[:, None] * (1 + 6 * (steps // 10)) >> np.arange(steps)
    ) & 1
    value = np.zeros((2, steps, 1, 1, len(every)), np.float32)
    value[0, :, 0, 0] = every.T
    # The second image is filler.
    value[1] = 1
    sums = Trains().observe("a.spikes", value, np.array([True, False]))
    check_trains(intervals_of({"a.spikes": {k: np.asarray(v) for k, v in sums.items()}})["a.spikes"], every)
