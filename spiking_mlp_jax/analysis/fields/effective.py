"""Effective receptive fields: gradients of a unit's response with respect to the pixels, through the surrogates.

For each image and unit, g is the gradient of the unit's response (its spikes or potential, summed over the time steps)
with respect to the normalised pixels. A spike has no derivative, so g uses the surrogate that trained the network: not
a slope that one could measure. Averaged over images are |g|, g^2, and g itself, whose signs show the preferred pattern.

References: Luo et al., "Understanding the effective receptive field in deep convolutional neural networks", NeurIPS
2016, arXiv 1701.04128.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from spiking_mlp_jax.analysis.fields.responses import Units, evaluation_copy, respond
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP


@dataclasses.dataclass(frozen=True)
class EffectiveField:
    """Mean gradients of some units.

    Attributes:
        units: the differentiated units.
        images: number of images.
        signed: mean of g, response per unit of normalised pixel.
        magnitude: mean of |g|.
        energy: mean of g^2.
    """

    units: Units
    images: int
    signed: Float[np.ndarray, "U H W C"]
    magnitude: Float[np.ndarray, "U H W C"]
    energy: Float[np.ndarray, "U H W C"]

    def map(self) -> Float[np.ndarray, "H W"]:
        """Mean of g^2 over the units, summed over the image's channels: the field of the layer's token."""
        return self.energy.mean(0).sum(-1)


def effective_field(model: SpikingMLP, units: Units, batches: Iterable[Float[np.ndarray, "B H W C"]]) -> EffectiveField:
    """Averages the gradients of some units over images.

    Args:
        model: used in evaluation mode; it is not changed.
        units: from `choose_units`.
        batches: normalised pixels; batches of one size are compiled once.

    Raises:
        InputError: there are no images.
    """
    graphdef, variables = nnx.split(evaluation_copy(model))
    count, total = 0, None
    for images in batches:
        parts = [np.asarray(part, np.float64) for part in _sums(graphdef, units, variables, jnp.asarray(images))]
        total = parts if total is None else [old + new for old, new in zip(total, parts, strict=True)]
        count += len(images)
    if total is None:
        raise InputError("there are no images to average gradients over: give at least one")
    return EffectiveField(units, count, *(part / count for part in total))


@partial(jax.jit, static_argnums=(0, 1))
def _sums(graphdef, units, variables, images):
    # In evaluation mode images are independent, so the gradient of a sum over them has each one's own.
    answers, pull_back = jax.vjp(lambda x: respond(graphdef, (units,), variables, x)[0], images)

    def of_unit(one_hot):
        (g,) = pull_back(jnp.broadcast_to(one_hot, (len(images), len(one_hot))))
        return g.sum(0), jnp.abs(g).sum(0), (g * g).sum(0)

    return jax.lax.map(of_unit, jnp.eye(len(units.channels), dtype=answers.dtype))


@dataclasses.dataclass(frozen=True)
class FieldSize:
    """Size of a map, in pixels.

    Attributes:
        centre: (row, column) of its centre of mass.
        spread: standard deviations along its longest and its shortest axis.
        half: radius of the circle around the centre of mass that contains half of it.
        ninety: likewise 90 %.
        equal: participation ratio (sum m)^2 / sum m^2 as a share of all pixels: 1 for a uniform map, 1 / (H W) for a
            single pixel.
    """

    centre: tuple[float, float]
    spread: tuple[float, float]
    half: float
    ninety: float
    equal: float


def field_size(field: Float[np.ndarray, "H W"]) -> FieldSize:
    """Size of a map that is nowhere negative, e.g. `EffectiveField.map()`.

    Raises:
        InputError: not such a map, or one that is zero everywhere.
    """
    field = np.asarray(field, np.float64)
    if field.ndim != 2 or not np.all(np.isfinite(field)) or np.any(field < 0):
        raise InputError(f"a size needs a map [H, W] of numbers from 0 on, but this one has the shape {field.shape}")
    total = field.sum()
    if not total > 0:
        raise InputError("a map that is zero everywhere has no size: no pixel reaches the unit, or it never responds")
    places = np.indices(field.shape).reshape(2, -1).T.astype(float)
    weights = field.ravel() / total
    centre = weights @ places
    apart = places - centre
    narrow, wide = np.sqrt(np.maximum(np.linalg.eigvalsh((apart * weights[:, None]).T @ apart), 0))
    distance = np.hypot(*apart.T)
    order = np.argsort(distance, kind="stable")
    held = np.cumsum(weights[order])
    # Rounding may leave the sum slightly below 1, but never below 0.9.
    half, ninety = (float(distance[order][np.searchsorted(held, share - 1e-12)]) for share in (0.5, 0.9))
    equal = float(1 / np.sum(weights**2) / field.size)
    return FieldSize((float(centre[0]), float(centre[1])), (float(wide), float(narrow)), half, ninety, equal)
