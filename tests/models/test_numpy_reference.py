"""The NumPy reference agrees with the official code's numbers, and training in JAX with training in NumPy."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tests.oracles.numpy_reference as reference
from spiking_mlp_jax import ModelConfig, SpikingMLP
from spiking_mlp_jax.interop import official
from tests.support.tiers import rest_slow

GOLDEN = Path(__file__).parents[1] / "oracles" / "golden"
NETWORKS = ["spe_small", "conv_small", "spe_layernorm", "spe_tdbn", "spe_tebn"]
STEPS, LEARNING_RATE, MOMENTUM = 10, 0.1, 0.9
# Compiling takes longer here than running: leave the optimizer out.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def load_golden(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def under(golden, prefix):
    """The entries whose keys start with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def assert_close(ours, expected, tolerance):
    """Same names, shapes and values; `tolerance` is relative, and absolute for what is smaller than 1."""
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert np.shape(ours[name]) == np.shape(value), name
        np.testing.assert_allclose(ours[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("name", NETWORKS)
def test_reference_in_evaluation(name):
    golden = load_golden(name)
    config, state = json.loads(str(golden["config"])), under(golden, "state/")
    logits, rates, statistics, _ = reference.forward(state, golden["image_nchw"], config, train=False)
    np.testing.assert_allclose(logits, golden["eval_logits"], rtol=1e-12, atol=1e-12)
    assert rates == under(golden, "firing_rate/")
    assert not statistics


@pytest.mark.parametrize("name", NETWORKS)
def test_reference_in_training(name):
    golden = load_golden(name)
    config, state = json.loads(str(golden["config"])), under(golden, "state/")
    logits, _, statistics, backward = reference.forward(state, golden["image_nchw"], config, train=True)
    loss, d_logits = reference.cross_entropy(logits, golden["label"])
    np.testing.assert_allclose(logits, golden["train_logits"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(loss, golden["train_loss"], rtol=1e-12)
    assert_close(backward(d_logits), under(golden, "grad/"), 1e-12)
    counts = {key: statistics.pop(key) for key in list(statistics) if key.endswith("num_batches_tracked")}
    assert_close(statistics, under(golden, "after/"), 1e-12)
    assert set(counts.values()) == {1}


def test_reference_neuron():
    golden = load_golden("lif")
    checked = 0
    for case in range(48):
        config = json.loads(str(golden[f"case{case}/config"]))
        tau, threshold, alpha = (config.pop(key) for key in ("tau", "v_threshold", "alpha"))
        if config != dict(decay_input=True, v_reset=0.0, detach_reset=True, surrogate="sigmoid"):
            continue
        spikes, backward = reference.leaky_integrate_and_fire(golden[f"case{case}/x"], tau, threshold, alpha)
        np.testing.assert_array_equal(spikes, golden[f"case{case}/spikes"])
        gradient = backward(golden[f"case{case}/cotangent"])
        np.testing.assert_allclose(gradient, golden[f"case{case}/grad_x"], rtol=1e-12, atol=1e-12)
        checked += 1
    assert checked == 3  # tau 1.25, 2 and 3


def random_state(model, rng):
    """The model's initial state, with scales, biases and running statistics no longer at 1 and 0."""
    state = official.state_dict(model)
    for name, value in state.items():
        if value.ndim == 1 or name.endswith(".bias"):
            state[name] = value + rng.uniform(-0.2, 0.2, value.shape)
        assert value.dtype == (np.int64 if name.endswith("tracked") else np.float64)
    return state


def train_in_jax(model, batches):
    """The losses of SGD in JAX; the model holds the result."""
    model.train()
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    optimizer = optax.sgd(LEARNING_RATE, MOMENTUM)

    @jit
    def step(params, stats, opt_state, images, labels):
        def loss_of(params):
            merged = nnx.merge(graphdef, params, stats, copy=True)
            scores = merged(images).mean(0)
            loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
            return loss, nnx.state(merged, nnx.BatchStat)

        (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    opt_state, losses = jit(optimizer.init)(params), []
    for images, labels in batches:
        images = jnp.asarray(images.transpose(0, 2, 3, 1))
        params, stats, opt_state, loss = step(params, stats, opt_state, images, jnp.asarray(labels))
        losses.append(float(loss))
    nnx.update(model, params, stats)
    return losses


@pytest.mark.parametrize("encoding", rest_slow(["spe", "plain"]))
def test_training_agrees(encoding, x64):
    """Ten steps of SGD with momentum give the same losses, parameters and running statistics."""
    sizes = dict(image_size=16, in_channels=3, num_classes=5, patch_size=4, dim=6, depths=(1, 2))
    rng = np.random.default_rng(0)
    batches = [(rng.normal(0, 1, (4, 3, 16, 16)), rng.integers(0, 5, 4)) for _ in range(STEPS)]
    config = ModelConfig(**sizes, expansion=2, time_steps=3, encoding=encoding, norm="batch")
    model = nnx.merge(*jit(lambda: nnx.split(SpikingMLP(config, rngs=nnx.Rngs(0))))())
    state = random_state(model, rng)
    initial = dict(state)
    official.load_state_dict(model, state)

    losses = train_in_jax(model, batches)
    names = dict(sizes, model="spe" if encoding == "spe" else "conv", T=3, alpha=2)
    expected = reference.sgd(state, batches, names, LEARNING_RATE, MOMENTUM, STEPS)

    np.testing.assert_allclose(losses, expected, rtol=1e-8)
    assert_close(official.state_dict(model), state, 1e-8)
    # Every parameter took part, except for the biases that the norm after them takes away again.
    moved = {name for name in state if np.abs(state[name] - initial[name]).max() > 0.01}
    assert set(state) - moved == {f"token_mix.{n}.proj_{axis}.1.bias" for n in range(3) for axis in "hw"}
