"""Measurements of a trained run, against independent computations."""

from typing import Any

import jax
import numpy as np
import pytest

from spiking_mlp_jax import SpikingMLP
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.pixels import Pixels, normalize
from spiking_mlp_jax.sweep import measure
from spiking_mlp_jax.sweep.measure import accuracy_by_time_steps, with_time_steps
from spiking_mlp_jax.train.evaluate import evaluate_model
from tests.support.random_model import random_model, set_value, variables
from tests.support.tiers import rest_slow
from tests.support.tiny import tiny_batches, tiny_config

MEAN, STD = (0.4,), (0.3,)


def batches():
    for batch in tiny_batches(3, 8):
        yield {**batch, "mask": np.arange(8) < 7}


def of_steps(model, steps) -> SpikingMLP:
    """A network built for this number of steps, with a model's values set one by one."""
    other = random_model(**{**overrides(model), "time_steps": steps})
    theirs = variables(model)
    for name, variable in variables(other).items():
        value = theirs[name][...]
        variable.set_value(value[..., :steps] if name.endswith("step_scale") else value)
    other.pixels = model.pixels
    return other


def overrides(model):
    base = tiny_config()
    return {k: v for k, v in vars(model.config).items() if v != getattr(base, k)}


@pytest.mark.parametrize(
    "fields", rest_slow([{"depths": (1,)}, {"depths": (1,), "norm": "tebn", "time_steps": 3}]), ids=str
)
def test_test_time_steps_are_direct_evaluations(fields):
    model: Any = random_model(**fields)
    model.pixels = Pixels(MEAN, STD)
    # Random weights prefer one class for every image; without that bias, predictions differ between images and steps.
    first = normalize(next(iter(batches()))["image"], MEAN, STD)
    set_value(model, "head.bias", variables(model)["head.bias"][...] - jax.jit(lambda x: model(x))(first).mean((0, 1)))
    possible = (1, 3, 5) if model.config.norm == "batch" else (1, 3)
    found, without = accuracy_by_time_steps(model, batches(), (1, 3, 5))
    assert set(found) == set(possible) and set(without) == {1, 3, 5} - set(possible)
    for steps in possible:
        direct = evaluate_model(of_steps(model, steps), batches(), MEAN, STD)
        assert direct.images == 21 and found[steps] == direct.accuracy
    assert len(set(found.values())) > 1  # the steps matter
    if without:
        assert "none for later ones" in without[5]
        with pytest.raises(InputError, match="3 time steps"):
            with_time_steps(model, 5)
        assert accuracy_by_time_steps(model, batches(), (5,)) == ({}, without)


def test_latency_times_all_images_in_turn(monkeypatch):
    seen, now = [], [0.0]

    def run(images):
        seen.extend(images[:, 0, 0, 0].tolist())
        now[0] += 0.002 if images[0, 0, 0, 0] < 5 else 0.004

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    images = np.arange(24, dtype=np.uint8).reshape(24, 1, 1, 1)
    assert measure._median_ms(run, images, 1) == pytest.approx(4.0)
    calls = seen[3:]  # the first three warm up
    assert calls[:24] == list(range(24)) and calls[24:27] == [0, 1, 2]
    assert 250 <= len(calls) <= 300  # a second
    seen.clear()
    assert measure._median_ms(run, images, 12) == pytest.approx(3.0 / 12)
