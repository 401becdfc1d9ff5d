import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiking_mlp_jax.analysis.fields.controls import main_colour, untrained_network
from spiking_mlp_jax.analysis.fields.effective import effective_field, field_size
from spiking_mlp_jax.analysis.fields.mixing import (
    convolution_share,
    energy_within,
    mean_profile,
    mixing_weights,
    profiles,
    separable_fields,
)
from spiking_mlp_jax.analysis.fields.responses import (
    choose_units,
    collect,
    default_layers,
    natural_images,
    responses,
    white_noise,
    window,
)
from spiking_mlp_jax.analysis.fields.spike_triggered import average, significance
from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.topology import intermediate_shapes
from tests.support.random_model import CLASSES, make_data, random_model, variables
from tests.support.tiny import tiny_config

LAYER = "stage1.block1.channel.potential"


@pytest.fixture(scope="module")
def model():
    return random_model(seed=3)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(4, 16, 16, 1)).astype(np.float32)


def test_mixing_weights_and_profiles_by_index(model):
    found = mixing_weights(model)
    assert [mixing.block for mixing in found] == ["stage0.block0", "stage1.block0", "stage1.block1"]
    raw = variables(model)
    for axis in ("height", "width"):
        stacked = np.asarray(raw[f"stages.1.blocks.token.{axis}.kernel"][...])
        np.testing.assert_array_equal(getattr(found[2], axis), stacked[1])
    weights = found[0].height
    shifted = profiles(weights)
    assert shifted.shape == (4, 7)
    for i in range(4):
        for offset in range(-3, 4):
            value = shifted[i, offset + 3]
            if 0 <= i + offset < 4:
                assert value == weights[i, i + offset]
            else:
                assert np.isnan(value)
    np.testing.assert_allclose(mean_profile(weights), np.nanmean(shifted, 0))
    fields = separable_fields(weights, found[0].width)
    np.testing.assert_allclose(fields[1, 3], np.outer(weights[1], found[0].width[3]))


@given(st.integers(1, 8), st.integers(0, 1000))
def test_convolution_share(side, seed):
    rng = np.random.default_rng(seed)
    profile = rng.normal(size=2 * side - 1)
    toeplitz = np.array([[profile[side - 1 + j - i] for j in range(side)] for i in range(side)])
    assert convolution_share(toeplitz) == pytest.approx(1)
    np.testing.assert_allclose(mean_profile(toeplitz), profile)
    near, equal = energy_within(np.ones((side, side)), 1)
    assert near == pytest.approx(equal) == pytest.approx((3 * side - 2) / side**2)


def test_convolution_share_of_random_weights():
    rng = np.random.default_rng(0)
    shares = [convolution_share(rng.normal(size=(8, 8))) for _ in range(400)]
    assert np.mean(shares) == pytest.approx(15 / 64, abs=0.02)
    assert energy_within(np.eye(5), 0) == (1.0, 0.2)


@pytest.mark.parametrize("weights", [np.zeros((3, 4)), np.zeros(3), np.zeros((0, 0))])
def test_mixing_weights_that_are_none(weights):
    for function in (profiles, mean_profile, convolution_share):
        with pytest.raises(InputError, match="square matrices"):
            function(weights)


def test_units(model):
    config = model.config
    units = choose_units(config, "stage0.block0.token.spikes", channels=3)
    assert (units.token, units.channels, units.grid, units.patch) == ((2, 2), (0, 2, 5), 4, 4)
    assert units.centre == (9.5, 9.5)  # of the pixels 8 to 11
    assert choose_units(config, LAYER).channels == tuple(range(12))
    assert choose_units(config, LAYER, token=(0, 1), channels=[5]).centre == (3.5, 11.5)
    assert default_layers(config) == ["stage0.block0.channel.spikes", "stage1.block1.channel.spikes"]
    assert intermediate_shapes(config)["stage1.encode.node1.spikes"] == (2, 2, 2, 4)


@pytest.mark.parametrize(
    "layer, options, message",
    [
        ("stage0.block0.tokn.spikes", {}, 'no layer "stage0.block0.tokn.spikes": did you mean "stage0.block0.token'),
        ("stage0.block1.token.spikes", {}, "no layer"),
        (LAYER, {"token": (0, 2)}, r"2 x 2 tokens, counted from 0, and so no token \(0, 2\)"),
        (LAYER, {"token": (-1, 0)}, "no token"),
        (LAYER, {"channels": [12]}, "12 channels, counted from 0, and so no channel 12"),
        (LAYER, {"channels": []}, "at least one channel"),
        (LAYER, {"channels": 0}, "at least one channel"),
    ],
)
def test_units_that_are_not_there(model, layer, options, message):
    with pytest.raises(InputError, match=message):
        choose_units(model.config, layer, **options)


