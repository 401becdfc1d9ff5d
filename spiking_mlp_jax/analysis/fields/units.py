"""Units of a layer and what they answer to images: potentials or spikes, summed over the time steps.

A unit is one channel of one layer at one token. Layers are named as in `topology.intermediate_names`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.models.config import ModelConfig
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
