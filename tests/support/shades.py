"""Tiny data sets of bright and dark images, on disk as IDX files, which a tiny network learns in a few steps."""

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from tests.support.small_sources import idx_bytes


def write_shades(folder, train, test, side, classes=3, step=100):
    """Writes `train` and `test` square images; class k is about k * step bright, with noise of 40."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % classes
        images = rng.integers(40, size=(count, side, side)) + step * labels[:, None, None]
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


def forget_compiled():
    """Ends the use of a cache of compiled programs, which a run began, before its folder goes."""
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
