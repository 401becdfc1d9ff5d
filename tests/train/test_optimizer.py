"""Schedules against closed forms, optimisers against PyTorch's update rules written out in NumPy."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spiking_mlp_jax.train.config import default_config
from spiking_mlp_jax.train.optimizer import make_optimizer, make_schedule

EPOCH = 7  # steps


def config_with(**fields):
    config = default_config()
    config.update(fields)
    return config


def rates(**fields):
    config = config_with(epochs=10, learning_rate=0.2, **fields)
    schedule = make_schedule(config, EPOCH)
    return np.array([schedule(jnp.asarray(step)) for step in range(10 * EPOCH)])


def test_cosine():
    expected = [0.1 * (1 + math.cos(math.pi * step / 70)) for step in range(70)]
    np.testing.assert_allclose(rates(schedule="cosine"), expected, rtol=1e-5, atol=1e-8)


def test_step():
    expected = [0.2 * 0.5 ** (step // 14) for step in range(70)]
    np.testing.assert_allclose(rates(schedule="step", step_epochs=2.0, gamma=0.5), expected, rtol=1e-6)


def test_exponential_is_the_usual_one_at_epochs():
    found = rates(schedule="exponential", gamma=0.9)
    np.testing.assert_allclose(found[::EPOCH], [0.2 * 0.9**epoch for epoch in range(10)], rtol=1e-5)
    np.testing.assert_allclose(found[1:] / found[:-1], 0.9 ** (1 / EPOCH), rtol=1e-5)


def test_constant():
    np.testing.assert_allclose(rates(schedule="constant"), 0.2, rtol=1e-6)


def test_linear_warmup_then_the_whole_cosine():
    found = rates(schedule="cosine", warmup_epochs=2.0, warmup_factor=0.1)
    warm = [0.2 * (0.1 + 0.9 * step / 14) for step in range(14)]
    after = [0.1 * (1 + math.cos(math.pi * step / 56)) for step in range(56)]
    np.testing.assert_allclose(found, warm + after, rtol=1e-5, atol=1e-8)


def test_constant_warmup_then_steps_counted_from_its_end():
    found = rates(
        schedule="step",
        step_epochs=3.0,
        gamma=0.1,
        warmup_epochs=1.0,
        warmup_factor=0.25,
        warmup_method="constant",
    )
    after = [0.2 * 0.1 ** (step // 21) for step in range(63)]
    np.testing.assert_allclose(found, [0.05] * 7 + after, rtol=1e-5)


@pytest.mark.parametrize("epoch_steps", [7, 390, 2502])
def test_long_step_schedules_fall_on_the_right_step(epoch_steps):
    config = config_with(epochs=90, schedule="step", step_epochs=30.0, learning_rate=1.0)
    schedule = make_schedule(config, epoch_steps)
    for period in (1, 2):
        first = period * 30 * epoch_steps
        assert float(schedule(jnp.asarray(first - 1))) == pytest.approx(0.1 ** (period - 1))
        assert float(schedule(jnp.asarray(first))) == pytest.approx(0.1**period)


def run(steps=6, **fields):
    config = config_with(epochs=1, schedule="constant", learning_rate=0.05, **fields)
    optimizer = make_optimizer(config, EPOCH)
    params = jnp.asarray([1.0, -2.0, 0.5])
    state = optimizer.init(params)
    path = []
    for step in range(steps):
        updates, state = optimizer.update(gradient(step, params), state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params))
    return path


def gradient(step, params):
    return params * 0.3 + (step - 2.0)


def reference(rule, steps=6):
    params, memory, path = np.array([1.0, -2.0, 0.5]), {}, []
    for step in range(steps):
        params = rule(step + 1, params, gradient(step, params), memory)
        path.append(params)
    return path


def test_sgd_with_momentum_and_coupled_decay():
    def rule(step, params, grad, memory):
        grad = grad + 0.1 * params
        memory["momentum"] = 0.9 * memory["momentum"] + grad if step > 1 else grad
        return params - 0.05 * memory["momentum"]

    found = run(optimizer="sgd", momentum=0.9, weight_decay=0.1)
    np.testing.assert_allclose(found, reference(rule), rtol=1e-5)


def test_plain_sgd_with_clipping():
    def rule(step, params, grad, memory):
        norm = np.linalg.norm(grad)
        return params - 0.05 * grad * min(1.0, 1.5 / norm)

    np.testing.assert_allclose(run(momentum=0.0, clip_norm=1.5), reference(rule), rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam(name):
    def rule(step, params, grad, memory):
        if name == "adam":
            grad = grad + 0.1 * params
        first = memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * grad
        second = memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * grad**2
        update = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        if name == "adamw":
            update = update + 0.1 * params
        return params - 0.05 * update

    np.testing.assert_allclose(run(optimizer=name, weight_decay=0.1), reference(rule), rtol=1e-4)
