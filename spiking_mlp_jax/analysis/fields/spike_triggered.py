"""Spike-triggered averages and covariances, and linear fields under correlated stimuli.

Everything follows from sums that grow batch by batch; no stimulus is stored. With stimuli x_n and spike counts c_n, of
N stimuli,

    average      a - mean(x),  a = sum_n c_n x_n / sum_n c_n
    covariance   sum_n c_n (x_n - a)(x_n - a)^T / (sum_n c_n - 1)
    linear       w = (C + r m I)^-1 cov(c, x),  C the covariance of x, m the mean of its eigenvalues

For Gaussian white noise the average points along the filter of a linear-nonlinear unit; directions in which the
covariance differs from that of all stimuli are those of further filters, quadratic ones included. Natural images are
correlated, so their average is the filter blurred by C. Dividing by C undoes that and amplifies noise where the stimuli
vary little, hence the ridge r, chosen for each unit by how well w predicts the counts of held-out stimuli.

The control uses the same sums with the counts of earlier stimuli, c_{n-k} for k = 1 .. shifts. That preserves stimuli
and counts and breaks only their relation. It requires stimuli in random order.

References:
    de Boer and Kuyper, "Triggered correlation", IEEE Trans. Biomed. Eng. 1968.
    Chichilnisky, "A simple white noise analysis of neuronal light responses", Network 12, 2001.
    Schwartz, Pillow, Rust, Simoncelli, "Spike-triggered neural characterization", Journal of Vision 6, 2006.
    Theunissen et al., "Estimating spatio-temporal receptive fields of auditory and visual neurons from their responses
    to natural stimuli", Network 12, 2001.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from spiking_mlp_jax.errors import InputError

CLEAR = 4.0  # energy of a reliable average, relative to chance


class Moments:
    """Sums over stimuli.

    Args:
        pixels: size of a stimulus, D.
        units: number of units, U.
        shifts: number of shifted copies of the counts, the control, K.
        prior: whether to sum the stimuli's own second moments [D, D].
        triggered: whether to sum the spike-triggered second moments [K + 1, U, D, D].

    Attributes (index 0 of K + 1 is the true pairing, the others the shifted ones):
        stimuli: number of stimuli.
        x, xx: sums of the stimuli and of their outer products.
        c, cc: sums of the counts and of their squares [K + 1, U].
        cx, cxx: sums of the stimuli, and of their outer products, times the counts.
    """

    def __init__(self, pixels: int, units: int, *, shifts: int = 0, prior: bool = False, triggered: bool = False):
        self.stimuli = 0
        self.x = np.zeros(pixels)
        self.xx = np.zeros((pixels, pixels)) if prior else None
        self.c = np.zeros((shifts + 1, units))
        self.cc = np.zeros((shifts + 1, units))
        self.cx = np.zeros((shifts + 1, units, pixels))
        self.cxx = np.zeros((shifts + 1, units, pixels, pixels)) if triggered else None
        self._tail = np.zeros((shifts, units))

    @property
    def shifts(self) -> int:
        """Number of shifted copies."""
        return len(self.c) - 1

    def add(self, stimuli: Float[np.ndarray, "B ..."], counts: Float[np.ndarray, "B U"]) -> None:
        """Adds a batch; products are computed in the stimuli's dtype and summed in float64.

        Args:
            stimuli: of any shape with D elements, float32 or float64.
            counts: spikes of each unit, or other non-negative responses.

        Raises:
            InputError: wrong shapes, NaN or inf, or negative counts.
        """
        flat = np.asarray(stimuli)
        flat = flat.reshape(len(flat), -1) if flat.ndim > 1 else flat
        counts = np.asarray(counts)
        expected = (len(flat), len(self.x)), (len(flat), self.c.shape[1])
        if (flat.shape, counts.shape) != expected:
            raise InputError(
                f"stimuli and counts must be {expected[0]} and {expected[1]}, but they are {flat.shape}, {counts.shape}"
            )
        if not (np.all(np.isfinite(counts)) and np.all(counts >= 0)):
            raise InputError("spike counts must be finite and not negative: potentials cannot trigger an average")
        if not np.all(np.isfinite(flat)):
            raise InputError("a stimulus holds numbers that are not finite")
        shifts, size = self.shifts, len(flat)
        line = np.concatenate([self._tail, counts])
        shifted = np.stack([line[shifts - k : shifts - k + size] for k in range(shifts + 1)]).astype(flat.dtype)
        self._tail = line[size:].astype(np.float64)
        self.stimuli += size
        self.x += flat.sum(0, dtype=np.float64)
        self.c += shifted.sum(1, dtype=np.float64)
        self.cc += (shifted.astype(np.float64) ** 2).sum(1)
        self.cx += (shifted.transpose(0, 2, 1).reshape(-1, size) @ flat).reshape(self.cx.shape)
        if self.xx is not None:
            self.xx += flat.T @ flat
        if self.cxx is not None:
            for k, unit in np.ndindex(*self.c.shape):
                weights = shifted[k, :, unit]
                fired = np.flatnonzero(weights)
                self.cxx[k, unit] += (flat[fired] * weights[fired, None]).T @ flat[fired]

    def state(self) -> dict[str, np.ndarray]:
        """All sums, for `restore`."""
        return {name: np.asarray(value) for name, value in vars(self).items() if value is not None}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Takes the sums of Moments with the same arguments."""
        vars(self).update({name: value if value.ndim else value.item() for name, value in state.items()})

    @property
    def mean(self) -> Float[np.ndarray, "D"]:
        """Mean stimulus."""
        return self.x / max(self.stimuli, 1)

    def covariance(self) -> Float[np.ndarray, "D D"]:
        """Covariance of all stimuli."""
        if self.xx is None:
            raise InputError("the stimuli's second moments were not summed: make Moments with prior=True")
        if self.stimuli < 2:
            raise InputError(f"a covariance needs at least 2 stimuli, but there are {self.stimuli}")
        return (self.xx - self.stimuli * np.outer(self.mean, self.mean)) / (self.stimuli - 1)


