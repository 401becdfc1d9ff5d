"""Pictures in, class names out: what `spiking-mlp predict` and notebooks use."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from spiking_mlp_jax.data.image import picture_array, read_image
from spiking_mlp_jax.data.transforms import fit_image
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP, mean_logits

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from PIL.Image import Image

BATCH = 32


class Guess(NamedTuple):
    """A class that a picture may show.

    Attributes:
        name: of the class, its number as text where names are not known.
        label: the class's number.
        score: softmax of the logits averaged over the time steps, from 0 to 1.
    """

    name: str
    label: int
    score: float


def classify(
    model: SpikingMLP, pictures: Sequence[str | os.PathLike[str] | Image | np.ndarray], top: int = 5
) -> list[list[Guess]]:
    """The best classes of each picture.

    Pictures of any size, grey or colour, are brought to the network's size as its test images were (`model.pixels`).

    Args:
        model: a trained network that carries its preprocessing, as those of `SpikingMLP.from_pretrained` do.
        pictures: paths, Pillow images, or uint8 arrays [H, W] or [H, W, 1 | 3 | 4] of pixels from 0 to 255. The
            camera's EXIF rotation is applied, transparency is laid over black.
        top: how many classes are given.

    Returns:
        for each picture its guesses, best first.

    Raises:
        InputError: a picture cannot be read or is none, top is below 1, the model does not know how pictures become its
            inputs, or it gives scores that are no numbers.

    Examples:
        >>> import numpy as np
        >>> model = SpikingMLP.from_pretrained("fashion_mnist")
        >>> (guesses,) = classify(model, [np.zeros((28, 28), np.uint8)], top=1)
        >>> guesses[0].label == model.pixels.class_names.index(guesses[0].name)
        True
    """
    if not isinstance(model, SpikingMLP):
        raise InputError(
            f"model is a {type(model).__name__}: give a network, as SpikingMLP.from_pretrained or create_model do"
        )
    if isinstance(pictures, str | os.PathLike) or not isinstance(pictures, Sequence):
        raise InputError(
            "pictures must be a list of paths, Pillow images or uint8 arrays: put a single one into a list"
        )
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise InputError(f"top must be a whole number of at least 1, but it is {top!r}")
    pixels = model.pixels
    if pixels is None:
        raise InputError(
            "the model does not say how pictures become its inputs: set model.pixels = Pixels(mean, std), or load "
            'weights whose config.json has "data"'
        )
    if not pictures:
        return []
    c = model.config
    fitting = c.image_size, c.in_channels, pixels.resize_mode, pixels.eval_resize
    images = np.stack([fit_image(_array(picture), *fitting) for picture in pictures])
    scores = class_scores(model, images, pixels.mean, pixels.std)
    return guesses(scores, pixels.class_names, top)


def guesses(scores: Float[np.ndarray, "N K"], class_names: Sequence[str], top: int) -> list[list[Guess]]:
    """The best `top` classes of each row of scores, best first.

    Raises:
        InputError: scores that are not finite.
    """
    if not np.all(np.isfinite(scores)):
        raise InputError("the network gives scores that are no numbers: train it again with a lower rate")
    found = []
    for row in scores:
        best = np.argsort(-row, kind="stable")[:top].tolist()
        found.append([Guess(str(class_names[c] if class_names else c), c, float(row[c])) for c in best])
    return found


def class_scores(
    model: SpikingMLP, images: UInt8[np.ndarray, "N H W C"], mean: Sequence[float], std: Sequence[float]
) -> Float[np.ndarray, "N K"]:
    """Softmax of the time-mean logits of images of the network's size, in evaluation mode."""
    graphdef, variables = nnx.split(model)
    statistics = tuple(mean), tuple(std)
    # Chunks of one size, so that there is one compilation and a bounded need of memory.
    size = min(len(images), BATCH)
    padded = np.concatenate([images, np.zeros((-len(images) % size, *images.shape[1:]), images.dtype)])
    parts = [
        np.asarray(_softmax(graphdef, variables, padded[i : i + size], *statistics))
        for i in range(0, len(padded), size)
    ]
    return np.concatenate(parts)[: len(images)]


@functools.partial(jax.jit, static_argnames=("graphdef", "mean", "std"))
def _softmax(graphdef, variables, images, mean, std):
    model = nnx.merge(graphdef, variables, copy=True)
    model.eval()
    logits: Any = model(normalize(images, mean, std))
    return jax.nn.softmax(mean_logits(logits))


def _array(picture) -> np.ndarray:
    if isinstance(picture, np.ndarray):
        return picture
    if isinstance(picture, str | os.PathLike):
        return read_image(picture)
    return picture_array(picture)
