"""Quantisation: agreement with the folded network, formats, rounding, and what it refuses."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiking_mlp_jax.deploy import artifact, ranges, reference
from spiking_mlp_jax.deploy.audit import audit
from spiking_mlp_jax.deploy.engine import Engine
from spiking_mlp_jax.deploy.fold import fold
from spiking_mlp_jax.deploy.quantize import _Inputs, quantize, round_weights, signed_digits
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.pixels import normalize
from tests.support.random_model import random_model, set_value, variables
from tests.support.tiers import rest_slow

MEAN, STD = (0.3,), (0.4,)


def images(count=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 1), dtype=np.uint8)


def quantized(bits=8, seed=0, **fields):
    folded = fold(random_model(seed=seed, **fields), MEAN, STD)
    return folded, quantize(folded, images(), bits)


def float_logits(folded, pixels):
    return np.asarray(jax.jit(lambda f, x: f(x))(folded, normalize(pixels, folded.mean, folded.std)))


def integer_logits(net, pixels):
    return reference.run(net, pixels) * 2.0 ** -net.description.formats["head"].fraction


CASES = list(itertools.product(("spe", "plain"), ("token", "channel"), ("batch", "tdbn", "tebn")))


@pytest.mark.parametrize(("encoding", "features", "norm"), rest_slow(CASES, 2))
def test_near_the_folded_network(encoding, features, norm):
    """Rounding moves some spikes over their threshold, so logits are near and no more."""
    folded, net = quantized(encoding=encoding, norm_features=features, norm=norm)
    pixels = images(64, seed=1)
    expected, found = float_logits(folded, pixels), integer_logits(net, pixels)
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.95
    assert np.mean(np.abs(expected - found)) < 0.35 * np.std(expected)


@pytest.mark.parametrize(
    "fields",
    rest_slow([dict(neuron="if"), dict(v_reset=None), dict(v_reset=-0.25, tau=4.0), dict(decay_input=False, tau=1.0)]),
    ids=str,
)
def test_every_neuron(fields):
    folded, net = quantized(**fields)
    pixels = images(64, seed=1)
    assert np.corrcoef(float_logits(folded, pixels).ravel(), integer_logits(net, pixels).ravel())[0, 1] > 0.95


def test_more_bits_are_nearer():
    errors = []
    for bits in (2, 4, 8):
        folded, net = quantized(bits)
        pixels = images(64, seed=1)
        errors.append(np.mean(np.abs(float_logits(folded, pixels) - integer_logits(net, pixels))))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    "fields", rest_slow([dict(), dict(encoding="plain", norm="tebn"), dict(norm_features="channel")]), ids=str
)
def test_bit_exact_in_jax_and_without_multiplication(fields):
    _, net = quantized(**fields)
    pixels = images(3, seed=2)
    np.testing.assert_array_equal(net(pixels), reference.run(net, pixels))
    report = audit(net, pixels)
    assert report.ok and {row.kind for row in report.rows} == {"accumulate", "shift", "add_or_compare"}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_have_their_bits(bits):
    _, net = quantized(bits)
    for name, kernel in net.arrays.items():
        if name.endswith(".kernel"):
            assert kernel.dtype == np.int8 and np.abs(kernel.astype(int)).max() <= 2 ** (bits - 1) - 1


def test_raw_and_normalised_calibration_agree():
    folded = fold(random_model(), MEAN, STD)
    raw, normalised = quantize(folded, images()), quantize(folded, normalize(images(), MEAN, STD))
    for name in raw.arrays:
        np.testing.assert_array_equal(raw.arrays[name], normalised.arrays[name])


def test_constant_and_turned_tokens():
    """Scales of the hidden norm that are negative, zero and next to zero."""
    model = random_model(seed=3)
    for name, variable in variables(model).items():
        if name.endswith("hidden_norm.scale"):
            scale = np.array(variable[...])
            scale[..., 0], scale[..., 1], scale[..., 2] = 0, 1e-6, -np.abs(scale[..., 2])
            set_value(model, name, scale)
    folded = fold(model, MEAN, STD)
    net = quantize(folded, images())
    assert net.arrays["stage0.block0.expand.constant"][:2].all() and net.arrays["stage0.block0.expand.below"][2]
    pixels = images(64, seed=1)
    assert np.corrcoef(float_logits(folded, pixels).ravel(), integer_logits(net, pixels).ravel())[0, 1] > 0.95


@given(
    st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=1, max_size=8),
    st.sampled_from([0.3, 2.0**-4, 2.0**-8]),
)
def test_signed_digits(scales, error):
    scales = np.array(scales)
    exponents, signs = signed_digits(scales, error)
    assert np.all(np.abs(np.sum(signs * 2.0**exponents, -1) - scales) <= error * np.abs(scales))
    # Each term leaves at most a third of what there was.
    assert exponents.shape[1] <= max(1, int(np.ceil(np.log(1 / error) / np.log(3))))


def test_words_are_as_small_as_proven():
    _, net = quantized()
    found = ranges.check(net)
    formats = net.description.formats
    assert formats["head"].word == 32
    assert any(f.word == 16 for f in formats.values())
    for place, (low, high) in found.items():
        assert ranges.bits(low, high) <= formats[place].word


@pytest.mark.parametrize(
    ("fields", "words"),
    [(dict(neuron="plif"), "plif"), (dict(tau=3.0), "tau=3.0"), (dict(tau=1.5), "powers of two")],
)
def test_neurons_that_multiply_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        quantized(**fields)


@pytest.mark.parametrize("bits", [1, 9, True, 8.0])
def test_impossible_bits(bits):
    with pytest.raises(InputError, match="bits"):
        quantized(bits)


@pytest.mark.parametrize(
    "wrong", [np.zeros((0, 16, 16, 1), np.uint8), np.zeros((2, 8, 8, 1), np.uint8), np.zeros((2, 16, 16, 1), int)]
)
def test_wrong_calibration_images(wrong):
    with pytest.raises(InputError, match="calibration images"):
        quantize(fold(random_model()), wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_calibration_pixels_that_are_no_pixels(value):
    with pytest.raises(InputError, match="NaN, infinity or pixels beyond 1e\\+06"):
        quantize(fold(random_model()), np.full((2, 16, 16, 1), value, np.float32))


def test_calibration_images_of_different_shapes():
    with pytest.raises(InputError, match="calibration images must be one array"):
        quantize(fold(random_model()), [np.zeros((16, 16, 1)), np.zeros((8, 8, 1))])


@pytest.mark.parametrize("value", [0, 37, 128, 200, 255])
@pytest.mark.parametrize("encoding", ["spe", "plain"])
def test_calibration_images_that_do_not_vary(value, encoding):
    folded = fold(random_model(seed=1, in_channels=3, encoding=encoding))
    net = quantize(folded, np.full((8, 16, 16, 3), value, np.uint8))
    same = np.full((1, 16, 16, 3), value, np.uint8)
    close = integer_logits(net, same), float_logits(folded, same)
    assert np.isfinite(close[0]).all() and np.abs(close[0] - close[1]).max() < 0.5 * np.abs(close[1]).max() + 0.5


def test_a_covariance_that_rounding_made_indefinite():
    rng = np.random.default_rng(0)
    mean = np.ones(24)
    noise = rng.normal(size=(24, 24)) * 1e-5
    inputs = _Inputs(mean[None], np.outer(mean, mean) + noise)
    kernel, shift = round_weights(rng.normal(size=(1, 24, 8)), inputs, 8)
    assert np.isfinite(kernel).all() and np.abs(kernel).max() <= 127 and np.isfinite(shift).all()


def test_numbers_of_numpy_and_wrong_types():
    folded = fold(random_model())
    assert quantize(folded, images(2), np.int64(4)).description.bits == 4
    for wrong in (None, random_model(), 3):
        with pytest.raises(InputError, match="quantize takes a folded network"):
            quantize(wrong, images(2))  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_networks_can_be_compiled_hashed_and_compared():
    folded, net = quantized(4)
    pixels = images(2)
    inputs = normalize(pixels, folded.mean, folded.std)
    assert np.allclose(jax.jit(folded)(inputs), folded(inputs), atol=1e-5)
    assert np.array_equal(jax.jit(net)(pixels), reference.run(net, pixels))
    assert audit(jax.jit(net), pixels).ok and audit(jax.checkpoint(net), pixels).ok
    assert net == net and net != quantize(folded, pixels) and len({net, folded, net}) == 2


def test_weights_that_are_no_numbers():
    model = random_model()
    set_value(model, "head.kernel", np.nan)
    with pytest.raises(InputError, match=r"head.kernel.*contains NaN or inf"):
        quantize(fold(model), images())


@pytest.mark.parametrize("features", ["token", "channel"])
@pytest.mark.parametrize(
    ("threshold", "reset", "more"),
    [
        (0.01, 0.0, {}),
        (15.0, None, {}),
        (40.0, 0.0, dict(decay_input=False)),
        (1000.0, -1000.0, {}),
        (1000.0, 0.0, dict(neuron="if")),
        (1.0, -500.0, dict(encoding="plain")),
    ],
)
def test_thresholds_and_resets_of_any_size(threshold, reset, more, features, tmp_path):
    """They take part in the choice of the formats, and the file can be read again."""
    fields = dict(v_threshold=threshold, v_reset=reset, norm_features=features, depths=(1,), **more)
    _, net = quantized(**fields)
    artifact.save(net, tmp_path / "net.smlp")
    pixels = images(4, seed=1)
    engine = Engine(tmp_path / "net.smlp", threads=1)
    assert np.array_equal(engine.logits(pixels), reference.run(net, pixels))
    place = net.description.formats["stage0"]
    assert place.threshold == np.rint(threshold * 2.0**place.fraction) > 0
    assert place.reset == np.rint((reset or 0) * 2.0**place.fraction)


def test_a_constant_beyond_32_bits_is_refused():
    with pytest.raises(InputError, match="32 bits"):
        quantized(v_threshold=1e11, neuron="if", depths=(1,))