def test_responses_and_gradients_are_those_of_the_named_unit(model, images):
    stem = choose_units(model.config, "stage0.encode.potential", token=(1, 2), channels=[4])
    deep = choose_units(model.config, LAYER, token=(0, 1), channels=[7, 2])
    names = (stem.layer, deep.layer)

    @jax.jit
    def seen(images):
        return model(images, observe=lambda name, value: value)[1]

    everything = {name: np.asarray(seen(images)[name]) for name in names}
    first, second = jax.jit(responses(model, [stem, deep]))(images)
    # The stem's potential has one step that stands for both.
    np.testing.assert_allclose(first[:, 0], 2 * everything[stem.layer][:, 0, 1, 2, 4], rtol=1e-5)
    np.testing.assert_allclose(second, everything[deep.layer][:, :, 0, 1, [7, 2]].sum(1), rtol=1e-4, atol=1e-5)

    def unit(image):
        _, kept = model(image[None], observe=lambda name, value: value)
        return kept[deep.layer][0, :, 0, 1, 7].sum()

    own = jax.jit(jax.grad(unit))
    each = np.stack([np.asarray(own(image)) for image in images])
    found = effective_field(model, deep, np.split(images, 2))
    assert found.images == 4
    assert np.abs(each).max() > 1e-4
    scale = np.abs(each).max()
    np.testing.assert_allclose(found.signed[0], each.mean(0), atol=1e-5 * scale)
    np.testing.assert_allclose(found.magnitude[0], np.abs(each).mean(0), atol=1e-5 * scale)
    np.testing.assert_allclose(found.energy[0], (each**2).mean(0), atol=1e-5 * scale**2)
    np.testing.assert_allclose(found.map(), found.energy.mean(0)[..., 0])


