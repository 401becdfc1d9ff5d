"""Small networks that every test can afford."""

import numpy as np
from flax import nnx

from spiking_mlp_jax import ModelConfig, SpikingMLP


def tiny_config(**overrides) -> ModelConfig:
    """16 x 16 grey images, two stages, 3 classes, 2 steps."""
    base = dict(
        image_size=16,
        in_channels=1,
        num_classes=3,
        patch_size=4,
        dim=6,
        depths=(1, 2),
        expansion=2,
        time_steps=2,
    )
    return ModelConfig(**{**base, **overrides})


def tiny_model(seed=0, **overrides) -> SpikingMLP:
    """A fresh network of `tiny_config`."""
    return SpikingMLP(tiny_config(**overrides), rngs=nnx.Rngs(seed))


def tiny_batches(count, size):
    """Random batches for `tiny_config`: uint8 images [size, 16, 16, 1] and labels [size] of 3 classes."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        images = rng.integers(256, size=(size, 16, 16, 1), dtype=np.uint8)
        yield {"image": images, "label": rng.integers(3, size=size, dtype=np.int32)}
