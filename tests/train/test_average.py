"""The moving average of the weights: against NumPy, and on one device or eight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spiking_mlp_jax.train.config import default_config
from spiking_mlp_jax.train.evaluate import evaluated
from spiking_mlp_jax.train.sharding import make_mesh, shard_batch
from spiking_mlp_jax.train.state import Average, TrainState, abstract_state, init_state, update_average, with_average
from spiking_mlp_jax.train.step import make_train_step
from tests.support.tiny import tiny_config


def test_the_mean_of_numbers():
    """With the warm-up it is a mean with positive weights, of which the first value soon has none."""
    decay, value = 0.9, {"w": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)}
    average = Average({"w": jnp.full((), 100.0)}, {"count": jnp.zeros((), jnp.int32)})
    expected = 100.0
    for step in range(1, 200):
        value = {"w": jnp.float32(np.sin(step)), "count": jnp.int32(step)}
        average = update_average(average, {"w": value["w"]}, {"count": value["count"]}, jnp.int32(step), decay)
        kept = min(decay, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * np.sin(step)
        assert float(average.params["w"]) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert average.stats["count"] == step
        if step == 10:
            # A constant 0.9 would still hold 35 of the 100.
            assert abs(expected) < 2


@pytest.fixture(scope="module")
def runs():
    """States before and after each of four steps, on one device and on eight."""
    config, optimizer = default_config(), optax.sgd(0.1)
    config.update(mean=(0.5,), std=(0.5,), ema_decay=0.3)
    model = tiny_config(depths=(1,))
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(4, 16, 16, 16, 1), dtype=np.uint8)
    labels = rng.integers(3, size=(4, 16)).astype(np.int32)
    found = {}
    for devices in (1, 8):
        mesh = make_mesh(jax.devices()[:devices])
        graphdef, _ = abstract_state(model, optimizer)
        step = make_train_step(config, graphdef, optimizer, mesh)
        state = with_average(init_state(model, optimizer, 0, mesh))
        found[devices] = [jax.device_get(state)]
        for image, label in zip(images, labels, strict=True):
            state, _ = step(state, shard_batch({"image": image, "label": label}, mesh))
            found[devices].append(jax.device_get(state))
    return found


def test_against_numpy(runs):
    first = runs[1][0]
    np.testing.assert_equal(flat(first.average), flat(Average(first.params, first.stats)))
    expected = flat(first.average)
    for step, state in enumerate(runs[1][1:], 1):
        kept = min(0.3, (1 + step) / (10 + step))
        for name, value in flat(Average(state.params, state.stats)).items():
            counts = not np.issubdtype(value.dtype, np.floating)
            expected[name] = value if counts else kept * expected[name] + (1 - kept) * value
        for name, value in flat(state.average).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert any(np.any(value != flat(state.average)[name]) for name, value in flat(state.average._make(
        (state.params, state.stats))).items())  # fmt: skip


def test_eight_devices_keep_the_same_average(runs):
    one, eight = (flat(runs[devices][-1].average) for devices in (1, 8))
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_average_is_what_is_evaluated():
    average = Average({"w": 2.0}, {"mean": 3.0})
    state = TrainState(jnp.zeros((), jnp.int32), {"w": 1.0}, {"mean": 1.0}, None, average)
    assert evaluated(state, None) == ({"w": 2.0}, {"mean": 3.0})
    assert evaluated(state, lambda params, stats: (params, stats)) == (tuple(average), {"mean": 3.0})
    assert evaluated(TrainState(state.step, state.params, state.stats, None), None) == ({"w": 1.0}, {"mean": 1.0})


def flat(tree):
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
