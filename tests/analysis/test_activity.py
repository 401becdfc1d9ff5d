"""Measures of activity against NumPy, from the spikes and logits of a tiny network and from planted ones."""

import dataclasses

import jax
import numpy as np
import pytest

from spiking_mlp_jax.analysis.activity import measure as activity
from spiking_mlp_jax.analysis.activity import membrane, rates, similarity, stream
from spiking_mlp_jax.analysis.activity.rates import dead_and_saturated, rates_of
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.train.evaluate import evaluate_model
from tests.support.random_model import random_model, set_value
from tests.support.tiny import tiny_model

COUNT, STEPS = 7, 5
RNG = np.random.default_rng(0)
BYTES = RNG.integers(256, size=(COUNT, 16, 16, 1), dtype=np.uint8)
IMAGES = ((BYTES / np.float32(255) - np.float32(0.25)) / np.float32(0.5)).astype(np.float32)
LABELS = np.array([0, 2, 1, 1, 0, 2, 2], np.int32)
FIRST, HIDDEN = "stage0.encode.spikes", "stage1.block1.channel.hidden.spikes"


@pytest.fixture(scope="module")
def model():
    """A network with a dead and a saturated channel, a dead token and a silent layer."""
    model = random_model(time_steps=STEPS)
    bias = np.linspace(-1, 2, 6)
    bias[[1, 4]] = -1e3, 1e4
    set_value(model, "stages.0.encode.norm.bias", bias)
    # Features are the 4 tokens: the second, in the upper right, never fires; stacked over the two blocks.
    hidden = np.full((2, 4), 0.5)
    hidden[1, 1] = -1e4
    set_value(model, "stages.1.blocks.channel.hidden_norm.bias", hidden)
    set_value(model, "stages.0.blocks.token.width.norm.bias", -1e4)
    return model


@pytest.fixture(scope="module")
def seen(model):
    """Logits [T, B, K] and every intermediate [B, T, H, W, C]."""
    logits, values = jax.jit(lambda images: model(images, observe=lambda name, x: x))(IMAGES)
    return np.asarray(logits), {name: np.asarray(value) for name, value in values.items()}


@pytest.fixture(scope="module")
def spikes(seen):
    """Spikes by layer, in the network's order."""
    return {name: seen[1][name] for name in stream.in_network_order(seen[1], tiny_config5()) if "spikes" in name}


def tiny_config5():
    return tiny_model(time_steps=STEPS).config


@pytest.fixture(scope="module")
def found(model):
    """Everything, in batches of 3, 3 and 1."""
    done = []
    result = activity.measure(model, IMAGES, LABELS, batch_size=3, similarity_images=5, progress=done.append)
    assert done == [3, 6, 7]
    return result


def test_rates(found, spikes):
    rates = found.rates
    assert rates.images == COUNT
    for kind in ("layer", "step", "channel", "token", "neuron"):
        assert list(getattr(rates, kind)) == list(spikes)
    for name, fired in spikes.items():
        assert rates.layer[name] == pytest.approx(fired.mean(dtype=float), abs=1e-12)
        np.testing.assert_allclose(rates.step[name], fired.mean((0, 2, 3, 4), dtype=float))
        np.testing.assert_allclose(rates.channel[name], fired.mean((0, 1, 2, 3), dtype=float))
        np.testing.assert_allclose(rates.token[name], fired.mean((0, 1, 4), dtype=float))
        np.testing.assert_allclose(rates.neuron[name], fired.mean((0, 1), dtype=float))
    # The tiny network is no trivial case.
    assert sum(0.02 < rate < 0.98 for rate in rates.layer.values()) > len(rates.layer) / 2


def test_rates_are_those_of_the_other_functions(found, model):
    rasters = stream.rasters(model, IMAGES)
    assert {fired.dtype for fired in rasters.values()} == {np.dtype(bool)}
    assert rasters[FIRST].shape[0] == COUNT
    assert list(rasters) == list(found.rates.layer)
    assert {name: fired.mean() for name, fired in rasters.items()} == pytest.approx(found.rates.layer, abs=1e-6)


