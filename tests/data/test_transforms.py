"""Crops, resizing, flips, channels, normalization: shapes, exactness, frequencies."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spiking_mlp_jax.data import transforms as augment_lib
from spiking_mlp_jax.data.image import to_channels
from spiking_mlp_jax.data.transforms import Augment, fit_image
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.pixels import normalize


def random_image(seed, height, width, channels):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


# --- geometry

images = st.builds(random_image, st.integers(0, 99), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 4]))


@given(
    images, st.integers(1, 24), st.sampled_from([1, 3]), st.sampled_from(["pad", "resize", "resize_crop"]),
    st.integers(0, 8),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_fit_image_always_gives_the_models_size(image, size, channels, mode, margin):
    fitted = fit_image(image, size, channels, mode, size + margin if margin else 0)
    assert fitted.shape == (size, size, channels)
    assert fitted.dtype == np.uint8


@given(images, st.integers(1, 24), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 9), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_augment_always_gives_the_models_size(image, size, channels, resized_crop, padding, seed):
    augment = Augment(crop_padding=padding, flip=True, random_resized_crop=resized_crop)
    before = image.copy()
    results = [augment(image, size, channels, np.random.default_rng(seed)) for _ in range(2)]
    assert results[0].shape == (size, size, channels)
    assert results[0].dtype == np.uint8
    np.testing.assert_array_equal(*results)
    np.testing.assert_array_equal(image, before)


def test_pad_centres_small_images_and_shrinks_large_ones():
    image = random_image(0, 28, 28, 1)
    fitted = fit_image(image, 32, 1)
    np.testing.assert_array_equal(fitted[2:30, 2:30], image)
    assert fitted.sum() == image.sum()
    wide = fit_image(np.full((30, 60, 3), 255, np.uint8), 20, 3)
    np.testing.assert_array_equal(wide[5:15], 255)
    assert wide.sum() == 10 * 20 * 3 * 255


def test_resize_crop_is_the_usual_imagenet_evaluation():
    image = random_image(1, 50, 75, 3)
    picture = Image.fromarray(image).resize((48, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(picture)[2:30, 10:38]
    np.testing.assert_array_equal(fit_image(image, 28, 3, "resize_crop", 32), expected)
    np.testing.assert_array_equal(fit_image(image, 28, 3, "resize_crop"), expected)


def test_resize_is_bicubic():
    image = random_image(2, 9, 12, 1)
    expected = np.asarray(Image.fromarray(image[..., 0]).resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(fit_image(image, 16, 1, "resize")[..., 0], expected)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 15), st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_random_crop_cuts_from_the_padded_image(height, width, padding, seed):
    image = random_image(seed, height, width, 3)
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(0, 1))
    cut = augment_lib.random_crop(image, padding, np.random.default_rng(seed))
    assert np.any(np.all(windows == np.moveaxis(cut, 2, 0), axis=(2, 3, 4)))


def test_random_crop_reaches_every_place_equally():
    image = np.zeros((3, 3, 1), np.uint8)
    image[1, 1] = 1
    rng = np.random.default_rng(0)
    places = collections.Counter(int(augment_lib.random_crop(image, 1, rng).argmax()) for _ in range(1800))
    assert len(places) == 9
    assert min(places.values()) > 140


def test_random_flip_mirrors_half_of_the_time():
    image = random_image(3, 2, 5, 1)
    rng = np.random.default_rng(0)
    flips = 0
    for _ in range(1000):
        flipped = augment_lib.random_flip(image, rng)
        mirrored = not np.array_equal(flipped, image)
        np.testing.assert_array_equal(flipped, image[:, ::-1] if mirrored else image)
        flips += mirrored
    assert 430 < flips < 570


def test_random_resized_crop_draws_the_stated_areas_and_ratios():
    # Two gradients tell, from the corners of the result, where the rectangle was.
    ramp = np.arange(240, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], 0), axis=-1).astype(np.uint8)
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(400):
        crop = augment_lib.random_resized_crop(image, 64, 3, rng).astype(float)
        height, width = crop[-1, 0, 0] - crop[0, 0, 0], crop[0, -1, 1] - crop[0, 0, 1]
        areas.append(height * width / 240**2)
        ratios.append(width / height)
    assert min(areas) < 0.12
    assert max(areas) > 0.85
    assert 0.45 < np.mean(areas) < 0.57
    assert min(ratios) > 0.70
    assert max(ratios) < 1.43
    assert abs(np.mean(np.log(ratios))) < 0.05


def test_random_resized_crop_of_an_extreme_strip_is_its_centre():
    strip = np.zeros((1, 300, 3), np.uint8)
    strip[:, 149] = 255
    crop = augment_lib.random_resized_crop(strip, 8, 3, np.random.default_rng(0))
    assert crop.shape == (8, 8, 3)
    assert crop.min() == 255


# --- channels


def test_channels():
    image = random_image(4, 6, 7, 3)
    expected = np.asarray(Image.fromarray(image).convert("L"))
    np.testing.assert_array_equal(to_channels(image, 1)[..., 0], expected)
    grey = to_channels(image, 1)
    np.testing.assert_array_equal(to_channels(grey, 3), np.repeat(grey, 3, axis=2))
    np.testing.assert_array_equal(to_channels(grey[..., 0], 1), grey)
    opaque = np.concatenate([image, np.full((6, 7, 1), 255, np.uint8)], axis=2)
    np.testing.assert_array_equal(to_channels(opaque, 3), image)
    opaque[..., 3] = 0
    assert not to_channels(opaque, 1).any()


@pytest.mark.parametrize(
    ("image", "channels", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), 3, "dtype uint8 .*got float32"),
        (np.zeros((4, 4, 2), np.uint8), 3, r"shape .*got \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), 3, r"shape .*got \(0, 4, 3\)"),
        (np.zeros(4, np.uint8), 3, r"shape .*got \(4,\)"),
        (np.zeros((4, 4, 3), np.uint8), 2, "in_channels must be 1 .*got 2"),
    ],
)
def test_arrays_that_are_no_images(image, channels, message):
    with pytest.raises(InputError, match=message):
        to_channels(image, channels)


# --- normalization


def test_normalize_is_the_same_in_numpy_and_jax():
    pixels = random_image(5, 8, 8, 3)[None]
    mean, std = (0.5, 0.25, 0.1), (0.5, 0.2, 0.3)
    ours = normalize(pixels, mean, std)
    assert isinstance(ours, np.ndarray)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, (pixels / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    theirs = jax.jit(lambda x: normalize(x, mean, std))(jnp.asarray(pixels))
    assert theirs.dtype == jnp.float32
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), (0.5, 0.5, 0.5), "mean has 1 values for 3 channels"),
        ((0.5,) * 3, (0.5,) * 4, "std has 4 values for 3 channels"),
        ((0.5,) * 3, (0.5, 0.0, 0.5), "std must be positive .*got .*0\\.5, 0\\.0"),
        ((float("nan"),) * 3, (0.5,) * 3, "mean must hold finite numbers, got .*nan"),
    ],
)
def test_impossible_statistics(mean, std, message):
    with pytest.raises(InputError, match=message):
        normalize(np.zeros((1, 2, 2, 3), np.uint8), mean, std)
