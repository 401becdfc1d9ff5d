"""Mixup and cutmix on the device: images are blended with their neighbours in the batch, and so are their labels.

Images 2i and 2i + 1 are partners. So a device with an even number of images never needs another's, and the result does
not depend on the number of devices.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from spiking_mlp_jax.train.config import Config

# (number of the step, normalised images [B, H, W, C], labels [B]) -> blended images, probabilities [B, K]
Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
STREAM = 0x6D6978  # separates these random numbers from others of the same seed


def mix_weights(
    key: PRNGKeyArray,
    height: int,
    width: int,
    *,
    mixup: float,
    cutmix: float,
    probability: float = 1.0,
    switch: float = 0.5,
) -> tuple[Float[Array, "H W"], Float[Array, ""]]:
    """Draws how a batch is blended, as timm's `Mixup` in its mode "batch".

    Args:
        key: source of randomness.
        height, width: of the images.
        mixup: alpha of mixup's Beta(alpha, alpha); 0: off.
        cutmix: alpha of cutmix's; 0: off.
        probability: that the batch is mixed at all.
        switch: probability of cutmix instead of mixup, where both are on.

    Returns:
        each pixel's share of the image itself (the rest is its partner's), and the label's share. Mixup has the same
        number everywhere; cutmix has 0 in a rectangle, which may be cut off by the border, and 1 outside, and its
        label's share is the area outside.

    References:
        Zhang et al., mixup, https://arxiv.org/abs/1710.09412; Yun et al., CutMix, https://arxiv.org/abs/1905.04899
    """
    keys = jax.random.split(key, 6)
    blend = jax.random.beta(keys[0], mixup or 1.0, mixup or 1.0)
    outside = jax.random.beta(keys[1], cutmix or 1.0, cutmix or 1.0)
    # A rectangle of the images' proportions around a uniformly random pixel.
    side = jnp.sqrt(1 - outside)
    rows = _inside(keys[2], height, (height * side).astype(jnp.int32))
    columns = _inside(keys[3], width, (width * side).astype(jnp.int32))
    cut = 1.0 - (rows[:, None] & columns[None, :])
    share = switch if mixup and cutmix else float(bool(cutmix))
    weights = jnp.where(jax.random.uniform(keys[4]) < share, cut, blend)
    weights = jnp.where(jax.random.uniform(keys[5]) < probability, weights, 1.0)
    return weights, weights.mean()


def _inside(key, length, size):
    centre = jax.random.randint(key, (), 0, length)
    place = jnp.arange(length)
    return (place >= centre - size // 2) & (place < centre + size // 2)


def partners(x: Array) -> Array:
    """Each entry's partner: entries 2i and 2i + 1 of the leading axis are swapped."""
    pairs = x.reshape(x.shape[0] // 2, 2, *x.shape[1:])
    return pairs[:, ::-1].reshape(x.shape)


def mix_batch(
    images: Float[Array, "B H W C"],
    labels: Int[Array, " B"],
    weights: Float[Array, "H W"],
    share: Float[Array, ""],
    num_classes: int,
) -> tuple[Float[Array, "B H W C"], Float[Array, "B K"]]:
    """Blends neighbours.

    Args:
        images: normalised; B is even.
        labels: class numbers.
        weights: each pixel's share of the image itself.
        share: the label's.
        num_classes: K.

    Returns:
        blended images of the same dtype, and class probabilities.
    """
    chex.assert_is_divisible(images.shape[0], 2)
    weights = weights[None, :, :, None].astype(images.dtype)
    mixed = images * weights + partners(images) * (1 - weights)
    hot = jax.nn.one_hot(labels, num_classes, dtype=share.dtype)
    return mixed, hot * share + partners(hot) * (1 - share)


def make_mix(config: Config) -> Mix | None:
    """The blending of an experiment, None where mixup and cutmix are both off.

    The random numbers of a step depend only on the seed and the step.
    """
    if not (config.mixup or config.cutmix):
        return None

    def mix(step, images, labels):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), STREAM), step)
        weights, share = mix_weights(
            key,
            *images.shape[1:3],
            mixup=config.mixup,
            cutmix=config.cutmix,
            probability=config.mix_probability,
            switch=config.mix_switch,
        )
        return mix_batch(images, labels, weights, share, config.num_classes)

    return mix