def test_planted_dead_and_saturated_units(found, spikes):
    units = found.units
    assert units.units[FIRST].dead_channels.tolist() == [False, True, False, False, False, False]
    assert units.units[FIRST].saturated_channels[4]
    assert units.units[FIRST].dead_neurons[..., 1].all()
    assert units.units[FIRST].dead_channels.any()
    # A dead token kills no channel.
    assert units.units[HIDDEN].dead_neurons[0, 1].all()
    assert not units.units[HIDDEN].dead_neurons[1].all()
    for name, fired in spikes.items():
        counts = fired.sum((0, 1))
        np.testing.assert_array_equal(units.units[name].dead_neurons, counts == 0)
        np.testing.assert_array_equal(units.units[name].saturated_neurons, counts == COUNT * STEPS)
        np.testing.assert_array_equal(units.units[name].dead_channels, fired.sum((0, 1, 2, 3)) == 0)
        assert units.units[name].shares()["dead_neurons"] == pytest.approx((counts == 0).mean())
    assert "stage0.block0.token.width.spikes" in units.silent_layers
    assert FIRST not in units.silent_layers + units.saturated_layers
    assert set(units.silent_layers) == {name for name, fired in spikes.items() if fired.mean() < 0.001}
    assert units.unseen == pytest.approx(3 / 7)


def test_thresholds_of_dead_and_saturated():
    counts = {"a.spikes": np.array([[[[0, 1, 9, 10]]], [[[0, 0, 10, 10]]]])}
    rates = rates_of(counts, 10)
    strict = dead_and_saturated(rates).units["a.spikes"]
    assert strict.dead_channels.tolist() == [True, False, False, False]
    assert strict.saturated_channels.tolist() == [False, False, False, True]
    loose = dead_and_saturated(rates, dead=0.05, saturated=0.95)
    assert loose.units["a.spikes"].dead_channels.tolist() == [True, True, False, False]
    assert loose.units["a.spikes"].saturated_channels.tolist() == [False, False, True, True]
    # The layer's mean, 0.5, is healthy though no unit carries information.
    assert loose.silent_layers == loose.saturated_layers == []


def test_a_silent_layer_may_have_no_dead_neuron():
    rates = rates_of({"a.spikes": np.ones((1, 2, 2, 3), int)}, 5000)
    found = dead_and_saturated(rates)
    assert found.silent_layers == ["a.spikes"]
    assert found.units["a.spikes"].shares() == dict.fromkeys(found.units["a.spikes"].shares(), 0)


def test_spike_trains(found, spikes):
    for name, fired in spikes.items():
        check_trains(found.intervals[name], fired.reshape(COUNT, STEPS, -1).transpose(0, 2, 1).reshape(-1, STEPS))


def check_trains(ours, trains):
    """Compares with loops over trains [trains, T]."""
    steps = trains.shape[1]
    intervals = [np.diff(np.flatnonzero(train)) for train in trains]
    every = np.concatenate([np.zeros(0, int), *intervals])
    np.testing.assert_array_equal(ours.lengths, np.bincount(every, minlength=steps + 1)[1:steps])
    np.testing.assert_array_equal(ours.counts, np.bincount(trains.sum(1).astype(int), minlength=steps + 1))
    later = trains[:, 1:].sum()
    expected = (trains[:, 1:] * trains[:, :-1]).sum() / later if later else np.nan
    assert ours.following == pytest.approx(expected, nan_ok=True)
    several = [i for i in intervals if len(i) > 1] if steps > 3 else []
    cv = [i.std() / i.mean() for i in several]
    assert ours.cv_trains == len(cv)
    assert ours.cv == pytest.approx(np.mean(cv) if cv else np.nan, abs=1e-6, nan_ok=True)
    lv = [3 * ((a - b) / (a + b)) ** 2 for i in several for a, b in zip(i[1:], i[:-1], strict=True)]
    assert ours.lv_pairs == len(lv)
    assert ours.lv == pytest.approx(np.mean(lv) if lv else np.nan, abs=1e-6, nan_ok=True)
    assert ours.rate == pytest.approx(trains.mean())
    counts = trains.sum(1)
    assert ours.fano == pytest.approx(counts.var() / counts.mean() if counts.any() else np.nan, nan_ok=True)


