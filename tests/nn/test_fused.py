"""Hand-written gradients against the plain composition that JAX differentiates itself."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiking_mlp_jax.models.spiking_mlp import HEIGHT, WIDTH
from spiking_mlp_jax.nn.dynamics import MAX_UNROLLED_STEPS, Constants, Mode
from spiking_mlp_jax.nn.fused import normalize_and_fire
from spiking_mlp_jax.nn.layers import mix_axis, spike_dense
from spiking_mlp_jax.nn.neuron import lif, run
from spiking_mlp_jax.nn.norm import EPSILON, batch_normalize
from spiking_mlp_jax.nn.surrogate import sigmoid
from tests.support.tiers import rest_slow

SURROGATE = sigmoid(4.0)
MODES = [
    Mode(leaky, decay, hard, detach, SURROGATE, learned=True)
    for leaky, decay, hard, detach in itertools.product((True, False), repeat=4)
    if leaky or not decay
]


def plain_neurons(mode, k, x, v, axis):
    """The equations step by step, differentiated by JAX."""
    spikes = []
    for x_t in jnp.moveaxis(x, axis, 0):
        if not mode.leaky:
            h = v + x_t
        else:
            drive = x_t / k.tau if mode.decay_input else x_t
            h = v - (v - k.v_reset) / k.tau + drive
        s = mode.surrogate(h - k.v_threshold)
        gate = jax.lax.stop_gradient(s) if mode.detach_reset else s
        v = h * (1 - gate) + gate * k.v_reset if mode.hard_reset else h - gate * k.v_threshold
        spikes.append(s)
    return jnp.stack(spikes, axis), v


def constants(mode):
    return Constants(*map(jnp.asarray, (1.7, 0.8, -0.2 if mode.hard_reset else 0.0)))


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0.5, scale, shape))


def assert_same(ours, plain):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("steps", "axis"), rest_slow([(3, 1), (4, 0), (MAX_UNROLLED_STEPS + 2, 1)]))
def test_neurons_have_the_gradient_of_their_equations(mode, steps, axis, x64):
    shape = [5, 6]
    v = 0.1 * normal(1, *shape)
    shape.insert(axis, steps)
    x, ds = normal(0, *shape, scale=2.0), normal(2, *shape)
    dv = normal(3, *v.shape)
    outputs, pull_back = jax.vjp(lambda k, x, v: run(mode, axis, steps, k, x, v), constants(mode), x, v)
    expected, plain_pull_back = jax.vjp(lambda k, x, v: plain_neurons(mode, k, x, v, axis), constants(mode), x, v)
    assert_same(outputs, expected)
    got, want = pull_back((ds, dv)), plain_pull_back((ds, dv))
    if not mode.hard_reset:  # v_reset is only a constant of the charge there, 0
        got, want = (got[0][:2], got[1:]), (want[0][:2], want[1:])
    assert_same(got, want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axis", rest_slow([4, 2, 3]))
@pytest.mark.parametrize("skip_steps", [None, 1, 3])
def test_fused_is_the_composition(mode, axis, skip_steps, x64):
    b, t, h, w, c = 2, 3, 4, 5, 6
    features = (b, t, h, w, c)[axis]
    z, shift = normal(0, b, t, h, w, c, scale=2.0), normal(1, c)
    scale, bias = normal(2, features), normal(3, features)
    skip = None if skip_steps is None else normal(4, b, skip_steps, h, w, c)
    weights = normal(5, *z.shape), normal(6, *z.shape)

    def fused(k, z, shift, scale, bias, skip):
        spikes, potential, *_ = normalize_and_fire(mode, axis, 1.3, (), k, z, shift, scale, bias, skip)
        return jnp.sum(spikes * weights[0]) + jnp.sum(jnp.sin(potential) * weights[1]), (spikes, potential)

    def composed(k, z, shift, scale, bias, skip):
        shifted = z + shift
        others = [i for i in range(5) if i != axis]
        mean = shifted.mean(others, keepdims=True)
        normed = (shifted - mean) / jnp.sqrt(jnp.square(shifted - mean).mean(others, keepdims=True) + EPSILON)
        potential = 1.3 * (normed * scale.reshape(mean.shape) + bias.reshape(mean.shape))
        if skip is not None:
            potential = potential + skip
        rest = jnp.broadcast_to(k.v_reset, potential[:, 0].shape)
        spikes, _ = plain_neurons(mode, k, potential, rest, 1)
        return jnp.sum(spikes * weights[0]) + jnp.sum(jnp.sin(potential) * weights[1]), (spikes, potential)

    inputs = (constants(mode), z, shift, scale, bias) + (() if skip is None else (skip,))
    call = (lambda f: lambda *a: f(*a, None)) if skip is None else (lambda f: f)
    every = tuple(range(len(inputs)))
    got, want = (jax.value_and_grad(call(f), every, has_aux=True)(*inputs) for f in (fused, composed))
    if not mode.hard_reset:
        got, want = ((value, (grads[0][:2], grads[1:])) for value, grads in (got, want))
    assert_same(got, want)


def test_a_skip_of_another_rank_gives_the_neurons_its_shape(x64):
    mode, b, t, h, w, c = MODES[0], 2, 3, 4, 5, 6
    z, skip, weights = normal(0, b, t, h * w, c, scale=2.0), normal(1, b, t, h, w, c), normal(2, b, t, h, w, c)
    scale, bias = normal(3, h * w), normal(4, h * w)

    def loss(z, scale, bias, skip):
        spikes, potential, *_ = normalize_and_fire(mode, 2, 1.0, (), constants(mode), z, None, scale, bias, skip)
        apart = weights.reshape(spikes.shape)
        return jnp.sum((spikes + jnp.sin(potential)) * apart)

    got = jax.value_and_grad(loss, (0, 1, 2, 3))(z, scale, bias, skip)
    value, gradients = jax.value_and_grad(loss, (0, 1, 2, 3))(z, scale, bias, skip.reshape(z.shape))
    assert_same(got, (value, (*gradients[:3], gradients[3].reshape(skip.shape))))


def test_batch_norm_gradient(x64):
    x, scale, bias = normal(0, 3, 2, 4, 5, scale=2.0), normal(1, 4), normal(2, 4)
    weights = normal(3, *x.shape)

    def plain(x, scale, bias):
        mean = x.mean((0, 1, 3), keepdims=True)
        y = (x - mean) / jnp.sqrt(jnp.square(x - mean).mean((0, 1, 3), keepdims=True) + EPSILON)
        return 0.7 * (y * scale[:, None] + bias[:, None])

    ours = jax.grad(lambda *a: jnp.sum(jnp.sin(batch_normalize(*a, 2, 0.7)[0]) * weights), (0, 1, 2))
    theirs = jax.grad(lambda *a: jnp.sum(jnp.sin(plain(*a)) * weights), (0, 1, 2))
    assert_same(ours(x, scale, bias), theirs(x, scale, bias))


@pytest.mark.parametrize(("axis", "equation"), [(HEIGHT, "oi,btiwc->btowc"), (WIDTH, "oi,bthic->bthoc")])
def test_mixing_is_an_einsum(axis, equation, x64):
    spikes = (normal(0, 2, 3, 4, 4, 5) > 0.5).astype(float)
    kernel, weights = normal(1, 4, 4), normal(2, *spikes.shape)
    ours = jax.value_and_grad(lambda x, k: jnp.sum(mix_axis(x, k, axis) ** 2 * weights), (0, 1))
    plain = jax.value_and_grad(lambda x, k: jnp.sum(jnp.einsum(equation, k, x) ** 2 * weights), (0, 1))
    assert_same(ours(spikes, kernel), plain(spikes, kernel))


def test_dense_keeps_its_spikes_as_bool(x64):
    spikes, kernel = (normal(0, 2, 3, 4) > 0.5).astype(float), normal(1, 4, 5)
    ours = jax.value_and_grad(lambda x, k: jnp.sum(spike_dense(x, k) ** 2), (0, 1))
    plain = jax.value_and_grad(lambda x, k: jnp.sum((x @ k) ** 2), (0, 1))
    assert_same(ours(spikes, kernel), plain(spikes, kernel))
    kept = jax.tree.leaves(jax.vjp(spike_dense, spikes, kernel)[1])
    assert any(leaf.dtype == bool and leaf.shape == spikes.shape for leaf in kept)
    assert not any(leaf.dtype == float and leaf.shape == spikes.shape for leaf in kept)


def test_one_step_stands_for_equal_steps(x64):
    x, weights = normal(0, 2, 1, 5), normal(1, 2, 4, 5)
    short = jax.value_and_grad(lambda x: jnp.sum(lif(x, time_axis=1, time_steps=4)[0] * weights))
    long = jax.value_and_grad(lambda x: jnp.sum(lif(jnp.repeat(x, 4, 1), time_axis=1)[0] * weights))
    assert_same(short(x), long(x))
    with pytest.raises(ValueError, match="1 or time_steps=4 time steps"):
        lif(normal(0, 2, 3, 5), time_axis=1, time_steps=4)
