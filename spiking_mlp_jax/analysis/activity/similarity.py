"""Similarity of two time steps' representations: representational similarity and centred kernel alignment.

A layer at a time step represents an image by a vector of firing rates. Two steps are compared by how they arrange the
same images, not neuron by neuron.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from spiking_mlp_jax.analysis.activity.stream import SPIKES
from spiking_mlp_jax.errors import InputError

FEATURES = ("channel", "neuron")
LEAST_IMAGES = 4  # the unbiased estimate divides by N - 3


@dataclasses.dataclass(frozen=True)
class Similarity:
    """Similarity of a layer's time steps.

    Attributes:
        rsa: [T, T], rank correlation of two steps' representational dissimilarities. NaN where undefined.
        cka: [T, T], debiased linear CKA. NaN where a step represents all images the same.
        shuffled: mean CKA over all pairs of steps, including a step and itself, with the images of one shuffled: the
            control.
    """

    rsa: Float[np.ndarray, "T T"]
    cka: Float[np.ndarray, "T T"]
    shuffled: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; NaN stays."""
        return {"rsa": self.rsa.tolist(), "cka": self.cka.tolist(), "cka_shuffled": self.shuffled}


def image_features(features: str):
    """A function for `stream.run`'s `keep`: the features [B, T, F] of images in a layer.

    Raises:
        InputError: `features` is neither "channel" nor "neuron".
    """
    if features not in FEATURES:
        raise InputError(f'features must be "channel" or "neuron", got "{features}"')

    def keep(name, value):
        if not name.endswith(SPIKES):
            return None
        if features == "neuron":
            return value.reshape(*value.shape[:2], -1).astype(bool)
        return jnp.mean(value, (2, 3), dtype=jnp.float32)

    return keep


def between_steps(features: Float[np.ndarray, "N T F"], seed: int = 0) -> Similarity:
    """Compares every two time steps.

    Args:
        features: of each image at each step.
        seed: of the control.

    Raises:
        InputError: fewer than 4 images.
    """
    count, steps = features.shape[:2]
    if count < LEAST_IMAGES:
        raise InputError(f"time steps are compared over at least {LEAST_IMAGES} images, got {count}")
    by_step = [np.asarray(features[:, t], np.float64) for t in range(steps)]
    dissimilar = [rdm(x) for x in by_step]
    grams = [_centred(x @ x.T) for x in map(_from_mean, by_step)]
    order = np.random.default_rng(seed).permutation(count)
    shuffled = [gram[np.ix_(order, order)] for gram in grams]
    rsa_of, cka_of = np.full((steps, steps), np.nan), np.full((steps, steps), np.nan)
    control = []
    for i in range(steps):
        for j in range(i, steps):
            rsa_of[i, j] = rsa_of[j, i] = rsa(dissimilar[i], dissimilar[j])
            cka_of[i, j] = cka_of[j, i] = _alignment(grams[i], grams[j])
            control.append(_alignment(grams[i], shuffled[j]))
    known = [value for value in control if np.isfinite(value)]
    return Similarity(rsa_of, cka_of, float(np.mean(known)) if known else float("nan"))


def rdm(x: Float[np.ndarray, "N F"]) -> Float[np.ndarray, " pairs"]:
    """Representational dissimilarities: 1 - Pearson correlation of the features of each pair of images.

    Args:
        x: features of each image.

    Returns:
        [N (N - 1) / 2], in the order of scipy's `pdist`; NaN for pairs with an image whose features are all equal,
        e.g. without spikes.

    References: Kriegeskorte, Mur, Bandettini, "Representational similarity analysis", Front. Syst. Neurosci. 2, 2008.
    """
    from scipy.spatial.distance import squareform

    centred = np.asarray(x, np.float64) - np.mean(x, 1, keepdims=True, dtype=np.float64)
    length = np.linalg.norm(centred, axis=1)
    # Equal features differ from their mean by rounding.
    known = length > 1e-9 * np.maximum(np.linalg.norm(x, axis=1), 1e-300)
    unit = np.divide(centred, length[:, None], out=np.zeros_like(centred), where=known[:, None])
    found = 1 - np.clip(unit @ unit.T, -1, 1)
    found[~known] = found[:, ~known] = np.nan
    np.fill_diagonal(found, 0)
    return squareform(found, checks=False)


def rsa(a: Float[np.ndarray, " pairs"], b: Float[np.ndarray, " pairs"]) -> float:
    """Spearman's rank correlation of two RDMs over the pairs defined in both; NaN if undefined.

    References: Kriegeskorte et al. 2008; Nili et al., "A toolbox for RSA", PLoS Comput. Biol. 10, 2014.
    """
    from scipy.stats import rankdata

    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < 3 or np.ptp(a[known]) == 0 or np.ptp(b[known]) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(a[known]), rankdata(b[known]))[0, 1])


def _from_mean(x):
    found = x - x.mean(0)
    # Equal features differ from their mean by rounding.
    found[np.abs(found) < 1e-12 * np.abs(x).max(initial=0)] = 0
    return found


def _centred(gram: Float[np.ndarray, "N N"]) -> Float[np.ndarray, "N N"]:
    """The U-centred matrix, whose products are unbiased HSIC: zero diagonal, and each row sums to 0.

    References: Székely, Rizzo, "Partial distance correlation", Ann. Statist. 42, 2014, equal to equation 5 of Song et
    al. up to its factor.
    """
    n = len(gram)
    found = gram.copy()
    np.fill_diagonal(found, 0)
    rows = found.sum(1)
    found += rows.sum() / ((n - 1) * (n - 2)) - (rows[:, None] + rows) / (n - 2)
    np.fill_diagonal(found, 0)
    return found


def _alignment(a, b):
    """Debiased linear centred kernel alignment of two U-centred Gram matrices; NaN if one is zero.

    References: Kornblith et al., "Similarity of neural network representations revisited", ICML 2019; Song et al.,
    "Feature selection via dependence maximization", JMLR 13, 2012, equation 5 (unbiased HSIC).
    """
    both, one, other = np.sum(a * b), np.sum(a * a), np.sum(b * b)
    least = 1e-24 * max(one, other)
    return float(both / np.sqrt(one * other)) if min(one, other) > least else float("nan")
