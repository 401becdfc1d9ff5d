"""Images in, class names out, for trained and for compiled networks; the latter without JAX."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spiking_mlp_jax.data.image import pillow_array, read_image
from spiking_mlp_jax.data.sources import Source, check_classes, open_source
from spiking_mlp_jax.data.transforms import fitted
from spiking_mlp_jax.deploy.artifact import is_compiled
from spiking_mlp_jax.deploy.engine import Engine
from spiking_mlp_jax.deploy.network import Description, IntegerNet
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.pixels import Pixels, normalize
from spiking_mlp_jax.utils.paths import user_path

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from PIL.Image import Image

    from spiking_mlp_jax.models.config import ModelConfig
    from spiking_mlp_jax.models.spiking_mlp import SpikingMLP

BATCH = 32


class Guess(NamedTuple):
    """A class that an image may show.

    Attributes:
        name: of the class, its number as text where names are not known.
        label: the class's number.
        score: softmax of the logits averaged over the time steps, from 0 to 1.
        steps: time steps that the image took.
    """

    name: str
    label: int
    score: float
    steps: int


def classify(
    network: SpikingMLP | Engine | IntegerNet | str | os.PathLike[str],
    images: Sequence[str | os.PathLike[str] | Image | np.ndarray],
    top: int = 5,
    *,
    steps: int | None = None,
    margin: float | None = None,
) -> list[list[Guess]]:
    """The best classes of each image.

    Images of any size, gray or color, are resized as the network's test images were.

    Args:
        network: a trained network with `pixels`, as `from_pretrained` returns it, or its name or folder; or a compiled
            one: the path of a .smlp file, an `IntegerNet` or an `Engine`. Compiled ones need no JAX.
        images: paths, Pillow images, or uint8 arrays [H, W] or [H, W, 1 | 3 | 4] of pixels from 0 to 255. EXIF
            rotation is applied, transparency is laid over black.
        top: the number of classes returned per image.
        steps: compiled networks: time steps to run, 1 to T; None for T.
        margin: compiled networks: stop an image as soon as its best class's mean logit leads by this much.

    Returns:
        the guesses for each image, best first.

    Raises:
        InputError: an image cannot be read or is not an image; an argument is out of range; the network does not know
            how images become inputs, or produces NaN or inf.

    Examples:
        >>> import numpy as np
        >>> from spiking_mlp_jax import from_pretrained
        >>> model = from_pretrained("fashion_mnist")
        >>> (guesses,) = classify(model, [np.zeros((28, 28), np.uint8)], top=1)
        >>> guesses[0].label == model.pixels.class_names.index(guesses[0].name)
        True
    """
    network = open_network(network)
    if isinstance(images, str | os.PathLike) or not isinstance(images, Sequence):
        raise InputError("images must be a list of paths, Pillow images or uint8 arrays: put a single one in a list")
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise InputError(f"top must be a whole number of at least 1, got {top!r}")
    pixels = pixels_of(network)
    if not images:
        return []
    inputs = fitted(map(_array, images), config_of(network), pixels)
    logits, taken = predict_logits(network, inputs, steps, margin)
    if not np.all(np.isfinite(logits)):
        raise InputError("the network produces NaN or inf logits; retrain with a lower learning rate")
    scores = np.exp(logits - logits.max(1, keepdims=True))
    scores /= scores.sum(1, keepdims=True)
    found = []
    for row, count in zip(scores, taken.tolist(), strict=True):
        best = np.argsort(-row, kind="stable")[:top].tolist()
        found.append([Guess(str((pixels.class_names or range(len(row)))[c]), c, float(row[c]), count) for c in best])
    return found


def open_network(network: SpikingMLP | Engine | IntegerNet | str | os.PathLike[str]) -> SpikingMLP | Engine:
    """A network to run: an engine for a compiled network, else the trained model.

    Args:
        network: either of these, an `IntegerNet`, a .smlp file, a workdir, a weights folder, or the name of a network
            in the package.

    Raises:
        InputError: there is no such network, its files are damaged, or it is something else.
    """
    if isinstance(network, Engine):
        return network
    if isinstance(network, IntegerNet):
        return Engine(network)
    if isinstance(network, str | os.PathLike) and is_compiled(network):
        return Engine(user_path(network))
    from spiking_mlp_jax.data.trained import open_trained
    from spiking_mlp_jax.models.spiking_mlp import SpikingMLP

    if isinstance(network, SpikingMLP):
        return network
    if isinstance(network, str | os.PathLike):
        return open_trained(network).model
    raise InputError(
        f"network is a {type(network).__name__}: give a SpikingMLP, a compiled network, or the name or path of one"
    )


def config_of(network: SpikingMLP | Engine) -> ModelConfig | Description:
    """The sizes of a network."""
    return network.description if isinstance(network, Engine) else network.config


def pixels_of(network: SpikingMLP | Engine | IntegerNet) -> Pixels:
    """How images become a network's inputs.

    Raises:
        InputError: it does not know.
    """
    if isinstance(network, Engine | IntegerNet):
        if network.description.data:
            return Pixels.from_data(network.description.data)
        raise InputError(
            "the compiled network does not know how images become inputs: compile weights that have it, "
            "or pass data to quantize"
        )
    if network.pixels is None:
        raise InputError(
            "the model does not know how images become inputs: set model.pixels = Pixels(mean, std), or load weights "
            'whose config.json has "data"'
        )
    return network.pixels


def test_images(
    network: Engine | IntegerNet,
    dataset: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    against: SpikingMLP | str | os.PathLike[str] | None = None,
) -> Source:
    """The test split of the dataset that a compiled network was trained on, or of another one.

    Args:
        network: the compiled network.
        dataset: None: the one that it was trained on.
        data_dir: its folder; None, with `dataset` None: where the training run of `against` found it.
        against: a trained network, or where it is.

    Raises:
        InputError: there is no such dataset, or it has another number of classes.
    """
    c = network.description
    pixels_of(network)  # refuses a network without "data"
    if dataset is None and data_dir is None and against is not None:
        from spiking_mlp_jax.models import folder  # compiled networks run without JAX

        place = folder.find(against) if isinstance(against, str | os.PathLike) else against.loaded_from
        data_dir = None if place is None else folder.data_dir(Path(place))
    known: str = dataset or c.data["dataset"]
    return check_classes(open_source(known, "test", data_dir), c.num_classes, "the compiled network", known)


def predict_logits(
    network: SpikingMLP | Engine, images: UInt8[np.ndarray, "N H W C"], steps: int | None = None, margin=None
) -> tuple[Float[np.ndarray, "N K"], Int[np.ndarray, "N"]]:
    """Logits averaged over the time steps, of images of the network's size, and the steps that each image took.

    Args:
        network: from `open_network`.
        images: raw pixels.
        steps: see `classify`.
        margin: see `classify`.

    Raises:
        InputError: steps or margin out of range, or given for a network that is not compiled.
    """
    if isinstance(network, Engine):
        if margin is not None:
            scores, taken = network.predict_early(images, margin, steps=steps)
        else:
            scores = network.predict(images, steps)
            taken = np.full(len(images), network.description.time_steps if steps is None else steps)
        return scores * network.score_scale / taken[:, None], taken
    for name, value in (("steps", steps), ("margin", margin)):
        if value is not None:
            raise InputError(f"{name} needs a compiled network (.smlp)")
    import jax
    from flax import nnx

    graphdef, variables = nnx.split(network)
    pixels = pixels_of(network)
    # Chunks of one size: one compilation, bounded memory.
    size = min(len(images), BATCH)
    padded = np.concatenate([images, np.zeros((-len(images) % size, *images.shape[1:]), images.dtype)])
    chunks = [padded[i : i + size] for i in range(0, len(padded), size)]
    parts = [np.asarray(_run()(graphdef, variables, jax.device_put(x), pixels.mean, pixels.std)) for x in chunks]
    logits = np.concatenate(parts)[: len(images)].astype(np.float64)
    return logits, np.full(len(images), network.config.time_steps)


@functools.cache
def _run():
    import jax
    from flax import nnx

    from spiking_mlp_jax.models.spiking_mlp import mean_logits

    @functools.partial(jax.jit, static_argnames=("graphdef", "mean", "std"))
    def run(graphdef, variables, images, mean, std):
        model: Any = nnx.merge(graphdef, variables, copy=True)
        model.eval()
        return mean_logits(model(normalize(images, mean, std)))

    return run


def _array(image) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return image
    if isinstance(image, str | os.PathLike):
        return read_image(user_path(image))
    return pillow_array(image)
