"""Reading only what a crop needs, and resizing, against Pillow doing all of it."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spiking_mlp_jax.data.image import DamagedImageError, Encoded, decode_crop, decode_image
from spiking_mlp_jax.data.resample import resize_bicubic
from spiking_mlp_jax.data.transforms import Augment, random_resized_crop

sides = st.integers(1, 50)


@given(sides, sides, sides, sides, st.sampled_from([1, 3]), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_resize_is_pillows_bit_for_bit(height, width, new_height, new_width, channels, seed):
    # Few values far apart: they overshoot, which has to be cut off as Pillow does, between the passes, too.
    image = np.random.default_rng(seed).choice([0, 1, 128, 254, 255], (height, width, channels)).astype(np.uint8)
    wanted = image
    for size in ((width, new_height), (new_width, new_height)):
        picture = Image.fromarray(wanted[..., 0] if channels == 1 else wanted)
        wanted = np.asarray(picture.resize(size, Image.Resampling.BICUBIC)).reshape(*size[::-1], channels)
    np.testing.assert_array_equal(resize_bicubic(image, new_height, new_width), wanted)


def test_resize_takes_parts_of_pictures():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    cut = image[3:30, 7:41]
    assert not cut.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(resize_bicubic(cut, 9, 12), resize_bicubic(cut.copy(), 9, 12))


def landscape(height, width):
    """A smooth picture, so that JPEG and scaling hardly change it."""
    y, x = np.mgrid[:height, :width] / 40
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)
    return np.rint(127 + 100 * waves).astype(np.uint8)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return Encoded(file.getvalue(), "memory")


@pytest.mark.parametrize(("height", "width"), [(101, 150), (401, 333)])
def test_a_crop_that_is_read_whole_is_a_crop_of_the_whole(height, width):
    picture = encoded(landscape(height, width), quality=90)
    whole = decode_image(*picture)
    cut = decode_crop(picture, lambda h, w: (h // 5, w // 7, h // 2, w // 3), 150)
    np.testing.assert_array_equal(cut, whole[height // 5 :, width // 7 :][: height // 2, : width // 3])


@pytest.mark.parametrize(("least", "shrink"), [(51, 1), (50, 2), (26, 2), (25, 4), (13, 4), (12, 8), (3, 8)])
def test_large_crops_are_read_at_a_smaller_scale(least, shrink):
    picture = encoded(landscape(203, 341), quality=95)
    box = 40, 120, 101, 120
    cut = decode_crop(picture, lambda h, w: box, least)
    assert cut.shape == (101 // shrink, 120 // shrink, 3)
    assert min(cut.shape[:2]) >= least
    whole = decode_image(*picture)[40:141, 120:240]
    wanted = np.asarray(Image.fromarray(whole).resize(cut.shape[1::-1], Image.Resampling.BOX)).astype(float)
    assert np.abs(cut - wanted).mean() < 4
    # And it is not another part of the picture.
    elsewhere = np.asarray(Image.fromarray(decode_image(*picture)[20:121, 100:220]).resize(cut.shape[1::-1]))
    assert np.abs(elsewhere - wanted).mean() > 20


def with_orientation(image, value):
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(image, exif=exif.tobytes(), quality=95)


@pytest.mark.parametrize(
    "picture",
    [
        encoded(landscape(60, 90), "PNG"),
        encoded(landscape(60, 90)[..., 0]),
        encoded(np.dstack([landscape(60, 90), landscape(60, 90)[..., :1]]), "PNG"),
        with_orientation(landscape(60, 90), 6),
        with_orientation(landscape(60, 90), 1),
    ],
    ids=["png", "grey", "transparent", "turned", "upright"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_encoded_and_decoded_pictures_give_the_same(picture, channels):
    decoded = decode_image(*picture)
    for seed in range(5):
        ours = random_resized_crop(picture, 48, channels, np.random.default_rng(seed))
        theirs = random_resized_crop(decoded, 48, channels, np.random.default_rng(seed))
        assert ours.shape == (48, 48, channels)
        np.testing.assert_array_equal(ours, theirs)
        augment = Augment("resize_crop", flip=True)
        ours = augment(picture, 48, channels, np.random.default_rng(seed))
        np.testing.assert_array_equal(ours, augment(decoded, 48, channels, np.random.default_rng(seed)))


def test_cmyk_pictures_are_read_whole():
    file = io.BytesIO()
    Image.fromarray(landscape(60, 90)).convert("CMYK").save(file, "JPEG")
    cut = decode_crop(Encoded(file.getvalue(), "memory"), lambda h, w: (0, 0, h, w), 10)
    assert cut.shape == (60, 90, 3)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:200], lambda data: data[: len(data) // 2]])
def test_damaged_pictures_are_named(damage):
    data = damage(encoded(landscape(203, 341)).data)
    for least in (400, 10):
        with pytest.raises(DamagedImageError, match=r"cannot decode image here\.jpg: replace"):
            decode_crop(Encoded(data, "here.jpg"), lambda h, w: (0, 0, h // 2, w // 2), least)
