"""Units of a layer, the stimuli they are shown and their responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from spiking_mlp_jax.analysis.fields.spike_triggered import Moments
from spiking_mlp_jax.data.damaged import next_decodable
from spiking_mlp_jax.data.sources import Source
from spiking_mlp_jax.data.transforms import fit_image
from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.pixels import normalize
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.models.topology import intermediate_shapes


@dataclasses.dataclass(frozen=True)
class Units:
    """Some channels of a layer at one token.

    Attributes:
        layer: such as "stage0.block1.channel.spikes".
        token: (row, column) on the layer's grid.
        channels: their numbers.
        grid: tokens along each side of the layer's grid.
        patch: pixels along each side of what a token stands for.
    """

    layer: str
    token: tuple[int, int]
    channels: tuple[int, ...]
    grid: int
    patch: int

    @property
    def centre(self) -> tuple[float, float]:
        """(row, column) of the middle of the token, in pixels; pixel 0 has its middle at 0."""
        row, column = ((place + 0.5) * self.patch - 0.5 for place in self.token)
        return row, column


def choose_units(
    config: ModelConfig,
    layer: str,
    token: tuple[int, int] | None = None,
    channels: Sequence[int] | int | None = None,
) -> Units:
    """Units of a layer.

    Args:
        config: of the network.
        layer: name of an intermediate.
        token: (row, column); None takes the middle one, (side // 2, side // 2).
        channels: their numbers, or how many, which are then spread evenly; None takes all.

    Raises:
        InputError: the network has no such layer, token or channel.
    """
    shapes = intermediate_shapes(config)
    if layer not in shapes:
        raise InputError(f'the network has no layer "{layer}": {nearest(layer, shapes)}')
    _, height, width, count = shapes[layer]
    token = (height // 2, width // 2) if token is None else (int(token[0]), int(token[1]))
    if not (0 <= token[0] < height and 0 <= token[1] < width):
        raise InputError(f"{layer} has {height} x {width} tokens, counted from 0, and so no token {token}")
    if channels is None:
        channels = count
    if isinstance(channels, int):
        if channels < 1:
            raise InputError(f"at least one channel of {layer} is needed, but {channels} are asked for")
        spread = np.linspace(0, count - 1, min(channels, count)).round()
        chosen = tuple(int(channel) for channel in spread)
    else:
        chosen = tuple(int(channel) for channel in channels)
    for channel in chosen:
        if not 0 <= channel < count:
            raise InputError(f"{layer} has {count} channels, counted from 0, and so no channel {channel}")
    if not chosen:
        raise InputError(f"at least one channel of {layer} is needed, but none is named")
    return Units(layer, token, chosen, height, config.image_size // height)


def default_layers(config: ModelConfig) -> list[str]:
    """The spikes that leave each stage: those of its last block's channel mixing."""
    return [f"stage{i}.block{depth - 1}.channel.spikes" for i, depth in enumerate(config.depths)]


def responses(
    model: SpikingMLP, units: Sequence[Units]
) -> Callable[[Float[Array, "B H W C"]], list[Float[Array, "B U"]]]:
    """A function from normalised images to what the units answer.

    Args:
        model: is used in evaluation mode, so that images do not influence each other; it is not changed.
        units: one or more groups of units.

    Returns:
        function of images, differentiable through the surrogates: for each group the sum over the time steps of its
        units' values, spikes or potentials [B, channels]. It can be jitted.
    """
    answer, variables = separate_responses(model, units)
    return lambda images: answer(variables, images)


def separate_responses(
    model: SpikingMLP, units: Sequence[Units]
) -> tuple[Callable[..., list[Float[Array, "B U"]]], nnx.State]:
    """The same as a function of the network's variables and the images, and the variables.

    Compiled like this, networks of one shape share a program.
    """
    graphdef, variables = nnx.split(evaluation_copy(model))
    steps = model.config.time_steps

    def answer(variables, images):
        def observe(name, value):
            found = {}
            for i, group in enumerate(units):
                # The blocks are scanned, so a name seen here has no index yet: all of a stage's blocks are taken.
                if _scanned(group.layer) == name or group.layer == name:
                    picked = value[:, :, group.token[0], group.token[1], :][..., np.array(group.channels)]
                    found[str(i)] = picked.sum(1) * (steps // value.shape[1])
            return found or None

        _, seen = nnx.merge(graphdef, variables, copy=True)(images, observe=observe)
        return [seen[group.layer][str(i)] for i, group in enumerate(units)]

    return answer, variables


def _scanned(layer: str) -> str:
    stage, block, *rest = layer.split(".")
    return ".".join([stage, "block*", *rest]) if block.startswith("block") else layer


def evaluation_copy(model: SpikingMLP) -> SpikingMLP:
    """The same network in evaluation mode, with variables of its own."""
    copy = nnx.clone(model)
    copy.eval()
    return copy


NOISES = ("gaussian", "binary")


def white_noise(
    config: ModelConfig, count: int, *, seed: int, batch_size: int = 256, std: float = 1.0, kind: str = "gaussian"
) -> Iterator[Float[np.ndarray, "B H W C"]]:
    """White noise around the mean image: every pixel and colour channel independent.

    Args:
        config: of the network, for the images' shape.
        count: images in all.
        seed: the same seed gives the same images, whatever the batch size.
        batch_size: images at a time.
        std: standard deviation of a pixel, in units of the normalised pixels: 1 is the natural images' own.
        kind: "gaussian", or "binary" for pixels of -std and std.

    Yields:
        float32 images.

    Raises:
        InputError: an unknown kind, or numbers that are not positive.
    """
    if kind not in NOISES:
        raise InputError(f'there is no noise of kind "{kind}": take one of {", ".join(NOISES)}')
    for name, value in (("count", count), ("batch_size", batch_size), ("std", std)):
        if not value > 0:
            raise InputError(f"{name} of white noise is {value}, but it must be positive")
    rng = np.random.default_rng(seed)
    shape = config.image_size, config.image_size, config.in_channels
    for start in range(0, count, batch_size):
        images = rng.standard_normal((min(batch_size, count - start), *shape), np.float32)
        yield np.float32(std) * (images if kind == "gaussian" else np.where(images < 0, np.float32(-1), np.float32(1)))


def natural_images(
    source: Source, config: ModelConfig, data: dict[str, Any], count: int, *, seed: int, batch_size: int = 256
) -> Iterator[Float[np.ndarray, "B H W C"]]:
    """Images of a data set in random order, none twice, made into inputs as the network's test images are.

    Args:
        source: from `data.sources.open_source`.
        config: of the network.
        data: the weights' "data": resize_mode, eval_resize, mean, std.
        count: images in all; of a smaller set all are taken.
        seed: of the order.
        batch_size: images at a time.

    Yields:
        float32 images.
    """
    order = np.random.default_rng(seed).permutation(len(source))[:count]
    fitting = config.image_size, config.in_channels, data["resize_mode"], data["eval_resize"]
    for start in range(0, len(order), batch_size):
        chosen = (next_decodable(source, int(i))["image"] for i in order[start : start + batch_size])
        yield normalize(np.stack([fit_image(image, *fitting) for image in chosen]), data["mean"], data["std"])


def window(
    images: Float[np.ndarray, "B H W C"], centre: tuple[float, float], side: int
) -> Float[np.ndarray, "B side side"]:
    """Cuts a square out of the images and averages their colours.

    Args:
        images: any.
        centre: (row, column) that the square is around; it is moved inwards where it would leave the image.
        side: of the square; an image's whole side where that is less.
    """
    sides = images.shape[1:3]
    parts = [min(side, whole) for whole in sides]
    starts = [
        int(np.clip(round(middle - (part - 1) / 2), 0, whole - part))
        for middle, part, whole in zip(centre, parts, sides, strict=True)
    ]
    rows, columns = (slice(start, start + part) for start, part in zip(starts, parts, strict=True))
    return images[:, rows, columns].mean(-1)


def record_spikes(
    model: SpikingMLP,
    units: Sequence[Units],
    batches: Iterable[Float[np.ndarray, "B H W C"]],
) -> Iterator[tuple[Float[np.ndarray, "B H W C"], list[Float[np.ndarray, "B U"]]]]:
    """Shows images to a network and counts the spikes of some units over all time steps.

    Args:
        model: is used in evaluation mode; it is not changed.
        units: groups of units of layers of spikes.
        batches: normalised pixels.

    Yields:
        each batch with the counts of each group.

    Raises:
        InputError: a layer of potentials.
    """
    import jax

    for group in units:
        if not group.layer.endswith(".spikes"):
            raise InputError(f"{group.layer} is no layer of spikes: take one whose name ends in .spikes")
    answer, variables = separate_responses(model, units)
    answer = jax.jit(answer)
    full = 0
    for images in batches:
        images = np.asarray(images)
        full = max(full, len(images))
        # A last, smaller batch is filled up: another shape would be compiled again.
        padded = np.concatenate([images, np.zeros((full - len(images), *images.shape[1:]), images.dtype)])
        yield images, [np.asarray(counts)[: len(images)] for counts in answer(variables, padded)]


def collect(
    model: SpikingMLP, units: Sequence[Units], batches: Iterable[Float[np.ndarray, "B H W C"]], *, shifts: int = 0
) -> list[Moments]:
    """The sums behind the spike-triggered averages of some units under given stimuli.

    Args:
        model: is used in evaluation mode; it is not changed.
        units: groups of units.
        batches: normalised pixels, in random order if there are shifts.
        shifts: see `Moments`.

    Returns:
        one Moments for each group, over all pixels and colours.

    Raises:
        InputError: there are no stimuli, or a layer of potentials.
    """
    moments: list[Moments] = []
    for images, counts in record_spikes(model, units, batches):
        if not moments:
            moments = [Moments(images[0].size, len(group.channels), shifts=shifts) for group in units]
        for sums, answers in zip(moments, counts, strict=True):
            sums.add(images, answers)
    if not moments:
        raise InputError("there are no stimuli: give at least one batch of images")
    return moments
