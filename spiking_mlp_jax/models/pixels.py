"""Pixel bytes to the floats a model takes; done on the device inside the step, so that only bytes travel."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np

from spiking_mlp_jax.errors import InputError

Array = TypeVar("Array", np.ndarray, jax.Array)


def check_statistics(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Raise `InputError` unless mean and std hold one finite number per channel and std is positive."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise InputError(f"{name} has {len(values)} values for {channels} channels: give one for each channel.")
        if not np.all(np.isfinite(values)):
            raise InputError(f"{name} is {tuple(values)}, but must hold finite numbers.")
    if min(std) <= 0:
        raise InputError(f"std is {tuple(std)}, but must be positive for each channel.")


def normalize(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """(images / 255 - mean) / std, channel by channel.

    Args:
      images: uint8 [..., C], NumPy or JAX.
      mean: C numbers, on the scale where white is 1.
      std: C positive numbers on that scale.

    Returns:
      float32 [..., C], NumPy or JAX as `images` is.

    Raises:
      InputError: mean and std do not fit the channels.

    Examples:
      >>> normalize(np.array([[0], [255]], np.uint8), [0.5], [0.25]).tolist()
      [[-2.0], [2.0]]
    """
    check_statistics(mean, std, images.shape[-1])
    pixels = images.astype(np.float32) / np.float32(255)
    return (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
