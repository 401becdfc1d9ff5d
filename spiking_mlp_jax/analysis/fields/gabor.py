"""Gabor functions: least-squares fits to receptive fields, and the measures of physiologists.

With x' across the bars and y' along them, both from the centre of the envelope,

    g = A exp(-(x'/sigma_x)^2 / 2 - (y'/sigma_y)^2 / 2) cos(2 pi f x' + phase)

The fit is linear in A cos(phase) and A sin(phase) and by least squares in the rest. It starts from several peaks of the
field's Fourier transform, each with the envelope of the field demodulated at that frequency.

References:
    Jones and Palmer, "An evaluation of the two-dimensional Gabor filter model of simple receptive fields in cat striate
    cortex", J. Neurophysiol. 58, 1987.
    Ringach, "Spatial structure and symmetry of simple-cell receptive fields in macaque primary visual cortex",
    J. Neurophysiol. 88, 2002: n_x = sigma_x f and n_y = sigma_y f.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter
from scipy.optimize import least_squares

from spiking_mlp_jax.errors import InputError

SMALLEST = 5  # pixels along a side: a Gabor has 8 parameters, almost enough to fit any 4 x 4 pixels
_FASTEST = math.sqrt(0.5)  # cycles/pixel along a diagonal, the highest of a pixel grid
# Half width at half amplitude of the transform of a Gaussian, times its standard deviation.
_HALF_AMPLITUDE = math.sqrt(2 * math.log(2)) / (2 * math.pi)


@dataclasses.dataclass(frozen=True)
class Gabor:
    """A Gabor function on a grid of pixels.

    Attributes:
        row, column: centre of the envelope, in pixels.
        orientation: of the bars, in radians, 0 (horizontal) to pi; pi/2 is vertical, pi/4 rises to the right.
        frequency: cycles per pixel across the bars.
        phase: of the cosine at the centre, -pi to pi: 0 is even with a bright middle, pi/2 and -pi/2 are odd.
        sigma_x: standard deviation of the envelope across the bars, in pixels.
        sigma_y: along the bars.
        amplitude: positive, in the field's unit.
        explained: R^2 of the fit, 1 - sum (field - g)^2 / sum (field - mean field)^2; NaN without a fit.
    """

    row: float
    column: float
    orientation: float
    frequency: float
    phase: float
    sigma_x: float
    sigma_y: float
    amplitude: float = 1.0
    explained: float = float("nan")

    @property
    def nx(self) -> float:
        """Cycles under one sigma of the envelope, across the bars."""
        return self.sigma_x * self.frequency

    @property
    def ny(self) -> float:
        """Length of the envelope along the bars, in cycles."""
        return self.sigma_y * self.frequency

    @property
    def aspect(self) -> float:
        """sigma_y / sigma_x."""
        return self.sigma_y / self.sigma_x

    @property
    def bandwidth(self) -> float:
        """Full width of the frequency tuning at half amplitude, in octaves; infinite where f <= d.

        log2((f + d) / (f - d)), d = sqrt(2 ln 2) / (2 pi sigma_x): of the Gaussian around f, as usual. The one around
        -f is ignored, which matters for n_x below 0.3.
        """
        half = _HALF_AMPLITUDE / self.sigma_x
        return math.log2((self.frequency + half) / (self.frequency - half)) if self.frequency > half else math.inf

    @property
    def band_pass(self) -> bool:
        """Whether uniform grey drives the unit less than half as much as the best grating; otherwise it is a blob.

        From the transform along x', including both Gaussians and the phase.
        """
        f = np.linspace(0, 3 * max(self.nx, _HALF_AMPLITUDE), 400)
        towards, away = (np.exp(-2 * math.pi**2 * (f - sign * self.nx) ** 2) for sign in (1, -1))
        tuning = np.abs(towards + away * np.exp(-2j * self.phase))
        return bool(tuning[0] < tuning.max() / 2)


def render(gabor: Gabor, shape: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """The function's values at the pixels of a grid."""
    a, b = gabor.amplitude * math.cos(gabor.phase), gabor.amplitude * math.sin(gabor.phase)
    shape_of = math.log(gabor.sigma_x), math.log(gabor.sigma_y)
    p = np.array([gabor.row, gabor.column, gabor.orientation, gabor.frequency, *shape_of])
    even, odd = _pair(p, *_grid(shape))
    return (a * even - b * odd).reshape(shape)


