"""Tiny data sets of bright and dark images, on disk as IDX files, which a tiny network learns in a few steps."""

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache


def write_shades(folder, train, test, side, classes=3, step=100):
    """Writes `train` and `test` square images; class k is about k * step bright, with noise of 40."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % classes
        images = rng.integers(40, size=(count, side, side)) + step * labels[:, None, None]
        _write_idx(folder / f"{prefix}-images-idx3-ubyte", images)
        _write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels)


def forget_compiled():
    """Ends the use of a cache of compiled programs, which a run began, before its folder goes."""
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def _write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())
