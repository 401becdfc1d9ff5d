"""Tiny integer networks to write and read."""

import numpy as np

from spiking_mlp_jax.deploy.network import IntegerNet
from tests.support.random_integer import random_integer_net

TINY = dict(image_size=4, in_channels=1, num_classes=2, patch_size=1, depths=(1, 1), expansion=1, time_steps=2)
DATA = {"dataset": "d", "resize_mode": "pad", "eval_resize": 0, "mean": [0.25], "std": [0.5], "class_names": ["ä", "b"]}


def tiny_net(seed, **fields):
    return random_integer_net(seed, **{**TINY, "dim": 3, "data": DATA, **fields})


def equal(one: IntegerNet, other: IntegerNet) -> bool:
    return (
        one.description == other.description
        and one.arrays.keys() == other.arrays.keys()
        and all(x.dtype == other.arrays[name].dtype for name, x in one.arrays.items())
        and all(np.array_equal(x, other.arrays[name]) for name, x in one.arrays.items())
    )