def fit_gabor(field: Float[np.ndarray, "H W"], starts: int = 3) -> Gabor:
    """The least-squares fit of a Gabor function to a field.

    Args:
        field: at least 5 x 5.
        starts: number of starting points, the most promising ones; the best fit is returned.

    Returns:
        the function, with `explained`.

    Raises:
        InputError: the field is too small, constant or not finite.
    """
    field = np.asarray(field, np.float64)
    if field.ndim != 2 or min(field.shape) < SMALLEST:
        raise InputError(
            f"a Gabor fit needs a field of at least {SMALLEST} x {SMALLEST} pixels, but this one is {field.shape}: "
            "8 parameters would fit anything"
        )
    if not np.all(np.isfinite(field)):
        raise InputError("a Gabor fit needs a field of finite numbers")
    if starts < 1:
        raise InputError(f"a Gabor fit needs at least one start, but starts is {starts}")
    spread = float(np.sum((field - field.mean()) ** 2))
    if not spread > 1e-24 * max(float(np.sum(field**2)), 1e-300):
        raise InputError("a field whose pixels are all equal has no Gabor: the unit does not see the pixels")
    scale = math.sqrt(spread / field.size)
    y = field.ravel() / scale
    grid = _grid(field.shape)
    low, high = _bounds(field.shape)
    # SciPy's stubs know only the names of its own approximations.
    jac: Any = lambda p: _jacobian(p, grid)  # noqa: E731
    best, best_cost = None, math.inf
    for start in _starts(field / scale, starts, low, high):
        result = least_squares(
            lambda p: _residuals(p, y, grid), start, jac, bounds=(low, high), max_nfev=50,
            x_scale="jac", ftol=1e-6, xtol=1e-6, gtol=1e-6,
        )  # fmt: skip
        if result.cost < best_cost:
            best, best_cost = result.x, result.cost
    assert best is not None
    explained = float(1 - 2 * best_cost * scale**2 / spread)
    return _gabor(best, scale, explained)


def _grid(shape):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return rows.ravel().astype(float), columns.ravel().astype(float)


def _local(p, rows, columns):
    # Bars at an angle o, counter-clockwise from horizontal, are modulated along (down, right) = (cos o, sin o).
    down, right = rows - p[0], columns - p[1]
    c, s = math.cos(p[2]), math.sin(p[2])
    # x' across the bars, y' along them.
    return down * c + right * s, -down * s + right * c


def _pair(p, rows, columns):
    x, y = _local(p, rows, columns)
    envelope = np.exp(-0.5 * ((x * math.exp(-p[4])) ** 2 + (y * math.exp(-p[5])) ** 2))
    angle = 2 * math.pi * p[3] * x
    return envelope * np.cos(angle), envelope * np.sin(angle)


def _residuals(p, y, grid):
    even, odd = _pair(p, *grid)
    return p[6] * even - p[7] * odd - y


def _jacobian(p, grid):
    x, y = _local(p, *grid)
    even, odd = _pair(p, *grid)
    value, turned = p[6] * even - p[7] * odd, -p[6] * odd - p[7] * even  # and its derivative by the angle
    inverse_x, inverse_y = math.exp(-2 * p[4]), math.exp(-2 * p[5])
    by_x = -x * inverse_x * value + 2 * math.pi * p[3] * turned
    by_y = -y * inverse_y * value
    c, s = math.cos(p[2]), math.sin(p[2])
    # dx/d(row, column) = (-c, -s), dy/d(row, column) = (s, -c); turning by dt: dx = y dt, dy = -x dt.
    return np.stack(
        [
            -c * by_x + s * by_y,
            -s * by_x - c * by_y,
            y * by_x - x * by_y,
            2 * math.pi * x * turned,
            x * x * inverse_x * value,
            y * y * inverse_y * value,
            even,
            -odd,
        ],
        1,
    )


def _bounds(shape):
    side = max(shape)
    low = [-0.5, -0.5, -np.inf, 0.0, math.log(0.4), math.log(0.4), -np.inf, -np.inf]
    high = [shape[0] - 0.5, shape[1] - 0.5, np.inf, _FASTEST, math.log(2 * side), math.log(2 * side), np.inf, np.inf]
    return np.array(low), np.array(high)


