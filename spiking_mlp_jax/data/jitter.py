"""Colour jitter and random erasing of one image; randomness comes only from the generator that is passed in."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def color_jitter(picture: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation in random order, by factors uniform in 1 - amount to 1 + amount.

    What torchvision's `ColorJitter(amount, amount, amount)` does; factors below 0 are 0.

    Args:
      picture: of mode "L" or "RGB".
      amount: at least 0.
      rng: source of randomness.
    """
    for chosen in rng.permutation(len(_ENHANCERS)):
        picture = _ENHANCERS[chosen](picture).enhance(rng.uniform(max(0.0, 1 - amount), 1 + amount))
    return picture


def random_erasing(
    image: np.ndarray,
    probability: float,
    mean: Sequence[float],
    std: Sequence[float],
    rng: np.random.Generator,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """With some probability, fill a random rectangle with noise, each value of each pixel by itself.

    timm's `RandomErasing` in mode "pixel": noise of mean 0 and standard deviation 1 after normalisation. Here it is
    drawn as pixels, so what would be darker than black or brighter than white is clipped.

    Args:
      image: uint8 [H, W, C], not changed.
      probability: of erasing.
      mean: of the pixels in [0, 1], per channel.
      std: likewise.
      rng: source of randomness.
      area: smallest and largest share of the image, uniform.
      ratio: smallest and largest height / width, log-uniform.

    Returns:
      uint8 [H, W, C]; the input itself where nothing is erased, as when ten rectangles have not fitted.

    References:
      Zhong et al., Random erasing data augmentation, https://arxiv.org/abs/1708.04896
    """
    if rng.random() >= probability:
        return image
    height, width, channels = image.shape
    for _ in range(10):
        share = height * width * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        tall, wide = round(math.sqrt(share * aspect)), round(math.sqrt(share / aspect))
        if 0 < tall < height and 0 < wide < width:
            top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
            noise = rng.standard_normal((tall, wide, channels), np.float32)
            noise = (noise * np.asarray(std, np.float32) + np.asarray(mean, np.float32)) * 255
            erased = image.copy()
            erased[top : top + tall, left : left + wide] = np.clip(np.rint(noise), 0, 255).astype(np.uint8)
            return erased
    return image