def test_field_of_the_stem_is_its_kernel(model, images):
    units = choose_units(model.config, "stage0.encode.potential", token=(1, 2), channels=[4])
    found = effective_field(model, units, [images])
    raw = {name.removeprefix("stages.0.encode."): np.asarray(v[...]) for name, v in variables(model).items()}
    expected = np.zeros((16, 16))
    factor = raw["norm.scale"][4] / math.sqrt(raw["norm.var"][4] + 1e-5)
    expected[4:8, 8:12] = 2 * factor * raw["conv.kernel"][:, :, 0, 4]
    np.testing.assert_allclose(found.signed[0, :, :, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_training_mode_does_not_matter_and_stays(model, images):
    units = choose_units(model.config, "stage0.encode.spikes")
    expected = responses(model, [units])(jnp.asarray(images))[0]
    model.train()
    try:
        np.testing.assert_array_equal(responses(model, [units])(jnp.asarray(images))[0], expected)
        assert not model.stages[0].use_running_average
    finally:
        model.eval()


def test_average_of_a_stem_unit_is_its_kernel(model):
    channels = [0, 3]
    units = choose_units(model.config, "stage0.encode.spikes", token=(1, 1), channels=channels)
    noise = list(white_noise(model.config, 3_000, seed=1, batch_size=512))
    (moments,) = collect(model, [units], noise, shifts=2)
    assert moments.stimuli == 3_000
    x = np.concatenate(noise)
    counts = np.asarray(responses(model, [units])(jnp.asarray(x))[0])
    np.testing.assert_allclose(moments.c[0], counts.sum(0))
    np.testing.assert_allclose(moments.cx[0], counts.T @ x.reshape(3_000, -1), rtol=1e-3, atol=0.05)
    kernels = np.asarray(variables(model)["stages.0.encode.conv.kernel"][...])
    for unit, channel in enumerate(channels):
        kernel = np.zeros((16, 16))
        kernel[4:8, 4:8] = kernels[:, :, 0, channel]
        found = average(moments, unit, least=100)
        cosine = found @ kernel.ravel() / np.linalg.norm(found) / np.linalg.norm(kernel)
        assert abs(cosine) > 0.9
        assert significance(moments, unit).p == pytest.approx(1 / 3)


def test_no_potentials_and_no_stimuli(model, images):
    potentials = choose_units(model.config, "stage0.encode.potential")
    with pytest.raises(InputError, match=r"not a layer of spikes: use one whose name ends in \.spikes"):
        collect(model, [potentials], [images])
    spikes = choose_units(model.config, "stage0.encode.spikes")
    with pytest.raises(InputError, match="no stimuli"):
        collect(model, [spikes], [])
    with pytest.raises(InputError, match="no images to average"):
        effective_field(model, spikes, [])
    with pytest.raises(InputError, match="give at least one batch"):
        untrained_network(model.config, [], seed=0)


def test_size_of_a_gaussian_map():
    rows, columns = np.mgrid[:61, :61]
    field = np.exp(-((rows - 28) ** 2) / 2 / 4**2 - (columns - 32) ** 2 / 2 / 4**2)
    size = field_size(field)
    assert size.centre == pytest.approx((28, 32), abs=1e-6)
    assert size.spread == pytest.approx((4, 4), rel=1e-4)
    # A circle of radius r holds 1 - exp(-r^2 / (2 sigma^2)), up to the distances that pixels have.
    assert size.half == pytest.approx(4 * math.sqrt(2 * math.log(2)), abs=0.4)
    assert size.ninety == pytest.approx(4 * math.sqrt(2 * math.log(10)), abs=0.4)
    assert size.equal == pytest.approx(4 * math.pi * 4**2 / 61**2, rel=0.01)
    long = field_size(np.exp(-((rows - 30 + columns - 30) ** 2) / 4 - (rows - columns) ** 2 / 4 / 6**2))
    assert long.spread == pytest.approx((6, 1), rel=0.05)


def test_sizes_of_extreme_maps():
    one = np.zeros((5, 7))
    one[1, 6] = 3
    size = field_size(one)
    assert (size.centre, size.half, size.ninety, size.equal) == ((1, 6), 0, 0, pytest.approx(1 / 35))
    assert field_size(np.ones((5, 7))).equal == pytest.approx(1)
    for bad, message in (
        (np.zeros((3, 3)), "zero everywhere"),
        (-np.ones((3, 3)), "from 0 on"),
        (np.ones(3), "from 0 on"),
    ):
        with pytest.raises(InputError, match=message):
            field_size(bad)


@pytest.mark.slow
def test_untrained_network_knows_the_images_statistics(images):
    config = tiny_config(depths=(1,))
    batches = [images[:2], 3 * images[2:]]
    found = untrained_network(config, batches, seed=5)
    kernel = np.asarray(variables(found)["stages.0.encode.conv.kernel"][...]).reshape(16, 6)
    each = []
    for batch in batches:
        patches = batch.reshape(2, 4, 4, 4, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 16) @ kernel
        each.append((patches.mean(0), patches.var(0) * 64 / 63))  # unbiased over 2 images, 16 patches and 2 steps
    mean, var = (np.mean(values, 0) for values in zip(*each, strict=True))
    raw = variables(found)
    np.testing.assert_allclose(raw["stages.0.encode.norm.mean"][...], mean, atol=1e-5)
    np.testing.assert_allclose(raw["stages.0.encode.norm.var"][...], var, rtol=1e-4)
    assert found.stages[0].use_running_average
    other = untrained_network(config, batches[:1], seed=6)
    assert (
        np.abs(np.asarray(variables(other)["stages.0.encode.conv.kernel"][...]) - kernel.reshape(4, 4, 1, 6)).max() > 0
    )


@given(st.integers(1, 9), st.sampled_from(["gaussian", "binary"]))
def test_noise_does_not_depend_on_the_batch_size(size, kind):
    config = tiny_config()
    parts = list(white_noise(config, 9, seed=2, batch_size=size, std=0.5, kind=kind))
    assert {len(part) for part in parts[:-1]} <= {size}
    whole = np.concatenate(parts)
    np.testing.assert_array_equal(whole, next(white_noise(config, 9, seed=2, std=0.5, kind=kind)))
    assert whole.dtype == np.float32
    if kind == "binary":
        assert set(np.unique(whole)) == {-0.5, 0.5}
    assert whole.std() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("options", [{"kind": "pink"}, {"std": 0}, {"count": 0}, {"batch_size": 0}])
def test_impossible_noise(options):
    with pytest.raises(InputError):
        next(white_noise(tiny_config(), **{"count": 3, "seed": 0, **options}))


def test_natural_images_come_once_in_random_order(tmp_path):
    source = open_source("folder", "test", make_data(tmp_path, per_class=4))
    data = {"resize_mode": "pad", "eval_resize": 0, "mean": [0.25], "std": [0.5]}
    parts = [x.normalised for x in natural_images(source, tiny_config(), data, 100, seed=1, batch_size=5)]
    assert [len(part) for part in parts] == [5, 5, 2]
    whole = np.concatenate(parts)
    plain = np.stack([(source[i]["image"].astype(np.float32).reshape(16, 16, 1) / 255 - 0.25) / 0.5 for i in range(12)])
    order = [int(np.argmin(np.abs(plain - image).sum((1, 2, 3)))) for image in whole]
    assert sorted(order) == list(range(4 * len(CLASSES))) != order
    np.testing.assert_allclose(whole, plain[order], atol=1e-5)


def test_window():
    images = np.arange(2 * 10 * 10 * 3, dtype=float).reshape(2, 10, 10, 3)
    np.testing.assert_allclose(window(images, (4.5, 5.5), 4), images[:, 3:7, 4:8].mean(-1))
    np.testing.assert_allclose(window(images, (0, 9), 4), images[:, :4, 6:].mean(-1))
    assert window(images, (5, 5), 99).shape == (2, 10, 10)


def test_main_colour():
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=(6, 5))
    grey, share = main_colour(pattern[..., None] * np.array([2.0, 1.0, -0.5]))
    assert share == pytest.approx(1)
    np.testing.assert_allclose(grey, pattern * math.sqrt(5.25))
    one, share = main_colour(-pattern[..., None])
    np.testing.assert_allclose(one, -pattern)
    assert main_colour(np.zeros((3, 3, 3)))[1] == 0
