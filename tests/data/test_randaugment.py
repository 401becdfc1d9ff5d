"""RandAugment, colour jitter and random erasing against their definitions, written out in NumPy."""

import collections
import math

import numpy as np
import pytest
from PIL import Image

from spiking_mlp_jax.data import randaugment
from spiking_mlp_jax.data.randaugment import OPERATIONS, RandAugment, parse_rand_augment
from spiking_mlp_jax.data.transforms import Augment, color_jitter, random_erasing
from spiking_mlp_jax.errors import InputError

FILL = (10, 200, 90)
NAMES = [
    *("auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast"),
    *("brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
]
PICTURE = np.random.default_rng(0).integers(20, 230, (24, 31, 3), np.uint8)


def apply(name, image, strength, sign=1, fill=FILL):
    operation = OPERATIONS[name]
    return np.asarray(operation(Image.fromarray(image), strength, sign, fill))


def test_the_operations_are_timms_fifteen():
    assert list(OPERATIONS) == NAMES


# --- operations on values


def luma(image):
    return (image.astype(np.int64) @ [19595, 38470, 7471] + 0x8000) >> 16


def blend(start, image, factor):
    return np.clip(start + factor * (image.astype(float) - start), 0, 255)


def stretched(image):
    low, high = image.min((0, 1)).astype(float), image.max((0, 1))
    return np.clip((image - low) * 255 / (high - low), 0, 255)


def equalized(image):
    out = np.empty_like(image)
    for channel in range(3):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        before = np.concatenate([[0], np.cumsum(counts)[:-1]])
        table = np.minimum((step // 2 + before) // step, 255)
        out[..., channel] = table[image[..., channel]]
    return out


def smoothed(image):
    out = image.astype(float)
    kernel = np.ones((3, 3)) / 13
    kernel[1, 1] = 5 / 13
    windows = np.lib.stride_tricks.sliding_window_view(image.astype(float), (3, 3), axis=(0, 1))
    out[1:-1, 1:-1] = np.rint((windows * kernel).sum((-1, -2)))  # the border stays as it is
    return out


def expected_values(name, image, strength, sign):
    """The operation as a formula; strength is magnitude / 10."""
    factor = max(0.1, 1 + sign * 0.9 * strength)
    if name == "posterize":
        unit = 2 ** (4 + math.floor(4 * strength))
        return image // unit * unit if unit < 256 else 0 * image
    if name == "solarize":
        return np.where(image < 256 - math.floor(256 * strength), image, 255 - image)
    if name == "solarize_add":
        return np.where(image < 128, np.minimum(image.astype(int) + math.floor(110 * strength), 255), image)
    return {
        "auto_contrast": lambda: stretched(image),
        "equalize": lambda: equalized(image),
        "invert": lambda: 255 - image,
        "color": lambda: blend(luma(image)[..., None], image, factor),
        "contrast": lambda: blend(math.floor(luma(image).mean() + 0.5), image, factor),
        "brightness": lambda: blend(0, image, factor),
        "sharpness": lambda: blend(smoothed(image), image, factor),
    }[name]()


@pytest.mark.parametrize("strength", [0.0, 0.33, 0.9, 1.0])
@pytest.mark.parametrize("name", NAMES[:3] + NAMES[4:11])
def test_operations_on_values(name, strength):
    image = PICTURE.repeat(3, axis=0)  # enough pixels to equalize
    exact = name in ("equalize", "invert", "posterize", "solarize", "solarize_add")
    for sign in (-1, 1):
        found = apply(name, image, strength, sign).astype(float)
        wanted = expected_values(name, image, strength, sign).astype(float)
        assert np.abs(found - wanted).max() <= (0 if exact else 1)
        # Pillow cuts off what comes after the point.
        assert np.abs((found - wanted).mean()) <= (0 if exact else 0.6)


def test_equalize_leaves_a_picture_of_few_pixels_alone():
    np.testing.assert_array_equal(apply("equalize", PICTURE[:4, :4], 0.9), PICTURE[:4, :4])


def test_full_strength_keeps_no_bit():
    assert not apply("posterize", PICTURE, 1.0).any()


# --- operations on places: a plane of grey values tells where each pixel came from


def expected_place(name, x, y, width, height, amount):
    """Where the pixel with its centre at (x, y) comes from."""
    if name == "rotate":
        angle = math.radians(30 * amount)
        x, y = x - width / 2, y - height / 2
        # Counterclockwise as seen, with y downwards.
        return x * math.cos(angle) - y * math.sin(angle) + width / 2, (
            x * math.sin(angle) + y * math.cos(angle) + height / 2
        )
    return {
        "shear_x": lambda: (x + 0.3 * amount * y, y),
        "shear_y": lambda: (x, y + 0.3 * amount * x),
        "translate_x": lambda: (x + 0.45 * amount * width, y),
        "translate_y": lambda: (x, y + 0.45 * amount * height),
    }[name]()


@pytest.mark.parametrize("amount", [-0.9, -0.21, 0.5, 1.0])
@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_operations_on_places(name, amount):
    height, width = 30, 44
    y, x = np.mgrid[:height, :width] + 0.5
    plane = np.stack([4 * x, 6 * y, 2 * x + 3 * y], -1)
    found = apply(name, np.rint(plane).astype(np.uint8), abs(amount), int(np.sign(amount)))
    from_x, from_y = expected_place(name, x, y, width, height, amount)
    margin = 2.0
    inside = (from_x > margin) & (from_x < width - margin) & (from_y > margin) & (from_y < height - margin)
    outside = (from_x < -0.01) | (from_x > width + 0.01) | (from_y < -0.01) | (from_y > height + 0.01)
    wanted = np.stack([4 * from_x, 6 * from_y, 2 * from_x + 3 * from_y], -1)
    assert inside.sum() > 300 and outside.sum() > 20
    assert np.abs(found - wanted)[inside].max() < 2.5  # Pillow's cubic bends planes a little
    np.testing.assert_array_equal(found[outside], np.broadcast_to(FILL, found[outside].shape))


@pytest.mark.parametrize("name", NAMES)
def test_operations_on_grey_pictures(name):
    grey = np.ascontiguousarray(PICTURE[..., 0])
    found = apply(name, grey, 0.5, fill=7)
    assert found.shape == grey.shape and found.dtype == np.uint8
    if name != "color":
        alike = apply(name, np.repeat(grey[..., None], 3, axis=2), 0.5, fill=(7, 7, 7))
        assert np.abs(alike[..., 0].astype(int) - found).max() <= 1
    else:
        np.testing.assert_array_equal(found, grey)


# --- what is drawn


def test_draws(monkeypatch):
    seen = []

    def recorder(number):
        return lambda picture, strength, sign, fill: seen.append((number, strength, sign)) or picture

    monkeypatch.setattr(randaugment, "OPERATIONS", {name: recorder(i) for i, name in enumerate(NAMES)})
    rng = np.random.default_rng(1)
    augment = parse_rand_augment("rand-m9-mstd0.5-inc1")
    picture = Image.fromarray(PICTURE)
    applied = []
    for _ in range(6000):
        before = len(seen)
        augment(picture, FILL, rng)
        applied.append(len(seen) - before)
    # Two operations, each with probability 1/2.
    shares = np.bincount(applied) / len(applied)
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.02)
    numbers, strengths, signs = map(np.array, zip(*seen, strict=True))
    counts = np.bincount(numbers, minlength=15) / len(numbers)
    np.testing.assert_allclose(counts, 1 / 15, atol=0.01)
    assert abs(np.mean(signs)) < 0.04
    # Magnitude 9 +- 0.5, clipped to 10: two standard deviations above.
    assert strengths.max() == 1.0
    assert np.mean(strengths == 1.0) == pytest.approx(0.0228, abs=0.006)
    assert np.mean(strengths) == pytest.approx(0.9, abs=0.003)
    assert np.std(strengths) == pytest.approx(0.05, abs=0.002)


def test_notation():
    assert parse_rand_augment("") is None
    assert parse_rand_augment("rand-m9-mstd0.5-inc1") == RandAugment(9.0, 0.5, 2, 0.5)
    assert parse_rand_augment("rand-n3-inc1") == RandAugment(10.0, 0.0, 3, 0.5)
    for wrong in (
        "rand-m9",
        "augmix-m9-inc1",
        "rand-m11-inc1",
        "rand-n0-inc1",
        "rand-m9-w0-inc1",
        "9",
        "rand-inc0",
        "rand-m9-m3-inc1",
    ):
        with pytest.raises(InputError, match=r"rand-m9-mstd0\.5-inc1"):
            parse_rand_augment(wrong)


def test_the_order_of_the_stack():
    """Augment applies, with one generator, what its parts apply: geometry, operations, jitter, erasing."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
    augment = Augment("resize", rand_augment=RandAugment(), color_jitter=0.4, random_erasing=0.5, mean=mean, std=std)
    for seed in range(20):
        found = augment(PICTURE, 24, 3, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        picture = Image.fromarray(PICTURE).resize((24, 24), Image.Resampling.BICUBIC)
        picture = RandAugment()(picture, (128, 102, 76), rng)
        image = random_erasing(np.asarray(color_jitter(picture, 0.4, rng)), 0.5, mean, std, rng)
        np.testing.assert_array_equal(found, image)
        assert found.shape == (24, 24, 3) and found.dtype == np.uint8


# --- colour jitter


def test_color_jitter_draws_from_the_stated_range():
    """On a grey picture only brightness and contrast act; of one value, contrast does not."""
    flat = Image.fromarray(np.full((4, 4), 100, np.uint8))
    rng = np.random.default_rng(0)
    values = np.array([np.asarray(color_jitter(flat, 0.4, rng))[0, 0] for _ in range(2000)])
    assert values.min() in range(60, 63) and values.max() in range(137, 141)
    assert np.mean(values) == pytest.approx(100, abs=1.5)
    assert np.std(values) == pytest.approx(80 / math.sqrt(12), rel=0.04)


def test_color_jitter_orders_are_equally_frequent(monkeypatch):
    orders = collections.Counter()
    rng = np.random.default_rng(0)
    for _ in range(1200):
        calls = []

        def enhancer(name, calls=calls):
            class Enhancer:
                def __init__(self, picture):
                    self.picture = picture

                def enhance(self, factor):
                    calls.append(name)
                    return self.picture

            return Enhancer

        monkeypatch.setattr("spiking_mlp_jax.data.transforms._ENHANCERS", tuple(map(enhancer, "bcs")))
        color_jitter(Image.fromarray(PICTURE), 0.4, rng)
        orders["".join(calls)] += 1
    assert len(orders) == 6 and min(orders.values()) > 150


# --- random erasing


def test_random_erasing():
    image = np.full((40, 50, 3), 7, np.uint8)
    mean, std = (0.5, 0.4, 0.6), (0.1, 0.05, 0.1)
    rng = np.random.default_rng(0)
    areas, ratios, noise, erased = [], [], [], 0
    for _ in range(1500):
        found = random_erasing(image, 0.25, mean, std, rng)
        changed = (found != image).any(-1)
        if not changed.any():
            continue
        erased += 1
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert changed.sum() == height * width  # one rectangle
        areas.append(height * width / 2000)
        ratios.append(height / width)
        noise.append(found[changed])
    assert image.max() == image.min() == 7
    assert erased / 1500 == pytest.approx(0.25, abs=0.035)
    assert 0.015 < min(areas) < 0.04 and 0.3 < max(areas) < 0.35
    assert np.mean(areas) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert abs(np.mean(np.log(ratios))) < 0.12
    pixels = np.concatenate(noise) / 255
    np.testing.assert_allclose(pixels.mean(0), mean, atol=0.003)
    np.testing.assert_allclose(pixels.std(0), std, atol=0.003)
