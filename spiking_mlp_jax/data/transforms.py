"""Resizing and augmentation of one uint8 image [H, W, C].

All randomness comes from the `np.random.Generator` argument.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from spiking_mlp_jax.data.image import Encoded, decode_crop, decode_image, to_channels
from spiking_mlp_jax.data.randaugment import RandAugment
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.pixels import Pixels, check_resize

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclasses.dataclass(frozen=True)
class Augment:
    """Augmentation of a training image, in the order of the attributes.

    Attributes:
      resize_mode: "pad", "resize" or "resize_crop", see `fit_image`; unused with random_resized_crop.
      eval_resize: see `fit_image`.
      random_resized_crop: see the function of that name.
      crop_min_area: its smallest share of the image.
      crop_padding: zero padding in pixels on each side, before a random crop to the image size (0 = off).
      flip: mirror left to right with probability 1/2.
      rand_augment: RandAugment, or None.
      color_jitter: largest change of brightness, contrast and saturation, see `color_jitter` (0 = off).
      random_erasing: probability that a rectangle is replaced by noise.
      mean: of the pixels in [0, 1], per channel; the fill colour, and the mean of the noise.
      std: of the noise.
    """

    resize_mode: str = "pad"
    eval_resize: int = 0
    random_resized_crop: bool = False
    crop_min_area: float = 0.08
    crop_padding: int = 0
    flip: bool = False
    rand_augment: RandAugment | None = None
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)

    def __post_init__(self):
        if self.crop_padding < 0:
            raise InputError(f"crop_padding must be 0 (off) or a number of pixels, got {self.crop_padding}")
        check_resize(self.resize_mode, self.eval_resize)

    def __call__(
        self, image: np.ndarray | Encoded, image_size: int, in_channels: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Augment one image: uint8 [h, w, c] -> uint8 [image_size, image_size, in_channels].

        Raises:
          InputError: the image cannot be decoded.
        """
        if self.random_resized_crop:
            image = random_resized_crop(image, image_size, in_channels, rng, (self.crop_min_area, 1.0))
        else:
            if isinstance(image, Encoded):
                image = decode_image(*image)
            image = fit_image(image, image_size, in_channels, self.resize_mode, self.eval_resize)
        if self.crop_padding:
            image = random_crop(image, self.crop_padding, rng)
        if self.flip:
            image = random_flip(image, rng)
        if self.rand_augment is not None or self.color_jitter:
            picture = Image.fromarray(image[..., 0] if in_channels == 1 else image)
            if self.rand_augment is not None:
                fill = tuple(min(255, round(255 * value)) for value in self.mean)
                picture = self.rand_augment(picture, fill[0] if in_channels == 1 else fill, rng)
            if self.color_jitter:
                picture = color_jitter(picture, self.color_jitter, rng)
            image = np.asarray(picture).reshape(image.shape)
        if self.random_erasing:
            image = random_erasing(image, self.random_erasing, self.mean, self.std, rng)
        return image


