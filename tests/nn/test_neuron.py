import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiking_mlp_jax.nn.dynamics import MAX_UNROLLED_STEPS
from spiking_mlp_jax.nn.neuron import integrate_and_fire, lif, plif, plif_weight
from spiking_mlp_jax.nn.surrogate import SURROGATES, sigmoid

GOLDEN = Path(__file__).parents[1] / "oracles" / "golden" / "lif.npz"
MODES = [
    dict(decay_input=decay, v_reset=reset, detach_reset=detach)
    for decay in (True, False)
    for reset in (0.0, None, -0.25)
    for detach in (True, False)
]


def numpy_lif(x, tau, v_threshold, v_reset, decay_input, v=None, leak=True):
    """The equations once more, step by step; gradients are checked elsewhere."""
    rest = 0.0 if v_reset is None else v_reset
    v = np.full(x.shape[1:], rest) if v is None else v
    spikes = []
    for current in x:
        if not leak:
            h = v + current
        else:
            h = v + (current - (v - rest)) / tau if decay_input else v - (v - rest) / tau + current
        s = (h >= v_threshold).astype(float)
        v = h - s * v_threshold if v_reset is None else np.where(s > 0, v_reset, h)
        spikes.append(s)
    return np.stack(spikes), v


@pytest.mark.parametrize("case", range(48))
def test_golden(case, x64):
    golden = np.load(GOLDEN, allow_pickle=False)
    config = json.loads(str(golden[f"case{case}/config"]))
    surrogate = SURROGATES[config.pop("surrogate")](config.pop("alpha"))
    x = jnp.asarray(golden[f"case{case}/x"])
    (spikes, v), pull_back = jax.vjp(lambda x: lif(x, surrogate=surrogate, **config), x)
    (gradient,) = pull_back((jnp.asarray(golden[f"case{case}/cotangent"]), jnp.zeros_like(v)))
    np.testing.assert_array_equal(spikes, golden[f"case{case}/spikes"])
    np.testing.assert_allclose(v, golden[f"case{case}/v_final"], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(gradient, golden[f"case{case}/grad_x"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 4, MAX_UNROLLED_STEPS + 3])
def test_against_numpy(mode, steps, x64):
    x = np.random.default_rng(0).normal(1, 1.5, (steps, 5, 3))
    spikes, v = lif(jnp.asarray(x), tau=1.7, v_threshold=0.8, **mode)
    expected, v_expected = numpy_lif(x, 1.7, 0.8, mode["v_reset"], mode["decay_input"])
    np.testing.assert_array_equal(spikes, expected)
    np.testing.assert_allclose(v, v_expected, rtol=1e-12, atol=1e-12)
    # The scan over many steps and the unrolled loop have the same gradient.
    if steps > MAX_UNROLLED_STEPS:
        both = [jax.grad(lambda x, u=u: carried(x, u, mode))(jnp.asarray(x)) for u in (steps, 2)]
        np.testing.assert_allclose(*both, rtol=1e-10, atol=1e-12)


def carried(x, chunk, mode):
    """Sum of squares of potentials and weighted spikes, computed `chunk` steps at a time."""
    v, total = None, 0.0
    for start in range(0, x.shape[0], chunk):
        spikes, v = lif(x[start : start + chunk], tau=1.7, v_threshold=0.8, v_init=v, **mode)
        total += (spikes * jnp.arange(1, spikes.shape[1] + 1)[:, None]).sum()
    return total + (v**2).sum()


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(MODES), st.integers(0, 1000))
def test_state_carries_over(first, second, mode, seed):
    x = jnp.asarray(np.random.default_rng(seed).normal(1, 2, (first + second, 7)), jnp.float32)
    spikes, v = lif(x, **mode)
    spikes1, v1 = lif(x[:first], **mode)
    spikes2, v2 = lif(x[first:], v_init=v1, **mode)
    np.testing.assert_array_equal(spikes, jnp.concatenate([spikes1, spikes2]))
    np.testing.assert_allclose(v, v2, rtol=1e-6)


@pytest.mark.parametrize("steps", [3, MAX_UNROLLED_STEPS + 1])
@pytest.mark.parametrize("axis", [1, 2, -1])
def test_time_axis(steps, axis):
    x = jax.random.normal(jax.random.key(0), (steps, 4, 5)) * 3
    spikes, v = lif(x)
    moved, v_moved = lif(jnp.moveaxis(x, 0, axis), time_axis=axis)
    np.testing.assert_array_equal(jnp.moveaxis(moved, axis, 0), spikes)
    np.testing.assert_array_equal(v_moved, v)