def test_membrane_histograms(found, seen, spikes):
    membrane = found.membrane
    assert membrane.mismatches == dict.fromkeys(spikes, 0)
    assert np.any(np.abs(membrane.edges - 1) < 1e-12)
    for name in spikes:
        h = lif(seen[1][name.replace("spikes", "potential")])
        assert membrane.counts[name].sum() == h.size
        np.testing.assert_allclose(membrane.above(name), found.rates.step[name], atol=1e-12)
        inside = np.clip(h, membrane.edges[0], membrane.edges[-1] - 1e-9)
        expected = np.stack([np.histogram(inside[:, t], membrane.edges)[0] for t in range(STEPS)])
        # Float32 and float64 may disagree on which side of an edge a potential lies.
        assert np.abs(membrane.counts[name] - expected).sum() <= 2e-3 * h.size + 4
        near = np.abs(h - 1) < 0.1
        assert membrane.near(name) == pytest.approx(near.mean(), abs=2e-3)


def lif(x):
    """Potentials h before firing, for the network's defaults."""
    h = np.zeros((x.shape[0], STEPS, *x.shape[2:]))
    v = np.zeros((x.shape[0], *x.shape[2:]))
    for t in range(STEPS):
        h[:, t] = v + (x[:, t if x.shape[1] > 1 else 0] - v) / 2
        v = np.where(h[:, t] >= 1, 0, h[:, t])
    return h


def test_information(found, seen, model):
    information, logits = found.information, seen[0].astype(float)
    for t in range(STEPS):
        mean = logits[: t + 1].mean(0)
        predicted = mean.argmax(1)
        confusion = np.zeros((3, 3), int)
        np.add.at(confusion, (LABELS, predicted), 1)
        np.testing.assert_array_equal(information.confusion[t], confusion)
        assert information.accuracy[t] == pytest.approx((predicted == LABELS).mean())
        assert information.alone[t] == pytest.approx((logits[t].argmax(1) == LABELS).mean())
        assert information.agreement[t] == pytest.approx((predicted == logits.mean(0).argmax(1)).mean())
        loss = np.log(np.exp(mean).sum(1)) - mean[np.arange(COUNT), LABELS]
        assert information.loss[t] == pytest.approx(loss.mean(), rel=1e-5)
    assert information.agreement[-1] == 1
    np.testing.assert_allclose(information.errors**2 * COUNT, information.accuracy * (1 - information.accuracy))
    batch = {"image": BYTES, "label": LABELS, "mask": np.ones(COUNT, bool)}
    evaluation = evaluate_model(model, [batch], [0.25], [0.5])
    np.testing.assert_array_equal(information.confusion[-1], evaluation.confusion)
    assert information.loss[-1] == pytest.approx(evaluation.loss, rel=1e-6)
    assert information.accuracy[-1] == evaluation.accuracy
    assert found.rates.layer == pytest.approx(stream.in_network_order(evaluation.firing_rates, model.config), abs=1e-6)


def test_mutual_information():
    perfect, constant = 25 * np.eye(4, dtype=int), np.zeros((4, 4), int)
    constant[:, 2] = 25
    independent = np.full((4, 4), 6)
    ones = np.ones(3)
    about = activity.Information(100, ones, ones, ones, ones, np.stack([perfect, constant, independent]))
    np.testing.assert_allclose(about.plug_in_information, [2, 0, 0], atol=1e-12)
    assert about.label_entropy == pytest.approx(2)
    # Cells 4, 4, 16; labels 4; predictions 4, 1, 4.
    np.testing.assert_allclose(about.information_bias, np.array([-3, 0, 9]) / (200 * np.log(2)))
    assert np.all(about.mutual_information >= 0)


def test_bias_of_mutual_information_is_what_chance_gives():
    rng = np.random.default_rng(1)
    tables = []
    for _ in range(400):
        table = np.zeros((4, 4), int)
        np.add.at(table, (rng.integers(4, size=200), rng.integers(4, size=200)), 1)
        tables.append(table)
    ones = np.ones(400)
    about = activity.Information(200, ones, ones, ones, ones, np.stack(tables))
    assert about.plug_in_information.mean() == pytest.approx(about.information_bias.mean(), rel=0.1)