def fit_image(
    image: np.ndarray, image_size: int, in_channels: int, resize_mode: str = "pad", eval_resize: int = 0
) -> np.ndarray:
    """Resize an image to the model's size, for evaluation and prediction.

    Args:
      image: uint8 [h, w] or [h, w, 1 | 3 | 4].
      image_size: side of the square result.
      in_channels: 1 or 3, see `to_channels`.
      resize_mode: "pad" centres the image on zeros, after shrinking a larger one to fit, at its aspect ratio; "resize"
        stretches it to the square; "resize_crop" scales the shorter side to `eval_resize` and crops the centre.
        Resizing is bicubic.
      eval_resize: for "resize_crop"; 0 means 8/7 of image_size (256 for 224).

    Returns:
      uint8 [image_size, image_size, in_channels].

    Raises:
      InputError: unknown mode, or not an image.
    """
    check_resize(resize_mode, eval_resize, image_size)
    image = to_channels(image, in_channels)
    height, width = image.shape[:2]
    if resize_mode == "resize":
        return resize(image, image_size, image_size)
    if resize_mode == "resize_crop":
        # What is far from the centre is cropped anyway; resizing a line of 1 x 5000 pixels first takes gigabytes.
        most = 16 * min(height, width)
        if max(height, width) > most:
            top, left = max(0, (height - most) // 2), max(0, (width - most) // 2)
            image = image[top : top + min(height, most), left : left + min(width, most)]
            height, width = image.shape[:2]
        shorter = eval_resize or round(image_size * 8 / 7)
        scale = shorter / min(height, width)
        # Rounded down, as in torchvision; the shorter side must be exact.
        image = resize(
            image,
            shorter if height <= width else int(height * scale),
            shorter if width <= height else int(width * scale),
        )
        return centre_crop(image, image_size)
    longer = max(height, width)
    if longer > image_size:
        scale = image_size / longer
        image = resize(image, max(1, round(height * scale)), max(1, round(width * scale)))
    return centre_pad(image, image_size)


def fitted(images: Iterable[np.ndarray], network: Any, pixels: Pixels) -> np.ndarray:
    """`fit_image` of each image, with a network's settings.

    Args:
      images: uint8 [h, w] or [h, w, 1 | 3 | 4] each.
      network: anything with `image_size` and `in_channels`: a `ModelConfig`, or a `Description`.
      pixels: its preprocessing.

    Returns:
      uint8 [N, image_size, image_size, in_channels].
    """
    settings = network.image_size, network.in_channels, pixels.resize_mode, pixels.eval_resize
    return np.stack([fit_image(image, *settings) for image in images])


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic resize of uint8 [h, w, 1 | 3] to [height, width, 1 | 3]; a no-op at that size."""
    if image.shape[:2] == (height, width):
        return image
    grey = image.shape[2] == 1
    picture = Image.fromarray(image[..., 0] if grey else image)
    resized = np.array(picture.resize((width, height), Image.Resampling.BICUBIC))
    return resized[..., None] if grey else resized


def centre_pad(image: np.ndarray, size: int) -> np.ndarray:
    """Zero-pad [h, w, C], h and w at most `size`, to [size, size, C]."""
    height, width, channels = image.shape
    if height == size and width == size:
        return image
    top, left = (size - height) // 2, (size - width) // 2
    padded = np.zeros((size, size, channels), image.dtype)
    padded[top : top + height, left : left + width] = image
    return padded


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Crop the centre [size, size, C] of [h, w, C], h and w at least `size`."""
    top, left = round((image.shape[0] - size) / 2), round((image.shape[1] - size) / 2)
    return image[top : top + size, left : left + size]


def random_crop(image: np.ndarray, padding: int, rng: np.random.Generator) -> np.ndarray:
    """Zero-pad [H, W, C] by `padding` on each side, and crop [H, W, C] at a uniformly random place.

    Args:
      image: uint8 [H, W, C].
      padding: pixels; the content moves by up to this much along each axis.
      rng: source of randomness.
    """
    down, right = int(rng.integers(-padding, padding + 1)), int(rng.integers(-padding, padding + 1))
    # A shift over zeros, without the padded copy.
    height, width = image.shape[:2]
    out = np.zeros_like(image)
    out[max(down, 0) : max(height + down, 0), max(right, 0) : max(width + right, 0)] = image[
        max(-down, 0) : max(height - down, 0), max(-right, 0) : max(width - right, 0)
    ]
    return out


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror [H, W, C] left to right with probability 1/2."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def random_resized_crop(
    image: np.ndarray | Encoded,
    size: int,
    in_channels: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
) -> np.ndarray:
    """Crop a rectangle of random area and aspect ratio, and resize it (bicubic) to a square.

    Its share of the image is uniform in `scale`, width / height log-uniform from 3/4 to 4/3. If ten rectangles do not
    fit, the largest centred one of such a ratio is taken.

    Args:
      image: uint8 [h, w, 1 | 3 | 4], or encoded; then only what is needed is decoded.
      size: side of the result.
      in_channels: 1 or 3.
      rng: source of randomness.
      scale: smallest and largest fraction of the area.

    Returns:
      uint8 [size, size, in_channels].

    References:
      Szegedy et al., Going deeper with convolutions, https://arxiv.org/abs/1409.4842
    """
    # Compiles on import, which prediction does not need.
    from spiking_mlp_jax.data.resample import resize_bicubic

    # Pillow's `box` argument would let pixels from outside the rectangle bleed in.
    if isinstance(image, Encoded):
        cut = decode_crop(image, lambda height, width: _random_box(height, width, rng, scale), size)
    else:
        top, left, height, width = _random_box(image.shape[0], image.shape[1], rng, scale)
        cut = image[top : top + height, left : left + width]
    return resize_bicubic(to_channels(cut, in_channels), size, size)


def _random_box(
    image_height: int,
    image_width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
) -> tuple[int, int, int, int]:
    ratio = 3 / 4, 4 / 3
    for _ in range(10):
        area = image_height * image_width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            top = int(rng.integers(image_height - height + 1))
            left = int(rng.integers(image_width - width + 1))
            return top, left, height, width
    aspect = min(max(image_width / image_height, ratio[0]), ratio[1])
    width = max(1, min(image_width, round(image_height * aspect)))
    height = max(1, min(image_height, round(image_width / aspect)))
    return (image_height - height) // 2, (image_width - width) // 2, height, width


def color_jitter(picture: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation in random order, by factors uniform in 1 - amount to 1 + amount.

    As torchvision's `ColorJitter(amount, amount, amount)`; factors below 0 are 0.

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
) -> np.ndarray:
    """Fill a random rectangle with independent noise, with some probability.

    Its share of the image is uniform from 0.02 to 1/3, height / width log-uniform from 0.3 to 1/0.3.

    timm's `RandomErasing` in mode "pixel": noise of mean 0 and standard deviation 1 after normalization. Here it is
    drawn as pixels, and clipped to 0 to 255.

    Args:
      image: uint8 [H, W, C], not modified.
      probability: of erasing.
      mean: of the pixels in [0, 1], per channel.
      std: likewise.
      rng: source of randomness.

    Returns:
      uint8 [H, W, C]; the input itself if nothing is erased, also if ten rectangles do not fit.

    References:
      Zhong et al., Random erasing data augmentation, https://arxiv.org/abs/1708.04896
    """
    if rng.random() >= probability:
        return image
    height, width, channels = image.shape
    for _ in range(10):
        share = height * width * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        tall, wide = round(math.sqrt(share * aspect)), round(math.sqrt(share / aspect))
        if 0 < tall < height and 0 < wide < width:
            top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
            noise = rng.standard_normal((tall, wide, channels), np.float32)
            noise = (noise * np.asarray(std, np.float32) + np.asarray(mean, np.float32)) * 255
            erased = image.copy()
            erased[top : top + tall, left : left + wide] = np.clip(np.rint(noise), 0, 255).astype(np.uint8)
            return erased
    return image
