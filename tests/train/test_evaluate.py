"""Evaluation is exact: every image counts once, whatever the batches and the padding."""

import jax
import numpy as np
import pytest
from flax import nnx

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.train.evaluate import Evaluation, evaluate, evaluate_model
from spiking_mlp_jax.train.sharding import make_mesh, replicated
from spiking_mlp_jax.train.step import make_eval_step
from tests.support.tiny import tiny_model

MEAN, STD = (0.4,), (0.3,)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=21).astype(np.int32)
    return rng.integers(256, size=(21, 16, 16, 1), dtype=np.uint8), labels


def padded(images, labels, size):
    for start in range(0, len(labels), size):
        count = min(size, len(labels) - start)
        # Padding is made of what would spoil every result if it counted.
        image = np.full((size, 16, 16, 1), 255, np.uint8)
        label = np.full(size, 2, np.int32)
        image[:count], label[:count] = images[start : start + count], labels[start : start + count]
        yield {"image": image, "label": label, "mask": np.arange(size) < count}


def test_against_one_plain_forward_pass(images):
    model = tiny_model()
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    mesh = make_mesh()
    placed = jax.device_put((params, stats), replicated(mesh))
    step = make_eval_step(graphdef, MEAN, STD, mesh)
    result = evaluate(step, *placed, padded(*images, 8), mesh)

    model.eval()
    logits, seen = model(
        jax.numpy.asarray(normalize(images[0], MEAN, STD)),
        observe=lambda name, value: value if name.endswith(".spikes") else None,
    )
    scores = np.asarray(logits.mean(0), np.float64)
    log_probabilities = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    expected = np.zeros((3, 3), np.int64)
    np.add.at(expected, (images[1], scores.argmax(1)), 1)
    assert result.images == 21
    np.testing.assert_array_equal(result.confusion, expected)
    assert result.accuracy == (scores.argmax(1) == images[1]).mean()
    assert result.loss == pytest.approx(-log_probabilities[np.arange(21), images[1]].mean(), rel=1e-5)
    assert set(result.firing_rates) == set(seen)
    for name, spikes in seen.items():
        assert result.firing_rates[name] == pytest.approx(float(spikes.mean()), rel=1e-5, abs=1e-9), name
    for label, accuracy in enumerate(result.class_accuracy):
        assert accuracy == pytest.approx(expected[label, label] / expected[label].sum())

    alone = evaluate_model(model, padded(*images, 21), MEAN, STD)
    np.testing.assert_array_equal(alone.confusion, expected)
    assert alone.loss == pytest.approx(result.loss, rel=1e-6)


def test_no_images():
    with pytest.raises(InputError, match="no images"):
        evaluate_model(tiny_model(), [], MEAN, STD)


def test_unhealthy_layers_and_empty_classes():
    rates = {"a.spikes": 0.0009, "b.spikes": 0.001, "c.spikes": 0.95, "d.spikes": 0.96}
    result = Evaluation(4, 0.5, np.array([[3, 1], [0, 0]]), rates)
    assert result.class_accuracy == [0.75, None]
    assert result.accuracy == 0.75
    silent, saturated = result.unhealthy_layers()
    assert silent.startswith("a.spikes is silent") and saturated.startswith("d.spikes is saturated")


def test_two_steps_may_be_built_before_either_is_used(images):
    model = tiny_model(depths=(1,))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    mesh = make_mesh(jax.devices()[:1])
    batch = next(padded(*images, 4))
    steps = [make_eval_step(graphdef, MEAN, STD, mesh) for _ in range(2)]
    for step in steps:
        assert step.lower(params, stats, batch).as_text().startswith("module @jit_eval_step ")
    with pytest.raises(AssertionError, match="traced"):
        steps[0].lower(params, stats, next(padded(*images, 5)))
