import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_mlp_jax.analysis.fields.gabor import Gabor, render
from spiking_mlp_jax.analysis.fields.spike_triggered import (
    Moments,
    average,
    covariance,
    linear_fields,
    significance,
    span,
)
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.nn import neuron

SIDE = 8
FILTER = render(Gabor(3.5, 3.5, 0.8, 0.2, 0.5, 1.5, 2.0), (SIDE, SIDE)).ravel()
FILTER /= np.linalg.norm(FILTER)


def unit_vectors(count, size, seed=0):
    """Orthonormal directions [count, size]."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, count)))[0].T


def summed(stimuli, counts, batch=997, **options):
    moments = Moments(stimuli.shape[1], counts.shape[1], **options)
    for start in range(0, len(stimuli), batch):
        moments.add(stimuli[start : start + batch], counts[start : start + batch])
    return moments


def along(a, b):
    """|cosine| of two directions."""
    return abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31)
)
def test_sums_over_batches_are_those_of_all_stimuli_at_once(sizes, units, shifts, seed):
    rng = np.random.default_rng(seed)
    total = sum(sizes) + 3
    x, c = rng.normal(size=(total, 5)), rng.integers(0, 3, (total, units)).astype(float)
    c[0] = 1  # no unit without spikes
    moments = Moments(5, units, shifts=shifts, prior=True, triggered=True)
    for batch, spikes in zip(np.split(x, np.cumsum(sizes)), np.split(c, np.cumsum(sizes)), strict=True):
        moments.add(batch, spikes)
    assert moments.stimuli == total
    np.testing.assert_allclose(moments.covariance(), np.cov(x.T), rtol=1e-9, atol=1e-12)
    for unit in range(units):
        for shift in range(shifts + 1):
            # Counts that are `shift` stimuli late.
            weights = np.concatenate([np.zeros(shift), c[: total - shift, unit]])[:total]
            assert moments.c[shift, unit] == pytest.approx(weights.sum())
            assert moments.cc[shift, unit] == pytest.approx(np.sum(weights**2))
            if weights.sum():
                expected = weights @ x / weights.sum() - x.mean(0)
                np.testing.assert_allclose(average(moments, unit, shift=shift), expected, atol=1e-12)
            np.testing.assert_allclose(moments.cxx[shift, unit], (x * weights[:, None]).T @ x, atol=1e-9)


def test_average_of_a_linear_nonlinear_poisson_unit_is_its_filter():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, SIDE**2)).astype(np.float32)
    rates = np.stack([np.exp(x @ FILTER - 1), np.full(len(x), 0.5)], 1)  # the second unit sees nothing
    moments = summed(x, rng.poisson(rates), shifts=9)
    assert along(average(moments, 0), FILTER) > 0.97
    # E[exp(u) u] / E[exp(u)] = 1 for a standard normal u.
    assert average(moments, 0) @ FILTER == pytest.approx(1, abs=0.05)
    found, blind = significance(moments, 0), significance(moments, 1)
    assert found.p == pytest.approx(0.1)  # the smallest that 9 controls allow
    assert found.signal > 0.9
    assert blind.p > 0.1
    assert abs(blind.signal) < 0.5
    for shift in range(1, 10):
        assert along(average(moments, 0, shift=shift), FILTER) < 0.5


def test_average_of_a_lif_unit_is_its_filter():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(8_000, SIDE**2)).astype(np.float32)
    potential = jnp.broadcast_to((1.5 * (x @ FILTER))[:, None], (len(x), 4))
    spikes, _ = neuron.lif(potential, tau=2.0, time_axis=1)
    moments = summed(x, np.asarray(spikes).sum(1)[:, None], shifts=3)
    assert 500 < moments.c[0, 0] < 20_000
    assert along(average(moments, 0), FILTER) > 0.97


def test_covariance_finds_the_axes_of_an_energy_unit_and_of_suppression():
    rng = np.random.default_rng(2)
    size = 16
    one, two, three = unit_vectors(3, size)
    x = rng.normal(size=(20_000, size))
    energy = 0.3 * ((x @ one) ** 2 + (x @ two) ** 2)
    suppressed = np.exp(0.7 * (x @ one) - 2 * (x @ three) ** 2)
    nothing = np.full(len(x), 0.5)
    counts = rng.poisson(np.stack([energy, suppressed, nothing], 1))
    moments = summed(x, counts, shifts=9, prior=True, triggered=True)

    found = covariance(moments, 0)
    assert (found.excitatory, found.suppressive) == (2, 0)
    plane = found.axes[:2]
    for axis in (one, two):  # the plane is that of both, whichever its basis
        assert np.linalg.norm(np.linalg.lstsq(plane.T, axis, rcond=None)[0] @ plane) > 0.97
    # E[u^2 (u^2 + v^2)] / E[u^2 + v^2] = 2: the variance doubles along both.
    np.testing.assert_allclose(found.values[:2], 1, atol=0.15)

    found = covariance(moments, 1)
    assert (found.excitatory, found.suppressive) == (0, 1)
    assert along(found.axes[-1], three) > 0.97
    # Gaussian times exp(-2 u^2) has a variance of 1 / 5.
    assert found.values[-1] == pytest.approx(-0.8, abs=0.05)
    # The direction of the average is left to the average.
    assert len(found.values) == size - 1
    assert np.abs(found.axes @ average(moments, 1)).max() < 1e-6

    found = covariance(moments, 2)
    assert found.excitatory + found.suppressive <= 1


def correlated(rng, count, size):
    """Stimuli whose neighbouring entries go together, and those that they are made from."""
    mixing = np.exp(-((np.subtract.outer(np.arange(size), np.arange(size)) / 2.0) ** 2))
    white = rng.normal(size=(count, size))
    return white @ mixing


def test_covariance_of_correlated_stimuli_is_whitened():
    rng = np.random.default_rng(3)
    x = correlated(rng, 20_000, 10)
    axis = np.zeros(10)
    axis[4] = 1
    rates = 0.5 * (x @ axis / x[:, 4].std()) ** 2
    moments = summed(x, rng.poisson(rates)[:, None], shifts=5, prior=True, triggered=True)
    found = covariance(moments, 0)
    assert found.values[0] > 5 * found.high > 0
    # What the unit answers to is found; the filter is only known where the stimuli vary.
    seen, planted = x @ found.axes[0], x @ axis
    assert along(seen, planted) > 0.99
    assert along(x @ np.cov(x.T) @ axis, planted) < 0.95  # without whitening it would be blurred like this
    few = covariance(moments, 0, keep=0.8)
    assert len(few.values) < len(found.values)


def test_ridge_is_the_solution_that_numpy_finds():
    rng = np.random.default_rng(4)
    x = correlated(rng, 600, 12)
    w = rng.normal(size=12)
    counts = np.stack([rng.poisson(np.maximum(x @ w + 3, 0)), rng.poisson(1.0, len(x))], 1)
    cut = 450
    fit, held = (summed(x[part], counts[part], shifts=9, prior=True) for part in (slice(cut), slice(cut, None)))
    found = linear_fields(fit, held, strengths=(0.01,))
    c = np.cov(x[:cut].T)
    covaried = (x[:cut] - x[:cut].mean(0)).T @ (counts[:cut, 0] - counts[:cut, 0].mean()) / cut
    expected = np.linalg.solve(c + 0.01 * np.trace(c) / 12 * np.eye(12), covaried)
    np.testing.assert_allclose(found.fields[0, 0], expected, rtol=1e-8)
    predicted = x[cut:] @ expected
    predicted -= predicted.mean()
    counted = counts[cut:, 0] - counts[cut:, 0].mean()
    left = np.mean((counted - predicted) ** 2) / np.mean(counted**2)
    assert found.explained[0, 0] == pytest.approx(1 - left, abs=0.01)
    assert found.p()[0] == pytest.approx(0.1)
    assert found.p()[1] > 0.1

    many = linear_fields(fit, held, strengths=(1e-4, 0.01, 10.0))
    np.testing.assert_array_less(found.explained - 1e-12, many.explained)
    assert along(many.fields[0, 0], w) > along(fit.cx[0, 0] / fit.c[0, 0] - fit.mean, w)


def test_fields_in_the_span_of_few_stimuli_are_those_of_the_pixels():
    rng = np.random.default_rng(5)
    x, counts = rng.normal(size=(20, 48)) + 1, rng.poisson(1.0, (20, 3))
    parts = slice(15), slice(15, None)
    expected = linear_fields(*(summed(x[part], counts[part], shifts=2, prior=True) for part in parts))
    gram = x @ x.T
    basis = span(gram)
    y = gram @ basis
    found = linear_fields(*(summed(y[part], counts[part], shifts=2, prior=True) for part in parts), pixels=48)
    np.testing.assert_allclose(found.fields @ basis.T @ x, expected.fields, atol=1e-10)
    np.testing.assert_array_equal(found.strengths, expected.strengths)
    np.testing.assert_allclose(found.explained, expected.explained, rtol=1e-8)


def test_units_that_never_fire_when_held_out_explain_nothing():
    x = np.random.default_rng(0).normal(size=(20, 3))
    counts = np.ones((20, 1))
    fit = summed(x, counts, shifts=1, prior=True)
    assert np.isnan(linear_fields(fit, fit).explained[0]).all()


def spiking(**options):
    moments = Moments(3, 2, **options)
    moments.add(np.eye(3), np.array([[1, 0], [2, 0], [1, 0]]))
    return moments


def test_a_unit_needs_enough_spikes():
    assert average(spiking(), 0, least=4).shape == (3,)
    with pytest.raises(InputError, match="unit 1 fired 0 spikes, but 1 are needed"):
        average(spiking(), 1)
    with pytest.raises(InputError, match="fired 4 spikes, but 5 are needed: show more"):
        average(spiking(), 0, least=5)
    with pytest.raises(InputError, match="fired 0 spikes"):
        significance(spiking(shifts=1), 1)
    with pytest.raises(InputError, match="no unit 2"):
        average(spiking(), 2)
    with pytest.raises(InputError, match="no number 1"):
        average(spiking(), 0, shift=1)


@pytest.mark.parametrize(
    "stimuli, counts, message",
    [
        (np.zeros((4, 2)), np.zeros((4, 2)), r"must be \(4, 3\) and \(4, 2\), but they are \(4, 2\)"),
        (np.zeros((4, 3)), np.zeros((3, 2)), r"but they are \(4, 3\), \(3, 2\)"),
        (np.zeros((4, 3)), np.full((4, 2), -1.0), "not negative: potentials"),
        (np.zeros((4, 3)), np.full((4, 2), np.nan), "finite"),
        (np.full((4, 3), np.inf), np.zeros((4, 2)), "stimulus holds numbers that are not finite"),
    ],
)
def test_stimuli_and_counts_that_do_not_fit(stimuli, counts, message):
    moments = Moments(3, 2)
    with pytest.raises(InputError, match=message):
        moments.add(stimuli, counts)
    assert moments.stimuli == 0


def test_sums_that_were_not_kept():
    plain = spiking()
    with pytest.raises(InputError, match="shifts of 1 or more"):
        significance(plain, 0)
    with pytest.raises(InputError, match="prior=True"):
        plain.covariance()
    with pytest.raises(InputError, match="triggered=True"):
        covariance(plain, 0)
    with pytest.raises(InputError, match="shifts of 1 or more"):
        covariance(spiking(prior=True, triggered=True), 0)
    with pytest.raises(InputError, match="above 0 and up to 1"):
        covariance(spiking(prior=True, triggered=True, shifts=1), 0, keep=0)
    with pytest.raises(InputError, match="at least 2 stimuli"):
        Moments(3, 2, prior=True).covariance()
    with pytest.raises(InputError, match="differ in shape"):
        linear_fields(spiking(prior=True), spiking(prior=True, shifts=1))
    with pytest.raises(InputError, match="must be positive"):
        linear_fields(spiking(prior=True), spiking(prior=True), strengths=(0.0,))