def test_similarity_is_over_the_first_images(found, spikes):
    assert found.similarity_images == 5
    assert list(found.similarity) == list(spikes)
    for name, fired in spikes.items():
        expected = similarity.between_steps(fired[:5].mean((2, 3), dtype=np.float32))
        np.testing.assert_allclose(found.similarity[name].cka, expected.cka, atol=1e-5)
        # Equal distances may rank either way after rounding.
        np.testing.assert_allclose(found.similarity[name].rsa, expected.rsa, atol=0.35)


def test_batches_of_any_size_give_the_same(found, model):
    """One after the other, with labels, as a stream; longer than the batch size, shorter, and empty."""
    cuts = [slice(0, 4), slice(4, 4), slice(4, 5), slice(5, 7)]
    stream = ((IMAGES[cut], LABELS[cut]) for cut in cuts)
    other = activity.measure(model, stream, batch_size=3, similarity_images=5)
    assert_equal(other, found)


def assert_equal(a, b):
    if dataclasses.is_dataclass(a):
        a, b = vars(a), vars(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    else:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6) if not isinstance(a, list) else assert_same(a, b)


def assert_same(a, b):
    assert a == b


def test_single_measures_are_those_of_the_one_pass(found, model):
    assert_equal(rates.rates(model, IMAGES), found.rates)
    assert_equal(activity.information(model, IMAGES, LABELS), found.information)


def test_json(found):
    document = found.to_dict()
    assert document["images"] == COUNT
    assert document["time_steps"] == STEPS
    layer = document["layers"][FIRST]
    assert len(layer["rate_per_step"]) == STEPS
    assert len(layer["rate_per_channel"]) == 6
    assert np.shape(layer["rate_per_token"]) == (4, 4)
    assert layer["dead_channels"] == pytest.approx(1 / 6)
    assert len(layer["trains"]["intervals"]) == STEPS - 1
    assert np.shape(layer["membrane"]["counts"]) == (STEPS, len(document["potential_edges"]) - 1)
    assert len(document["information"]["accuracy"]) == STEPS


def test_one_step(model):
    found = activity.measure(random_model(time_steps=1, depths=(1,)), IMAGES, labelled=False)
    assert found.information is None
    trains = found.intervals[FIRST]
    assert trains.lengths.shape == (0,)
    assert np.isnan([trains.following, trains.cv, trains.lv]).all()
    assert trains.counts[1] == pytest.approx(found.rates.layer[FIRST] * COUNT * 96)
    assert found.similarity[FIRST].cka.shape == (1, 1)
    assert found.to_dict()["information"] is None


def bad(**changes):
    return {"images": IMAGES, "labels": LABELS, **changes}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (bad(images=IMAGES[:0], labels=LABELS[:0]), "no images"),
        (bad(images=[]), "no images"),
        (bad(images=BYTES), "normalised floating pixels"),
        (bad(images=IMAGES[0]), r"images must be \[batch"),
        (bad(images=IMAGES[:, :8]), "16, 16, 1"),
        (bad(images=np.where(IMAGES > 0, np.nan, IMAGES)), "not finite"),
        (bad(labels=None), "labels are missing"),
        (bad(labels=LABELS[:3]), "7 integers, one per image"),
        (bad(labels=LABELS.astype(float)), "integers, one per image, but they are float64"),
        (bad(labels=LABELS + 1), "labels go from 1 to 3, but the network has 3 classes"),
        (bad(labels=LABELS - 1), "go from -1"),
        (bad(batch_size=0), "batch_size is 0"),
        (bad(features="pixels"), '"channel" or "neuron"'),
        (bad(dead=0.5, saturated=0.5), "0 <= dead < saturated <= 1"),
        (bad(dead=-0.1), "dead"),
    ],
)
def test_wrong_input_is_one_line(model, arguments, message):
    with pytest.raises(InputError, match=message) as error:
        activity.measure(model, **arguments)
    assert "\n" not in str(error.value)


def test_a_model_in_training_mode_is_refused():
    model = random_model(depths=(1,))
    model.train()
    for measure in (rates.rates, activity.measure, membrane.membrane_potentials):
        with pytest.raises(InputError, match=r"call model\.eval"):
            measure(model, IMAGES)
