"""Units of a layer, stimuli, and responses: spikes or potentials summed over the time steps.

A unit is one channel of one layer at one token. Layers are named as in `topology.intermediate_names`. Stimuli are white
noise and natural images, as batches of normalised pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from spiking_mlp_jax.analysis.fields.spike_triggered import Moments
from spiking_mlp_jax.analysis.samples import Samples, decoded
from spiking_mlp_jax.data.sources import Source
from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.models.topology import intermediate_shapes


@dataclasses.dataclass(frozen=True)
class Units:
    """Some channels of a layer at one token.

    Attributes:
        layer: e.g. "stage0.block1.channel.spikes".
        token: (row, column) on the layer's grid.
        channels: indices.
        grid: tokens along each side of the layer's grid.
        patch: pixels along each side of a token.
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
        token: (row, column); None for the middle, (side // 2, side // 2).
        channels: indices, or the number of evenly spaced ones; None for all.

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
    """The output of each stage: the spikes of its last block's channel mixing."""
    return [f"stage{i}.block{depth - 1}.channel.spikes" for i, depth in enumerate(config.depths)]


def responses(
    model: SpikingMLP, units: Sequence[Units]
) -> Callable[[Float[Array, "B H W C"]], list[Float[Array, "B U"]]]:
    """A function from normalised images to the responses of units.

    Args:
        model: used in evaluation mode, where images are independent; it is not changed.
        units: one or more groups of units.

    Returns:
        function of images, differentiable through the surrogates: for each group the sum over the time steps of its
        units' values, spikes or potentials [B, channels]. It can be jitted.
    """
    graphdef, variables = nnx.split(evaluation_copy(model))
    return lambda images: respond(graphdef, tuple(units), variables, images)


def respond(
    graphdef: nnx.GraphDef, units: tuple[Units, ...], variables: nnx.State, images: Float[Array, "B H W C"]
) -> list[Float[Array, "B U"]]:
    """The same for a network split into its graph and its variables.

    A function jitted with the graph and the units as static arguments is compiled once for all networks of one shape.
    """

    def observe(name, value):
        found = {}
        for i, group in enumerate(units):
            # The blocks are scanned, so names have no block index here: reduce all blocks of the stage.
            if _scanned(group.layer) == name or group.layer == name:
                picked = value[:, :, group.token[0], group.token[1], :][..., np.array(group.channels)]
                found[str(i)] = picked.sum(1) * (model.config.time_steps // value.shape[1])
        return found or None

    model = nnx.merge(graphdef, variables, copy=True)
    _, seen = model(images, observe=observe)
    return [seen[group.layer][str(i)] for i, group in enumerate(units)]


_respond = jax.jit(respond, static_argnums=(0, 1))


def _scanned(layer: str) -> str:
    stage, block, *rest = layer.split(".")
    return ".".join([stage, "block*", *rest]) if block.startswith("block") else layer


def evaluation_copy(model: SpikingMLP) -> SpikingMLP:
    """A copy of the network in evaluation mode."""
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
        count: number of images.
        seed: determines the images, whatever the batch size.
        batch_size: images at a time.
        std: standard deviation of a pixel; 1 for that of natural images.
        kind: "gaussian", or "binary" for pixels of -std and std.

    Yields:
        float32 images.

    Raises:
        InputError: unknown kind, or a number that is not positive.
    """
    if kind not in NOISES:
        raise InputError(f'kind must be one of {", ".join(NOISES)}, got "{kind}"')
    for name, value in (("count", count), ("batch_size", batch_size), ("std", std)):
        if not value > 0:
            raise InputError(f"{name} of white noise must be positive, got {value}")
    rng = np.random.default_rng(seed)
    shape = config.image_size, config.image_size, config.in_channels
    for start in range(0, count, batch_size):
        images = rng.standard_normal((min(batch_size, count - start), *shape), np.float32)
        yield np.float32(std) * (images if kind == "gaussian" else np.where(images < 0, np.float32(-1), np.float32(1)))


def natural_images(
    source: Source, config: ModelConfig, data: dict[str, Any], count: int, *, seed: int, batch_size: int = 256
) -> Iterator[Samples]:
    """Images of a data set in random order, without repetition, preprocessed like test images.

    Args:
        source: from `data.sources.open_source`.
        config: of the network.
        data: the weights' "data": resize_mode, eval_resize, mean, std.
        count: number of images; all of them if the set has fewer.
        seed: of the order.
        batch_size: images at a time.
    """
    order = np.random.default_rng(seed).permutation(len(source))[:count]
    for start in range(0, len(order), batch_size):
        yield decoded(source, order[start : start + batch_size], config, data)


def window(
    images: Float[np.ndarray, "B H W C"], centre: tuple[float, float], side: int
) -> Float[np.ndarray, "B side side"]:
    """Crops a square from the images and averages their colours.

    Args:
        images: of any size.
        centre: (row, column) of the square, which is moved inside the image.
        side: of the square, at most that of the image.
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
    """Counts the spikes of some units over all time steps, batch by batch.

    Args:
        model: used in evaluation mode; it is not changed.
        units: groups of units; layers must be spikes.
        batches: normalised pixels.

    Yields:
        each batch with the counts of each group.

    Raises:
        InputError: a layer is of potentials.
    """
    for group in units:
        if not group.layer.endswith(".spikes"):
            raise InputError(f"{group.layer} is not a layer of spikes: use one whose name ends in .spikes")
    graphdef, variables = nnx.split(evaluation_copy(model))
    full = 0
    for images in batches:
        images = np.asarray(images)
        full = max(full, len(images))
        # Pad a smaller last batch, which would be compiled again otherwise.
        padded = np.concatenate([images, np.zeros((full - len(images), *images.shape[1:]), images.dtype)])
        yield (
            images,
            [np.asarray(counts)[: len(images)] for counts in _respond(graphdef, tuple(units), variables, padded)],
        )


def collect(
    model: SpikingMLP, units: Sequence[Units], batches: Iterable[Float[np.ndarray, "B H W C"]], *, shifts: int = 0
) -> list[Moments]:
    """The sums for spike-triggered averages of some units.

    Args:
        model: used in evaluation mode; it is not changed.
        units: groups of units.
        batches: normalised pixels, in random order if there are shifts.
        shifts: see `Moments`.

    Returns:
        one Moments per group, over all pixels and colours.

    Raises:
        InputError: there are no stimuli, or a layer is of potentials.
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
