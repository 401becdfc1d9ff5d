import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiking_mlp_jax.nn.surrogate import SURROGATES, spike_function

ALPHAS = {"sigmoid": 4.0, "atan": 2.0, "triangle": 1.5, "rectangle": 2.0, "dspike": 3.0}


def numpy_derivative(name, alpha, u):
    """The formulas once more, in NumPy."""
    if name == "sigmoid":
        return alpha * np.exp(-alpha * u) / (1 + np.exp(-alpha * u)) ** 2
    if name == "atan":
        return alpha / (2 * (1 + (np.pi * alpha * u / 2) ** 2))
    if name == "triangle":
        return np.where(np.abs(u) < 1 / alpha, alpha - alpha**2 * np.abs(u), 0)
    if name == "rectangle":
        return np.where(2 * alpha * np.abs(u) <= 1, alpha, 0)
    return np.where(np.abs(u) <= 0.5, alpha / np.tanh(alpha / 2) / 2 / np.cosh(alpha * u) ** 2, 0)


@pytest.mark.parametrize("name", SURROGATES)
def test_derivative_is_the_formula(name, x64):
    u = jnp.linspace(-2, 2, 401)
    spike = SURROGATES[name](ALPHAS[name])
    gradient = jax.grad(lambda u: spike(u).sum())(u)
    np.testing.assert_allclose(gradient, numpy_derivative(name, ALPHAS[name], np.asarray(u)), atol=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "atan", "triangle", "rectangle"])
def test_derivative_integrates_to_one(name, x64):
    u = jnp.linspace(-400, 400, 2_000_001)
    spike = SURROGATES[name](ALPHAS[name])
    gradient = jax.grad(lambda u: spike(u).sum())(u)
    assert abs(float(jnp.trapezoid(gradient, u)) - 1) < 2e-3


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_spikes_are_zero_or_one_in_the_inputs_dtype(name, dtype):
    u = jnp.asarray([-1e4, -1e-3, -0.0, 0.0, 1e-3, 1e4, jnp.nan, jnp.inf, -jnp.inf], dtype)
    spikes = SURROGATES[name]()(u)
    assert spikes.dtype == dtype
    assert spikes.tolist() == [0, 0, 1, 1, 1, 1, 0, 1, 0]
    gradient = jax.grad(lambda u: SURROGATES[name]()(u).sum())(u[:6])
    assert gradient.dtype == dtype and bool(jnp.isfinite(gradient).all())


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("alpha", [1e-3, 2.0, 100.0])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_second_derivatives_are_finite(name, alpha, dtype):
    largest = float(jnp.finfo(dtype).max)
    u = jnp.asarray([0, 0.5, 1, 10, 100, 1e4, largest, jnp.inf], dtype)
    first = jax.grad(lambda u: SURROGATES[name](alpha)(u))
    for derivative in (first, jax.grad(lambda u: first(u).astype(jnp.float32))):
        assert bool(jnp.isfinite(jax.vmap(derivative)(jnp.concatenate([u, -u]))).all())


@given(st.sampled_from(sorted(SURROGATES)), st.sampled_from([0.0, -1.0, float("nan"), float("inf")]))
def test_impossible_alpha_is_refused(name, alpha):
    with pytest.raises(ValueError, match="alpha must be a positive number, got"):
        SURROGATES[name](alpha)


def test_cotangent_is_multiplied():
    spike = spike_function(lambda u: 2 * u)
    _, pull_back = jax.vjp(spike, jnp.asarray([3.0, -1.0]))
    assert pull_back(jnp.asarray([5.0, 7.0]))[0].tolist() == [30.0, -14.0]


@pytest.mark.parametrize("name", SURROGATES)
def test_python_numbers(name):
    spike = SURROGATES[name](ALPHAS[name])
    assert float(spike(0.3)) == 1.0
    np.testing.assert_allclose(jax.grad(spike)(0.3), numpy_derivative(name, ALPHAS[name], 0.3), rtol=1e-5)
