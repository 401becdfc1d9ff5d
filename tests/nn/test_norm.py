import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiking_mlp_jax.nn.layers import Neuron
from spiking_mlp_jax.nn.norm import BatchNorm, LayerNorm


def randomised(norm, seed=0):
    rng = np.random.default_rng(seed)
    norm.scale[...] = jnp.asarray(rng.normal(1, 0.5, norm.scale.shape))
    norm.bias[...] = jnp.asarray(rng.normal(0, 0.5, norm.bias.shape))
    if isinstance(norm, BatchNorm):
        norm.mean[...] = jnp.asarray(rng.normal(0, 1, norm.mean.shape))
        norm.var[...] = jnp.asarray(rng.uniform(0.2, 2, norm.var.shape))
        if norm.step_scale is not None:
            norm.step_scale[...] = jnp.asarray(rng.normal(1, 0.5, norm.step_scale.shape))
    return norm


@given(
    shape=st.tuples(*[st.integers(1, 4)] * 4, st.integers(1, 5)),
    axis=st.sampled_from([-1, 2, 3]),
    tebn=st.booleans(),
    gain=st.sampled_from([1.0, 0.7]),
    seed=st.integers(0, 99),
)
def test_batch_norm_against_numpy(shape, axis, tebn, gain, seed):
    with jax.enable_x64(True):
        x = np.random.default_rng(seed).normal(3, 2, shape)
        steps = shape[1] if tebn else None
        norm = randomised(BatchNorm(shape[axis], axis, step_scales=steps, gain=gain), seed)
        old_mean, old_var = np.asarray(norm.mean[...]), np.asarray(norm.var[...])
        features_last = np.moveaxis(x, axis, -1)

        def expected(mean, var):
            y = (features_last - mean) / np.sqrt(var + 1e-5)
            y = np.moveaxis((y * norm.scale[...] + norm.bias[...]) * gain, -1, axis)
            return y * np.asarray(norm.step_scale[...]).reshape(1, -1, 1, 1, 1) if tebn else y

        norm.eval()
        np.testing.assert_allclose(norm(jnp.asarray(x)), expected(old_mean, old_var), rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(norm.mean[...], old_mean)
        norm.train()
        flat = features_last.reshape(-1, shape[axis])
        mean, var = flat.mean(0), flat.var(0)
        np.testing.assert_allclose(norm(jnp.asarray(x)), expected(mean, var), rtol=1e-7, atol=1e-7)
        unbiased = flat.var(0, ddof=1) if len(flat) > 1 else var
        np.testing.assert_allclose(norm.mean[...], 0.9 * old_mean + 0.1 * mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(norm.var[...], 0.9 * old_var + 0.1 * unbiased, rtol=1e-9, atol=1e-12)
        assert int(norm.num_batches[...]) == 1


def test_repeats_stand_for_equal_steps(x64):
    x = jax.random.normal(jax.random.key(0), (3, 1, 2, 2, 4))
    once, repeated = BatchNorm(4), BatchNorm(4)
    y = once(x, repeats=5)
    z = repeated(jnp.broadcast_to(x, (3, 5, 2, 2, 4)))
    np.testing.assert_allclose(jnp.broadcast_to(y, z.shape), z, rtol=1e-12)
    np.testing.assert_allclose(once.var[...], repeated.var[...], rtol=1e-12)


@given(
    shape=st.tuples(*[st.integers(1, 4)] * 5),
    axes=st.sampled_from([(3, 4), (2, 4), (4,)]),
    seed=st.integers(0, 99),
)
def test_layer_norm_against_numpy(shape, axes, seed):
    with jax.enable_x64(True):
        x = np.random.default_rng(seed).normal(3, 2, shape)
        norm = randomised(LayerNorm(tuple(shape[a] for a in axes), axes), seed)
        affine = [shape[i] if i in axes else 1 for i in range(5)]
        y = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
        y = y * np.asarray(norm.scale[...]).reshape(affine) + np.asarray(norm.bias[...]).reshape(affine)
        np.testing.assert_allclose(norm(jnp.asarray(x)), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_statistics_and_results_are_wide(dtype):
    # 1000 +- 1 has no variance left when squares are summed in half precision.
    x = (1000 + jax.random.normal(jax.random.key(0), (8, 2, 4, 4, 3))).astype(dtype)
    for norm in (BatchNorm(3), LayerNorm((3,), (-1,))):
        y = norm(x)
        assert y.dtype == jnp.float32 and bool(jnp.isfinite(y).all())
    wide = np.asarray(x, np.float64)
    batch_norm = BatchNorm(3)
    batch_norm(x)
    np.testing.assert_allclose(batch_norm.mean[...], 0.1 * wide.mean((0, 1, 2, 3)), rtol=1e-5)


def test_time_on_another_axis():
    x = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    norms = [BatchNorm(5, step_scales=2), BatchNorm(5, step_scales=2, time_axis=-3)]
    for norm in norms:
        norm.step_scale[...] = np.array([1.0, 3.0], np.float32)
    expected = Neuron(tau=1.5)(norms[0](x))
    moved = Neuron(tau=1.5, time_axis=0)(norms[1](x.swapaxes(0, 1)))
    np.testing.assert_array_equal(moved.swapaxes(0, 1), expected)
