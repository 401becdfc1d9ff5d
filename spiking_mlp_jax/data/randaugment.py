"""RandAugment in timm's variant: two random operations, each applied with probability 1/2.

References:
  Cubuk et al., RandAugment, https://arxiv.org/abs/1909.13719
  The operations, their ranges and the notation are those of timm's `rand_augment_transform` with inc1
  (https://github.com/huggingface/pytorch-image-models), which the official recipe used.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from spiking_mlp_jax.errors import InputError

Fill = tuple[int, ...] | int
# (image, strength in [0, 1], -1 or 1, fill colour) -> image of the same size
Operation = Callable[[Image.Image, float, int, Fill], Image.Image]

TOP = 10.0  # largest magnitude


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Random operations on an image.

    Attributes:
      magnitude: mean strength of an operation, 0 to 10.
      std: standard deviation of the strength, which is then clipped to 0 to 10.
      layers: operations drawn per image, with replacement.
      probability: of applying a drawn operation.
    """

    magnitude: float = 9.0
    std: float = 0.5
    layers: int = 2
    probability: float = 0.5

    def __call__(self, picture: Image.Image, fill: Fill, rng: np.random.Generator) -> Image.Image:
        """Augment an image of mode "L" or "RGB"; `fill` is the colour of pixels from outside."""
        operations = list(OPERATIONS.values())
        for chosen in rng.integers(len(operations), size=self.layers):
            if rng.random() >= self.probability:
                continue
            strength = min(max(rng.normal(self.magnitude, self.std), 0.0), TOP) / TOP
            sign = -1 if rng.random() < 0.5 else 1
            picture = operations[chosen](picture, strength, sign, fill)
        return picture


def parse_rand_augment(notation: str) -> RandAugment | None:
    """The augmentation that timm's notation describes.

    Args:
      notation: "rand" and parts joined by "-": m9 (magnitude), n2 (operations drawn), mstd0.5 (standard deviation),
        inc1 (required: all operations here grow stronger with the magnitude); "" for none.

    Returns:
      None for "".

    Raises:
      InputError: invalid notation.
    """
    if not notation:
        return None
    notation = " ".join(notation.split())
    first, *parts = notation.split("-")
    found = {}
    for part in parts:
        match = re.fullmatch(r"(mstd|m|n|inc)(\d+(?:\.\d+)?)", part)
        if match is None:
            raise InputError(
                f'rand_augment "{notation}" has an unknown part "{part}": write it as rand-m9-mstd0.5-inc1'
            )
        if match[1] in found:
            raise InputError(
                f'rand_augment "{notation}" has more than one {match[1]}: write it as rand-m9-mstd0.5-inc1'
            )
        found[match[1]] = float(match[2])
    layers = found.get("n", 2.0)
    if first != "rand" or found.get("inc") != 1 or found.get("m", TOP) > TOP or layers < 1 or layers % 1:
        raise InputError(
            f'rand_augment is "{notation}", but it must be rand, m (at most 10), n (a whole number), mstd and inc1: '
            "write it as rand-m9-mstd0.5-inc1"
        )
    return RandAugment(found.get("m", TOP), found.get("mstd", 0.0), int(layers))


def _posterize(picture, strength, sign, fill):
    # ImageOps.posterize rejects 0 bits, which full strength needs.
    mask = 0xFF & (0xFF << (4 + int(strength * 4)))
    return picture.point([value & mask for value in range(256)] * len(picture.getbands()))


def _solarize_add(picture, strength, sign, fill):
    add = int(strength * 110)
    table = [min(255, value + add) if value < 128 else value for value in range(256)]
    return picture.point(table * len(picture.getbands()))


def _enhanced(kind) -> Operation:
    return lambda picture, strength, sign, fill: kind(picture).enhance(max(0.1, 1 + sign * strength * 0.9))


def _affine(matrix: Callable[[float, Image.Image], tuple[float, ...]]) -> Operation:
    """The operation with this matrix, of the signed strength and the image."""
    affine, bicubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
    return lambda picture, strength, sign, fill: picture.transform(
        picture.size, affine, matrix(sign * strength, picture), bicubic, fillcolor=fill
    )


# In timm's order.
OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda picture, strength, sign, fill: ImageOps.autocontrast(picture),
    "equalize": lambda picture, strength, sign, fill: ImageOps.equalize(picture),
    "invert": lambda picture, strength, sign, fill: ImageOps.invert(picture),
    "rotate": lambda picture, strength, sign, fill: picture.rotate(
        sign * strength * 30, Image.Resampling.BICUBIC, fillcolor=fill
    ),
    "posterize": _posterize,
    "solarize": lambda picture, strength, sign, fill: ImageOps.solarize(picture, 256 - int(strength * 256)),
    "solarize_add": _solarize_add,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda by, picture: (1, by * 0.3, 0, 0, 1, 0)),
    "shear_y": _affine(lambda by, picture: (1, 0, 0, by * 0.3, 1, 0)),
    "translate_x": _affine(lambda by, picture: (1, 0, by * 0.45 * picture.width, 0, 1, 0)),
    "translate_y": _affine(lambda by, picture: (1, 0, 0, 0, 1, by * 0.45 * picture.height)),
}
