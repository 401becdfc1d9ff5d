"""The neurons' kernel against the plain program: interpreted for values, lowered to see that GPU and TPU get it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from spiking_mlp_jax import SpikingMLP
from spiking_mlp_jax.nn import dynamics
from spiking_mlp_jax.nn import neuron as neurons
from spiking_mlp_jax.nn.fused import normalize_and_fire
from spiking_mlp_jax.nn.kernels import neuron as pallas_neuron
from spiking_mlp_jax.nn.layers import Neuron, fire
from spiking_mlp_jax.nn.neuron import lif, plif, plif_weight
from spiking_mlp_jax.nn.norm import BatchNorm
from spiking_mlp_jax.nn.surrogate import SURROGATES
from spiking_mlp_jax.train.sharding import make_mesh
from tests.nn.test_fused import MODES, constants, normal
from tests.support.tiers import rest_slow
from tests.support.tiny import tiny_config

TARGETS = ["gpu", "tpu"]
# What each platform's compiler calls a kernel of its own.
CALLS = {"cuda": "triton", "tpu": "tpu_custom_call"}


def assert_equal_neurons(mode, shape, axis, target, dtype=jnp.float32):
    """Spikes, potential and all gradients of the kernel and of the plain program."""
    k = constants32(mode)
    state = shape[:axis] + shape[axis + 1 :]
    x, ds = (normal(seed, *shape, scale=2.0).astype(dtype).astype(jnp.float32) for seed in (0, 1))
    v, dv = (0.3 * normal(seed, *state).astype(jnp.float32) for seed in (2, 3))
    kernel = dict(target=target, interpret=True)
    plain = jax.jit(functools.partial(dynamics.forward, mode, axis))(k, x, v)
    fused = jax.jit(functools.partial(pallas_neuron.forward, mode, axis, **kernel))(k, x, v)
    np.testing.assert_array_equal(fused[0], plain[0])
    np.testing.assert_allclose(fused[1], plain[1], rtol=1e-6, atol=1e-6)
    plain = jax.jit(functools.partial(dynamics.backward, mode, axis))(k, x, v, ds=ds, dv=dv)
    fused = jax.jit(functools.partial(pallas_neuron.backward, mode, axis, **kernel))(k, x, v, ds=ds, dv=dv)
    assert jax.tree.structure(plain) == jax.tree.structure(fused)
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def constants32(mode):
    return jax.tree.map(lambda value: value.astype(jnp.float32), constants(mode))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("steps", rest_slow([4, 1, 17]))
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode, steps, target):
    assert_equal_neurons(mode, (2, steps, 3, 47), 1, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("learned", rest_slow([True, False]))
def test_every_surrogate(name, learned, target):
    mode = dataclasses.replace(MODES[0], surrogate=SURROGATES[name](2.0), learned=learned)
    assert_equal_neurons(mode, (9, 2, 150), 0, target)


@pytest.mark.parametrize("target", TARGETS)
@given(st.lists(st.integers(1, 7), min_size=0, max_size=3), st.integers(1, 10), st.integers(0, 3), st.integers(1, 700))
def test_any_shape(target, before, steps, axis, last):
    shape = [*before, last]
    axis = min(axis, len(shape))
    shape.insert(axis, steps)
    assert_equal_neurons(MODES[3], tuple(shape), axis, target)


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_of_bfloat16(target):
    assert_equal_neurons(MODES[0], (2, 9, 5, 130), 1, target, jnp.bfloat16)


def lowered(function, platform, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", CALLS)
@pytest.mark.parametrize("steps", rest_slow([9, 4, 40]))
@pytest.mark.parametrize("mode", MODES)
def test_lowers_forward_and_backward(mode, steps, platform):
    mode = dataclasses.replace(mode, backend="pallas")
    x = jnp.ones((2, steps, 6, 6, 78), jnp.float32)
    v, k = x[:, 0], constants32(mode)
    forward = lowered(lambda k, x, v: neurons.forward(mode, 1, k, x, v), platform, k, x, v)
    backward = lowered(lambda k, x, v: neurons.backward(mode, 1, k, x, v, x, v), platform, k, x, v)
    for text in (forward, backward):
        assert CALLS[platform] in text


@pytest.mark.parametrize(("steps", "kernel"), [(4, False), (9, True)])
def test_auto_takes_the_kernel_for_many_steps_and_never_on_a_cpu(steps, kernel):
    mode = dataclasses.replace(MODES[0], backend="auto")
    x = jnp.ones((2, steps, 300), jnp.float32)

    def both(k, x, v):
        return neurons.forward(mode, 1, k, x, v), neurons.backward(mode, 1, k, x, v, x, v)

    arguments = constants32(mode), x, x[:, 0]
    for platform, call in CALLS.items():
        assert (call in lowered(both, platform, *arguments)) == kernel
    text = lowered(both, "cpu", *arguments)
    assert not any(call in text for call in CALLS.values())
    if not kernel:  # nor does it cost anything there
        assert "platform_index" not in str(jax.make_jaxpr(both)(*arguments))


def test_float64_and_huge_blocks_stay_with_xla(x64):
    mode = dataclasses.replace(MODES[0], backend="pallas")
    x = jnp.ones((2, 9, 300), jnp.float64)
    forward = functools.partial(neurons.forward, mode, 1)
    assert CALLS["cuda"] not in lowered(forward, "cuda", constants(mode), x, x[:, 0])
    assert not pallas_neuron.fits((2, 10_000, 8, 128), 1, "tpu") and pallas_neuron.fits((2, 10_000, 8, 128), 1, "gpu")
    assert not pallas_neuron.fits((0, 4, 8), 1, "gpu")


def test_public_neurons_take_a_backend():
    x = normal(0, 11, 5, 7, scale=2.0).astype(jnp.float32)
    w = jnp.float32(plif_weight(1.6))
    for neuron in (lif, lambda x, **given: plif(x, w, **given)):
        results = [
            jax.value_and_grad(lambda x, b=backend, n=neuron: jnp.sum(n(x, backend=b)[0] * jnp.arange(7)))(x)
            for backend in ("pallas", "xla", "auto")
        ]
        for other in results[1:]:
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), other, results[0])
    with pytest.raises(ValueError, match='must be "auto", "xla" or "pallas", got \'cuda\''):
        lif(x, backend="cuda")


def test_norm_and_neuron_with_the_kernel():
    z = normal(0, 2, 9, 3, 3, 20, scale=2.0).astype(jnp.float32)
    scale, bias = jnp.ones(20, jnp.float32), jnp.zeros(20, jnp.float32)

    def loss(backend, z):
        mode = dataclasses.replace(MODES[0], backend=backend)
        spikes, potential, *_ = normalize_and_fire(mode, 4, 1.0, (), constants32(mode), z, None, scale, bias, None)
        return jnp.sum(spikes * jnp.arange(20)) + jnp.sum(jnp.sin(potential))

    kernel, plain = (jax.jit(jax.value_and_grad(functools.partial(loss, b)))(z) for b in ("pallas", "xla"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), kernel, plain)


@pytest.mark.slow
@pytest.mark.parametrize("neuron", rest_slow(["lif", "plif"]))
def test_whole_network_with_the_kernel(neuron):
    results = []
    for backend in ("pallas", "xla"):
        config = tiny_config(neuron=neuron, neuron_backend=backend, time_steps=9)
        graphdef, params, stats = nnx.split(SpikingMLP(config, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
        images = normal(0, 2, 16, 16, 1).astype(jnp.float32)

        def loss(params, graphdef=graphdef, stats=stats, images=images):
            logits = nnx.merge(graphdef, params, stats, copy=True)(images)
            return jnp.sum(jnp.square(logits)), logits

        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * max(1e-2, float(jnp.abs(b).max())))


def test_vmap_over_neurons_and_over_constants():
    mode = dataclasses.replace(MODES[0], backend="pallas")
    x = normal(0, 3, 2, 9, 40, scale=2.0).astype(jnp.float32)
    k = constants32(mode)

    def run(k, x, backend):
        return neurons.forward(dataclasses.replace(mode, backend=backend), 1, k, x, jnp.zeros_like(x[:, 0]))[0]

    taus = k._replace(tau=jnp.asarray([1.5, 2.0, 4.0], jnp.float32))
    for over in (None, 0):
        in_axes = (type(k)(over, None, None), 0)
        got, want = (
            jax.vmap(functools.partial(run, backend=backend), in_axes)(taus if over == 0 else k, x)
            for backend in ("pallas", "xla")
        )
        np.testing.assert_array_equal(got, want)


def near(ours, plain):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_program_of_several_tpus_takes_no_kernel():
    mesh = make_mesh()
    x = jax.ShapeDtypeStruct((8, 9, 130), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    run = functools.partial(lif, time_axis=1)
    assert CALLS["tpu"] not in lowered(run, "tpu", x)
    # The tpu's compiler would be asked for a rule it does not know.
    assert "CustomSPMDPartitioning" not in lowered(run, "tpu", x)
    assert "CustomSPMDPartitioning" in lowered(run, "cuda", x)

    for check_vma in (False, True):
        each = jax.shard_map(
            run, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), check_vma=check_vma
        )
        for platform, call in CALLS.items():
            assert call in lowered(each, platform, x)


def test_devices_share_a_kernel():
    mesh = make_mesh()
    x = jax.device_put(normal(0, 8, 9, 130, scale=2.0).astype(jnp.float32), NamedSharding(mesh, PartitionSpec("data")))
    w = jnp.float32(0.3)

    def loss(x, w, backend):
        spikes, v = plif(x, w, time_axis=1, backend=backend)
        return jnp.sum(spikes * jnp.sin(x)) + jnp.sum(v**2)

    ours, plain = (jax.jit(jax.grad(functools.partial(loss, backend=b), (0, 1))) for b in ("pallas", "xla"))
    near(ours(x, w), plain(x, w))
    assert ours(x, w)[0].sharding.spec[0] == "data"
    program = ours.lower(x, w).compile().as_text()
    assert "all-gather" not in program and "all-to-all" not in program


@pytest.mark.parametrize("backend", ["xla", "pallas", "auto"])
@pytest.mark.parametrize("steps", [4, 9])
def test_inside_shard_map(steps, backend):
    """With the account that shard_map keeps of what varies over devices, `check_vma`."""
    mesh = make_mesh()
    x = normal(0, 8, steps, 20, scale=2.0).astype(jnp.float32)
    w = jnp.float32(0.3)

    def loss(x, w, backend):
        spikes, v = plif(x, w, time_axis=1, backend=backend)
        return jnp.sum(spikes * jnp.sin(x)) + jnp.sum(v**2)

    def share(x, w):
        value, gradients = jax.value_and_grad(functools.partial(loss, backend=backend), (0, 1))(x, w)
        return jax.lax.psum(value, "data"), gradients

    split, same = PartitionSpec("data"), PartitionSpec()
    each = jax.shard_map(share, mesh=mesh, in_specs=(split, same), out_specs=(same, (split, same)), check_vma=True)
    near(jax.jit(each)(x, w), jax.value_and_grad(functools.partial(loss, backend="xla"), (0, 1))(x, w))


@pytest.mark.parametrize("backend", ["xla", "pallas"])
def test_norm_and_neurons_inside_shard_map(backend):
    """Of parameters that all devices share; each device's batch has its own statistics."""
    mesh = make_mesh()
    z = normal(0, 16, 9, 20, scale=2.0).astype(jnp.float32)
    graphdef, variables = nnx.split((BatchNorm(20), Neuron(backend=backend)))

    def loss(variables, z):
        norm, neuron = nnx.merge(graphdef, variables, copy=True)
        return jnp.sum(fire(norm, neuron, z)[0] * jnp.sin(z))

    def share(variables, z):
        value, gradients = jax.value_and_grad(loss, allow_int=True)(variables, z)
        return jax.lax.psum(value, "data"), gradients[0]["scale"]

    split, same = PartitionSpec("data"), PartitionSpec()
    each = jax.shard_map(share, mesh=mesh, in_specs=(same, split), out_specs=same, check_vma=True)
    alone = [jax.value_and_grad(loss, allow_int=True)(variables, part) for part in jnp.split(z, mesh.size)]
    value, scale = sum(value for value, _ in alone), sum(gradients[0]["scale"][...] for _, gradients in alone)
    near(jax.jit(each)(variables, z), (value, scale))


@pytest.mark.parametrize("shape", [(9, 20), pytest.param((9, 140), marks=pytest.mark.slow)])
def test_batched_and_differentiated_twice(shape):
    x = normal(0, 3, *shape, scale=2.0).astype(jnp.float32)
    w = jnp.asarray([0.3, -0.2, 0.1], jnp.float32)

    def loss(x, w, backend):
        spikes, v = plif(x, w, backend=backend)
        return jnp.sum(spikes * jnp.sin(x)) + jnp.sum(v**3)

    for axes, weights in (((0, 0), w), ((0, None), w[0])):
        ours, plain = (
            jax.vmap(jax.grad(functools.partial(loss, backend=b), (0, 1)), axes)(x, weights) for b in ("pallas", "xla")
        )
        near(ours, plain)

    def curvature(x, backend):
        first = jax.grad(functools.partial(loss, backend=backend))
        return jax.grad(lambda x: jnp.sum(first(x, w[0]) ** 2))(x)

    near(curvature(x[0], "pallas"), curvature(x[0], "xla"))