def average(moments: Moments, unit: int, *, shift: int = 0, least: float = 1.0) -> Float[np.ndarray, "D"]:
    """Spike-triggered average minus the mean stimulus.

    Args:
        moments: of all stimuli.
        unit: its index.
        shift: 0, or the number of a shifted copy for the control.
        least: minimum number of spikes.

    Raises:
        InputError: too few spikes.
    """
    spikes = _enough(moments, unit, shift, least)
    return moments.cx[shift, unit] / spikes - moments.mean


@dataclasses.dataclass(frozen=True)
class Significance:
    """How far a spike-triggered average is above chance.

    Attributes:
        signal: share of the average's energy (sum of squares) above chance; negative if it is below the mean of the
            controls.
        p: share of averages, itself included, with at least its energy; at least 1 / (shifts + 1).
    """

    signal: float
    p: float


def significance(moments: Moments, unit: int, least: float = 1.0) -> Significance:
    """Compares an average with those of the shifted counts.

    Raises:
        InputError: too few spikes, or no shifted copies.
    """
    if not moments.shifts:
        raise InputError("there are no shifted counts to compare with: make Moments with shifts of 1 or more")
    energies = [np.sum(average(moments, unit, shift=k, least=least) ** 2) for k in range(moments.shifts + 1)]
    p = float(np.mean(np.array(energies) >= energies[0]))
    return Significance(float(1 - np.mean(energies[1:]) / energies[0]) if energies[0] else 0.0, p)