def test_integrate_and_fire(x64):
    x = np.random.default_rng(1).normal(0.5, 1, (6, 9))
    for v_reset in (0.0, None):
        spikes, v = integrate_and_fire(jnp.asarray(x), v_reset=v_reset)
        expected, v_expected = numpy_lif(x, None, 1.0, v_reset, True, leak=False)
        np.testing.assert_array_equal(spikes, expected)
        np.testing.assert_allclose(v, v_expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tau", [1.5, 2.0, 4.0])
def test_plif_is_lif_at_its_tau_and_learns_it(tau, x64):
    x = jnp.asarray(np.random.default_rng(2).normal(1, 1, (4, 50)))
    w = jnp.asarray(plif_weight(tau))
    np.testing.assert_allclose(plif(x, w)[1], lif(x, tau=tau)[1], rtol=1e-12, atol=1e-12)

    # Below the threshold nothing is a surrogate, so the gradient must be the finite difference.
    def final(w):
        return plif(0.1 * x, w, v_threshold=100.0)[1].sum()

    numeric = (final(w + 1e-6) - final(w - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(final)(w), numeric, rtol=1e-6)


SHAPES = [((4,), (3, 1), ()), ((), (4,), (3, 4)), ((1, 4), (3, 4), (4,))]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("steps", [3, MAX_UNROLLED_STEPS + 1])
@pytest.mark.parametrize("shapes", [pytest.param(x, marks=[pytest.mark.slow] * (i > 0)) for i, x in enumerate(SHAPES)])
def test_constants_of_any_shape_have_gradients_of_that_shape(shapes, steps, axis, soft, x64):
    rng = np.random.default_rng(3)
    shape = [3, 4]
    shape.insert(axis, steps)
    x, spike_weights, v_weights = (jnp.asarray(rng.normal(1, 1, s)) for s in (shape, shape, (3, 4)))
    bounds = (1.5, 4.0), (0.5, 1.0), (-0.2, 0.2)
    constants = [jnp.asarray(rng.uniform(*bound, own)) for bound, own in zip(bounds, shapes, strict=True)]
    spike = sigmoid(4.0)

    def naive(tau, threshold, reset):
        reset = 0.0 if soft else reset
        v, spikes = jnp.broadcast_to(reset, (3, 4)), []
        for x_t in jnp.moveaxis(x, axis, 0):
            h = v + (x_t - (v - reset)) / tau
            s = spike(h - threshold)
            gate = jax.lax.stop_gradient(s)
            v = h - gate * threshold if soft else h * (1 - gate) + reset * gate
            spikes.append(s)
        return jnp.stack(spikes, axis), v

    def ours(tau, threshold, reset):
        return lif(x, tau=tau, v_threshold=threshold, v_reset=None if soft else reset, time_axis=axis)

    def loss(neurons, *constants):
        spikes, v = neurons(*constants)
        return (spikes * spike_weights).sum() + (v * v_weights).sum()

    every = (1, 2) if soft else (1, 2, 3)
    got, want = (jax.grad(loss, every)(f, *constants) for f in (ours, naive))
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("tau", [2.0, np.full(4, 2.0, np.float32)], ids=["shared", "per channel"])
@pytest.mark.parametrize("steps", [3, MAX_UNROLLED_STEPS + 1])
def test_under_strict_promotion(steps, tau, dtype):
    x = jnp.full((steps, 2, 4), 1.3, dtype)
    expected = jax.grad(lambda x: lif(x, tau=tau)[0].sum().astype(jnp.float32))(x)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        got = jax.grad(lambda x: lif(x, tau=tau)[0].sum().astype(jnp.float32))(x)
    np.testing.assert_array_equal(got, expected)


def test_spikes_at_the_threshold():
    spikes, v = lif(jnp.asarray([[2.0, 1.9999999]]))
    assert spikes.tolist() == [[1.0, 0.0]] and float(v[0]) == 0.0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("number", [float, np.float64, jnp.float32])
@pytest.mark.parametrize("steps", [3, MAX_UNROLLED_STEPS + 1])
def test_keeps_dtype(dtype, number, steps):
    spikes, v = lif(jnp.ones((steps, 2), dtype) * 3, tau=number(2), v_threshold=number(1), v_reset=number(0))
    assert spikes.dtype == dtype and v.dtype == jnp.promote_types(dtype, jnp.float32)


def test_settings_may_be_traced():
    x = jax.random.normal(jax.random.key(0), (4, 20)) * 3
    spikes, _ = jax.jit(lambda tau, threshold: lif(x, tau=tau, v_threshold=threshold))(3.0, 0.7)
    np.testing.assert_array_equal(spikes, lif(x, tau=3.0, v_threshold=0.7)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(tau=0.5), "tau must be at least 1"),
        (dict(v_threshold=0.0), "must be above v_reset"),
        (dict(v_reset=1.0), "must be above v_reset"),
        (dict(surrogate="sigmoid"), "surrogate must be a spike function.*got 'sigmoid'"),
        (dict(surrogate=SURROGATES["atan"]), r"surrogate must be a spike function.*got surrogate\.atan"),
        (dict(time_axis=2), "time_axis must be an axis of x"),
        (dict(time_steps=5), "1 or time_steps=5 time steps on axis 0"),
        (dict(tau=jnp.ones(2)), r"tau must broadcast to the neurons' shape \(3,\), got shape \(2,\)"),
        (dict(v_threshold=jnp.ones((1, 3))), "v_threshold must broadcast"),
        (dict(v_init=jnp.ones(2)), "v_init must broadcast"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lif(jnp.ones((2, 3)), **arguments)


@pytest.mark.parametrize("x", [jnp.ones((0, 3)), jnp.ones((2, 3), jnp.int32), jnp.float32(1)])
def test_impossible_inputs_are_refused(x):
    with pytest.raises(ValueError, match=r"time step|time_axis must be an axis|floating"):
        lif(x)


def test_plif_weight_refuses_one():
    with pytest.raises(ValueError, match="above 1"):
        plif_weight(1.0)


@pytest.mark.parametrize("backend", ["xla", "pallas"])
def test_second_derivatives_are_reverse_mode_only(backend):
    def loss(x):
        return jnp.sum(lif(x, backend=backend)[0] * jnp.sin(x))

    x = jnp.linspace(-1, 2, 6, dtype=jnp.float32).reshape(3, 2)
    assert jnp.any(jax.jacrev(jax.grad(loss))(x) != 0)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.hessian(loss)(x)
