"""Linear receptive fields under correlated stimuli, such as natural images.

The spike-triggered average of correlated stimuli is the filter blurred by their covariance C. Dividing by C undoes that
and blows up noise where the stimuli vary little, so C gets a ridge:

    w = (C + r m I)^-1 cov(c, x),  m the mean of C's eigenvalues

Each unit's strength r is the one whose w predicts the counts of held-out stimuli best. All of it follows from sums
(`Moments`) over the stimuli that are fitted to and over those held out. The rest of the units' answers, what no linear
map predicts, stays in the explained share, which is 1 only for a linear unit.

References:
    Theunissen et al., "Estimating spatio-temporal receptive fields of auditory and visual neurons from their responses
    to natural stimuli", Network 12, 2001.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from spiking_mlp_jax.analysis.fields.spike_triggered import Moments
from spiking_mlp_jax.errors import InputError

STRENGTHS = tuple(float(10**power) for power in np.arange(-3.0, 2.01, 0.5))


@dataclasses.dataclass(frozen=True)
class LinearFields:
    """Linear fields of some units.

    Attributes (index 0 of K + 1 is the true pairing, the others the shifted counts):
        fields: w [K + 1, U, D], spikes per unit of the stimulus.
        strengths: the r of each [K + 1, U].
        explained: share of the held-out counts' variance that w predicts [K + 1, U]; negative where it predicts worse
            than the mean count; NaN where the unit's held-out counts do not vary.
    """

    fields: Float[np.ndarray, "K1 U D"]
    strengths: Float[np.ndarray, "K1 U"]
    explained: Float[np.ndarray, "K1 U"]

    def p(self) -> Float[np.ndarray, "U"]:
        """Share of the pairings, the true one among them, that explain at least as much as the true one."""
        return np.mean(~(self.explained < self.explained[0]), 0)


def linear_fields(fit: Moments, held: Moments, strengths: tuple[float, ...] = STRENGTHS) -> LinearFields:
    """Estimates the linear fields of all units, and of their shifted counts as a control.

    Args:
        fit: of the stimuli that are fitted to, with prior.
        held: of those held out, with prior; likewise shifted.
        strengths: ridges to choose from.

    Raises:
        InputError: sums that do not belong together, fewer than 2 stimuli, or stimuli that do not vary.
    """
    if fit.cx.shape != held.cx.shape:
        raise InputError(f"sums to fit to and held-out ones differ in shape: {fit.cx.shape}, {held.cx.shape}")
    if not strengths or min(strengths) <= 0:
        raise InputError(f"ridge strengths must be positive, but they are {strengths}")
    values, vectors = np.linalg.eigh(fit.covariance())
    mean = values.mean()
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
