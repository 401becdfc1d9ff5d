"""How images become inputs: resize modes, and bytes to floats (on the device, so that only bytes are transferred)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from spiking_mlp_jax.errors import InputError

if TYPE_CHECKING:  # compiled networks run without JAX
    import jax

Array = TypeVar("Array", np.ndarray, "jax.Array")
RESIZE_MODES = ("pad", "resize", "resize_crop")


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How images become a network's inputs, and the names of its classes.

    Attributes:
        mean: of pixels in [0, 1]; the input is (pixel - mean) / std, channel by channel.
        std: see mean.
        resize_mode: how images are brought to the network's size, see `data.transforms.fit_image`.
        eval_resize: see there.
        class_names: one per class; empty where they are not known.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_mode: str = "pad"
    eval_resize: int = 0
    class_names: tuple[str, ...] = ()

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Pixels:
        """What the "data" of a weights folder or a compiled network says."""
        statistics = tuple(data["mean"]), tuple(data["std"])
        return cls(*statistics, data["resize_mode"], data["eval_resize"], tuple(data.get("class_names", ())))

    def to_data(self, num_classes: int, dataset: str = "folder") -> dict[str, Any]:
        """The "data" of a weights folder or a compiled network; classes without names are numbered."""
        names = list(self.class_names) or list(map(str, range(num_classes)))
        lists = {"mean": list(self.mean), "std": list(self.std), "class_names": names, "dataset": dataset}
        return dataclasses.asdict(self) | lists


def check_resize(resize_mode: str, eval_resize: int, image_size: int | None = None) -> None:
    """Raise `InputError` unless `data.transforms.fit_image` accepts these settings."""
    if resize_mode not in RESIZE_MODES:
        raise InputError(f'resize_mode must be one of {", ".join(RESIZE_MODES)}, got "{resize_mode}".')
    if eval_resize < 0:
        raise InputError(f"eval_resize must be 0 (8/7 of image_size) or a number of pixels, got {eval_resize}.")
    if resize_mode == "resize_crop" and image_size is not None and 0 < eval_resize < image_size:
        raise InputError(f"eval_resize must be 0 or at least image_size ({image_size}), got {eval_resize}.")


def check_statistics(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Raise `InputError` unless mean and std hold one finite number per channel and std is positive."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise InputError(f"{name} has {len(values)} values for {channels} channels: give one per channel.")
        if not np.all(np.isfinite(values)):
            raise InputError(f"{name} must hold finite numbers, got {tuple(values)}.")
    if min(std) <= 0:
        raise InputError(f"std must be positive for each channel, got {tuple(std)}.")


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
    shape = (1,) * (images.ndim - 1) + (-1,)  # of the same rank, also where JAX is set to refuse others
    return (pixels - np.asarray(mean, np.float32).reshape(shape)) / np.asarray(std, np.float32).reshape(shape)