@dataclasses.dataclass(frozen=True)
class Covariance:
    """Spectrum of a spike-triggered covariance.

    Attributes:
        values: eigenvalues of the change of covariance given a spike, in descending order, in units of the stimuli's
            variance in that direction (0: no change; -1: no variance left).
        axes: eigenvectors as filters on the stimulus, of length 1 [number, D].
        low, high: the lowest and highest eigenvalue of any shifted copy.
    """

    values: Float[np.ndarray, "E"]
    axes: Float[np.ndarray, "E D"]
    low: float
    high: float

    @property
    def excitatory(self) -> int:
        """Number of eigenvalues above all controls: directions in which both signs make the unit fire.

        By chance, the first one exceeds them once in shifts + 1 times.
        """
        return int(np.sum(self.values > self.high))

    @property
    def suppressive(self) -> int:
        """Number of eigenvalues below all controls."""
        return int(np.sum(self.values < self.low))


def covariance(moments: Moments, unit: int, *, keep: float = 1.0, least: float = 2.0) -> Covariance:
    """Spike-triggered covariance of one unit, compared with that of all stimuli.

    Stimuli are whitened by the leading axes of their own covariance. The direction of the average is projected out if
    it has at least 4 times the energy of the controls. A weaker average is mostly noise, which for a unit that computes
    energies lies along its axes, and these would be lost. For stimuli that are not Gaussian, such as images, an
    eigenvalue can differ from the controls only because stimuli along the average differ in their variance.

    Args:
        moments: with prior and triggered.
        unit: its index.
        keep: share of the stimuli's variance in the leading axes; axes without variance are always dropped.
        least: minimum number of spikes.

    Raises:
        InputError: too few spikes, no shifted copies, or missing sums.
    """
    triggered = moments.cxx
    if triggered is None:
        raise InputError("spike-triggered second moments were not summed: make Moments with triggered=True")
    if not moments.shifts:
        raise InputError("there are no shifted counts to compare with: make Moments with shifts of 1 or more")
    if not 0 < keep <= 1:
        raise InputError(f"keep is a share of the variance above 0 and up to 1, but it is {keep}")
    values, vectors = np.linalg.eigh(moments.covariance())
    values, vectors = values[::-1], vectors[:, ::-1]
    real = values > 1e-9 * max(values[0], 0)
    lead = np.cumsum(values * real) - values < keep * np.sum(values * real) * (1 - 1e-12)
    chosen = real & lead
    if chosen.sum() < 2:
        raise InputError("the stimuli vary in less than 2 directions: there is no covariance to compare")
    whiten = vectors[:, chosen] / np.sqrt(values[chosen])
    averages = [average(moments, unit, shift=k, least=max(least, 2.0)) @ whiten for k in range(moments.shifts + 1)]
    energies = [float(np.sum(direction**2)) for direction in averages]
    if energies[0] > 0 and energies[0] >= CLEAR * np.mean(energies[1:]):
        # An orthonormal basis of the complement of the average, in whitened coordinates.
        whiten = whiten @ np.linalg.svd(averages[0][None])[2][1:].T

    def change(shift):
        spikes = _enough(moments, unit, shift, max(least, 2.0))
        mean = moments.cx[shift, unit] / spikes
        around = (triggered[shift, unit] - spikes * np.outer(mean, mean)) / (spikes - 1)
        return whiten.T @ around @ whiten - np.eye(whiten.shape[1])

    found, axes = np.linalg.eigh(change(0))
    bounds = [np.linalg.eigvalsh(change(k))[[0, -1]] for k in range(1, moments.shifts + 1)]
    filters = (whiten @ axes[:, ::-1]).T
    filters /= np.linalg.norm(filters, axis=1, keepdims=True)
    return Covariance(
        found[::-1], filters, float(min(low for low, _ in bounds)), float(max(high for _, high in bounds))
    )


def _enough(moments, unit, shift, least):
    if not 0 <= unit < moments.c.shape[1]:
        raise InputError(f"there are {moments.c.shape[1]} units, counted from 0, and so no unit {unit}")
    if not 0 <= shift <= moments.shifts:
        raise InputError(f"there are {moments.shifts} shifted copies of the counts, and so no number {shift}")
    spikes = float(moments.c[shift, unit])
    if not spikes >= max(least, 1e-300):
        raise InputError(
            f"unit {unit} fired {spikes:g} spikes, but {least:g} are needed: show more stimuli, or with more contrast"
        )
    return spikes


