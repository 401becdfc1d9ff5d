import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_mlp_jax.analysis.fields.controls import shuffled_pixels
from spiking_mlp_jax.analysis.fields.gabor import Gabor, fit_gabor, render
from spiking_mlp_jax.errors import InputError

SHAPE = (20, 22)


def formula(g, row, column):
    """The Gabor's value at a pixel, written out from its definition with scalars."""
    down, right = row - g.row, column - g.column
    x = down * math.cos(g.orientation) + right * math.sin(g.orientation)
    y = -down * math.sin(g.orientation) + right * math.cos(g.orientation)
    envelope = math.exp(-((x / g.sigma_x) ** 2) / 2 - (y / g.sigma_y) ** 2 / 2)
    return g.amplitude * envelope * math.cos(2 * math.pi * g.frequency * x + g.phase)


def apart(a, b, period):
    return abs((a - b + period / 2) % period - period / 2)


@settings(max_examples=12)
@given(
    orientation=st.floats(0, math.pi),
    frequency=st.floats(0.08, 0.3),
    phase=st.floats(-math.pi, math.pi),
    nx=st.floats(0.35, 0.7),
    ny=st.floats(0.35, 0.8),
    seed=st.integers(0, 1000),
)
def test_planted_gabors_are_found_under_noise(orientation, frequency, phase, nx, ny, seed):
    rng = np.random.default_rng(seed)
    row, column = rng.uniform(8, 12, 2)
    sigmas = max(nx / frequency, 1.2), max(ny / frequency, 1.2)
    planted = Gabor(row, column, orientation, frequency, phase, *sigmas, amplitude=3.0)
    clean = render(planted, SHAPE)
    found = fit_gabor(clean + 0.1 * clean.std() * rng.normal(size=SHAPE))
    assert found.explained > 0.97
    # What is read off the fit is that of the planted one, whichever of its equivalent descriptions was found.
    assert np.sum((render(found, SHAPE) - clean) ** 2) < 0.01 * np.sum(clean**2)
    assert apart(found.orientation, orientation, math.pi) < 0.08
    assert found.frequency == pytest.approx(frequency, rel=0.08)
    assert 0 <= found.orientation < math.pi
    assert -math.pi <= found.phase <= math.pi
    assert found.nx == pytest.approx(planted.nx, rel=0.15)
    assert found.ny == pytest.approx(planted.ny, rel=0.15)
    assert math.hypot(found.row - row, found.column - column) < 0.12 / frequency


@pytest.mark.parametrize("orientation, phase", [(0.3, 0.4), (2.9, -2.0)])
def test_phase_is_that_of_the_function_itself(orientation, phase):
    planted = Gabor(9.0, 10.0, orientation, 0.15, phase, 3.0, 4.0)
    found = fit_gabor(render(planted, SHAPE))
    assert apart(found.phase, phase, 2 * math.pi) < 1e-3
    assert found.explained > 1 - 1e-6
    opposite = fit_gabor(-2 * render(planted, SHAPE))
    assert apart(opposite.phase, phase + math.pi, 2 * math.pi) < 1e-3
    assert opposite.amplitude == pytest.approx(2, rel=1e-3)


def test_render_is_the_formula():
    g = Gabor(7.3, 11.1, 0.7, 0.13, 0.9, 2.5, 4.0, amplitude=-1.5)
    field = render(g, SHAPE)
    for row, column in ((0, 0), (7, 11), (12, 3), (19, 21)):
        assert field[row, column] == pytest.approx(formula(g, row, column), abs=1e-12)


def test_orientation_is_that_of_the_bars():
    def bars(orientation):
        return render(Gabor(10, 10, orientation, 0.1, 0.0, 1e3, 1e3), (21, 21))

    assert np.ptp(bars(0), axis=1).max() < 1e-3  # horizontal: equal along a row
    assert np.ptp(bars(math.pi / 2), axis=0).max() < 1e-3
    rising = bars(math.pi / 4)
    np.testing.assert_allclose(rising[1:, :-1], rising[:-1, 1:], atol=1e-3)  # up and to the right


@pytest.mark.parametrize("sigma, frequency", [(4.0, 0.125), (10.0, 0.1), (5.0, 0.06)])
def test_bandwidth_is_that_of_the_transform(sigma, frequency):
    gabor = Gabor(200, 0, 0.0, frequency, 0.0, sigma, 1.0)
    profile = render(gabor, (401, 1))[:, 0]
    f = np.linspace(0, 0.5, 4001)
    # Without the part around -f, which the formula leaves out: that of the complex carrier.
    x = np.arange(401) - 200
    carrier = np.exp(-(x**2) / 2 / sigma**2) * np.exp(2j * math.pi * frequency * x)
    np.testing.assert_allclose(profile, carrier.real, atol=1e-12)
    amplitude = np.abs(np.exp(-2j * math.pi * f[:, None] * x) @ carrier)
    above = f[amplitude >= amplitude.max() / 2]
    assert gabor.bandwidth == pytest.approx(math.log2(above[-1] / above[0]), rel=0.01)
    assert (gabor.nx, gabor.ny, gabor.aspect) == pytest.approx((sigma * frequency, frequency, 1 / sigma))


def test_blobs_are_no_band_pass_but_odd_fields_are():
    assert not Gabor(0, 0, 0, 0.02, 0.0, 3, 3).band_pass
    assert Gabor(0, 0, 0, 0.02, math.pi / 2, 3, 3).band_pass
    assert Gabor(0, 0, 0, 0.2, 0.0, 3, 3).band_pass
    assert math.isinf(Gabor(0, 0, 0, 0.02, 0.0, 3, 3).bandwidth)


def test_explained_is_the_share_of_the_variance():
    rng = np.random.default_rng(3)
    field = render(Gabor(6, 6, 1.0, 0.15, 0.3, 2, 2), (12, 12)) + 0.2 * rng.normal(size=(12, 12)) + 0.05
    found = fit_gabor(field)
    left = np.sum((field - render(found, (12, 12))) ** 2) / np.sum((field - field.mean()) ** 2)
    assert found.explained == pytest.approx(1 - left, abs=1e-6)


def test_shuffled_pixels_and_noise_are_no_gabors():
    rng = np.random.default_rng(0)
    field = render(Gabor(8, 7, 2.0, 0.15, 1.0, 3, 3), (16, 16))
    shuffled = shuffled_pixels(field, rng)
    np.testing.assert_array_equal(np.sort(shuffled, None), np.sort(field, None))
    assert fit_gabor(field).explained > 0.999
    assert fit_gabor(shuffled).explained < 0.3
    assert fit_gabor(rng.normal(size=(24, 24))).explained < 0.1


@pytest.mark.parametrize(
    "field, message",
    [
        (np.zeros((4, 4)), "at least 5 x 5"),
        (np.zeros((2, 32)), "at least 5 x 5"),
        (np.zeros(32), "at least 5 x 5"),
        (np.ones((8, 8)), "all equal"),
        (np.full((8, 8), np.nan), "finite"),
    ],
)
def test_impossible_fields(field, message):
    with pytest.raises(InputError, match=message):
        fit_gabor(field)


def test_at_least_one_start():
    with pytest.raises(InputError, match="starts is 0"):
        fit_gabor(np.eye(8), starts=0)