def _starts(field, count, low, high):
    """Starting points, the best linear fit first."""
    grid, y = _grid(field.shape), field.ravel()
    found = []
    for f_row, f_column in _peaks(field):
        frequency, angle = math.hypot(f_row, f_column), math.atan2(f_column, f_row)
        row, column, sigma = _envelope(field, f_row, f_column)
        for across in (0.6, 1.0, 1.6):
            for along in (0.6, 1.0, 1.6):
                p = np.array([row, column, angle, frequency, math.log(across * sigma), math.log(along * sigma)])
                p = np.clip(p, low[:6] + 1e-6, high[:6] - 1e-6)
                even, odd = _pair(p, *grid)
                basis = np.stack([even, -odd], 1)
                # Slightly regularised: near frequency 0 the sine vanishes.
                gram = basis.T @ basis + 1e-6 * np.eye(2) * len(y)
                a = np.linalg.solve(gram, basis.T @ y)
                found.append((float(np.sum((basis @ a - y) ** 2)), np.concatenate([p, a])))
    found.sort(key=lambda pair: pair[0])
    # The best start of each peak comes first, because neighbouring starts converge to the same fit.
    chosen = []
    for _, p in found:
        if all(abs(p[3] - q[3]) > 1e-9 or abs(p[2] - q[2]) > 1e-9 for q in chosen):
            chosen.append(p)
    rest = [p for _, p in found if not any(p is q for q in chosen)]
    return (chosen + rest)[:count]


def _peaks(field, most=4):
    """Frequencies (along rows, along columns) of the highest local maxima of the power in a half plane."""
    size = [2 * side for side in field.shape]
    power = np.abs(np.fft.fft2(field, size)) ** 2
    around = np.stack([np.roll(power, shift, (0, 1)) for shift in _NEIGHBOURS])
    index = np.argwhere((power >= around.max(0)) & (power > 0))
    frequencies = np.stack([np.fft.fftfreq(size[0])[index[:, 0]], np.fft.fftfreq(size[1])[index[:, 1]]], 1)
    order = np.argsort(-power[tuple(index.T)], kind="stable")
    chosen = []
    for f_row, f_column in frequencies[order]:
        if f_row < 0 or (f_row == 0 and f_column < 0):
            f_row, f_column = -f_row, -f_column
        if not any(abs(f_row - a) + abs(f_column - b) < 1e-9 for a, b in chosen):
            chosen.append((float(f_row), float(f_column)))
        if len(chosen) == most:
            break
    # Blobs, and bars under a narrow envelope, peak at 0: add low frequencies along both axes.
    slow = 0.5 / max(field.shape)
    return [*chosen, (slow, 1e-3), (1e-3, slow)]


_NEIGHBOURS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]


def _envelope(field, f_row, f_column):
    """Centre and standard deviation of the field's component at a frequency."""
    rows, columns = np.mgrid[: field.shape[0], : field.shape[1]]
    carrier = np.exp(-2j * math.pi * (f_row * rows + f_column * columns))
    blur = min(max(0.35 / max(math.hypot(f_row, f_column), 0.05), 1.0), max(field.shape) / 6)
    demodulated = field * carrier
    part = np.hypot(*(gaussian_filter(half, blur, mode="constant") for half in (demodulated.real, demodulated.imag)))
    power = part**2
    row, column = np.unravel_index(power.argmax(), power.shape)
    near = power * (power > 0.1 * power.max())
    distance = (rows - row) ** 2 + (columns - column) ** 2
    # A Gaussian's power is narrower by sqrt(2), and the blur has widened it.
    sigma = math.sqrt(max(float(np.sum(near * distance) / np.sum(near)) - blur**2 / 2, 0.5))
    return float(row), float(column), sigma


def _gabor(p, scale, explained) -> Gabor:
    row, column, angle, frequency, sigma_x, sigma_y, a, b = p.tolist()
    phase, amplitude = math.atan2(b, a), scale * math.hypot(a, b)
    turns, orientation = divmod(angle, math.pi)
    if orientation >= math.pi:  # by rounding
        turns, orientation = turns + 1, 0.0
    if turns % 2:  # half a turn negates x', and so the phase
        phase = -phase
    return Gabor(row, column, orientation, frequency, phase, math.exp(sigma_x), math.exp(sigma_y), amplitude, explained)