STRENGTHS = tuple(float(10**power) for power in np.arange(-3.0, 2.01, 0.5))


@dataclasses.dataclass(frozen=True)
class LinearFields:
    """Linear fields of some units.

    Attributes (index 0 of K + 1 is the true pairing, the others the shifted counts):
        fields: w [K + 1, U, D], spikes per unit of the stimulus.
        strengths: ridge r of each [K + 1, U].
        explained: share of the held-out counts' variance that w predicts [K + 1, U], 1 only for a linear unit; negative
            if it predicts worse than the mean count; NaN if the held-out counts are constant.
    """

    fields: Float[np.ndarray, "K1 U D"]
    strengths: Float[np.ndarray, "K1 U"]
    explained: Float[np.ndarray, "K1 U"]

    def p(self) -> Float[np.ndarray, "U"]:
        """Share of the pairings, the true one included, that explain at least as much as the true one."""
        return np.mean(~(self.explained < self.explained[0]), 0)


def span(gram: Float[np.ndarray, "N N"]) -> Float[np.ndarray, "N R"]:
    """The map A from N stimuli X [N, D] to an orthonormal basis A^T X of their span, from X X^T.

    X X^T A are the stimuli's coordinates in it. With fewer stimuli than pixels, moments of these take R <= N dimensions
    instead of D, and give the same linear fields.
    """
    values, vectors = np.linalg.eigh(gram)
    real = values > 1e-12 * max(values[-1], 0)
    return vectors[:, real] / np.sqrt(values[real])


def linear_fields(
    fit: Moments, held: Moments, strengths: tuple[float, ...] = STRENGTHS, pixels: int | None = None
) -> LinearFields:
    """Linear fields of all units, and of their shifted counts as a control.

    Args:
        fit: of the stimuli to fit, with prior.
        held: of the held-out stimuli, with prior and as many shifts.
        strengths: ridges to choose from.
        pixels: size of a stimulus, D, if the sums are of coordinates in the stimuli's span.

    Raises:
        InputError: sums of different shapes, fewer than 2 stimuli, or constant stimuli.
    """
    if fit.cx.shape != held.cx.shape:
        raise InputError(f"sums to fit to and held-out ones differ in shape: {fit.cx.shape}, {held.cx.shape}")
    if not strengths or min(strengths) <= 0:
        raise InputError(f"ridge strengths must be positive, but they are {strengths}")
    values, vectors = np.linalg.eigh(fit.covariance())
    mean = values.sum() / (pixels or len(values))
    if not mean > 0:
        raise InputError("the stimuli are all the same: show some that differ")
    values = np.maximum(values, 0)
    of_fit = _covaried(fit) @ vectors
    of_held = _covaried(held) @ vectors
    held_covariance = vectors.T @ held.covariance() @ vectors
    variance = held.cc / held.stimuli - (held.c / held.stimuli) ** 2
    best = np.full(fit.c.shape, -np.inf)
    chosen, fields = np.zeros(fit.c.shape), np.zeros_like(of_fit)
    for strength in strengths:
        w = of_fit / (values + strength * mean)
        gained = 2 * np.sum(w * of_held, -1) - np.sum((w @ held_covariance) * w, -1)
        better = gained > best
        best, chosen = np.where(better, gained, best), np.where(better, strength, chosen)
        fields = np.where(better[..., None], w, fields)
    explained = np.divide(best, variance, out=np.full(best.shape, np.nan), where=variance > 0)
    return LinearFields(fields @ vectors.T, chosen, explained)


def _covaried(moments):
    mean = moments.c[..., None] / moments.stimuli * moments.mean
    return moments.cx / moments.stimuli - mean
