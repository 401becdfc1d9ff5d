"""How far a spike reaches: neurons of every layer of spikes, and synapses that one spike of it goes to.

A synapse is a weight between a spike and one sum that it enters, so an image costs, in additions,

    synaptic operations = sum over layers of spikes * fan_out

Weights shared over positions count at each of them. What meets no weight between neurons is left out: norms, biases,
the skip connection of potentials and the neuron of "plain" encoding's identity, which has one input. The stem reads
pixels and not spikes. The head counts as if it ran on every spike, though the mean over tokens comes before it.
"""

from __future__ import annotations

from fractions import Fraction

from spiking_mlp_jax.models.config import ModelConfig


def neurons(config: ModelConfig) -> dict[str, int]:
    """Number of neurons of every layer of spikes.

    Returns:
        neurons by layer ("stage0.encode.spikes"), in the order of the network.

    Examples:
        >>> config = ModelConfig(image_size=8, patch_size=4, dim=3, depths=(1,), expansion=3)
        >>> neurons(config)["stage0.encode.spikes"], neurons(config)["stage0.block0.channel.hidden.spikes"]
        (12, 36)
    """
    return {name: count for name, (count, _) in _layers(config).items()}


def fan_out(config: ModelConfig) -> dict[str, float | int]:
    """Synapses that one spike of each layer reaches, mean over the layer's neurons.

    Near the border of a padded convolution a spike reaches fewer than further in; the mean is exact, and an int
    where it is whole.

    Returns:
        synapses by layer, named and ordered as in `neurons`.
    """
    return {
        name: reached.numerator if reached.denominator == 1 else float(reached)
        for name, (_, reached) in _layers(config).items()
    }


def dense_operations(config: ModelConfig) -> float:
    """Synaptic operations of one image if every neuron fired at each of the time steps.

    Examples:
        >>> f"{dense_operations(ModelConfig.variant('mlp_spe_t')):,.0f}"
        '19,901,210,784'
    """
    return config.time_steps * float(sum(count * reached for count, reached in _layers(config).values()))


def _layers(config: ModelConfig) -> dict[str, tuple[int, Fraction]]:
    """Neurons and fan-out of every layer of spikes, in the order of the network."""
    layers: dict[str, tuple[int, Fraction]] = {}
    for stage, depth in enumerate(config.depths):
        side, channels = config.stage_side(stage), config.stage_dim(stage)
        tokens, hidden = side**2, config.expansion * channels
        if stage and config.encoding == "spe":
            node = channels // 3
            for name in ("node1", "node2"):
                layers[f"stage{stage}.encode.{name}.spikes"] = tokens * node, node * _windows(side, 3, 1, 1) ** 2
        # A block reads its input along rows, along columns and, with "spe", in the fusion as it is.
        block = Fraction(2 * side + (channels if config.encoding == "spe" else 0))
        layers[f"stage{stage}.encode.spikes"] = tokens * channels, block
        for index in range(depth):
            prefix = f"stage{stage}.block{index}"
            if config.encoding == "plain":
                layers[f"{prefix}.token.identity.spikes"] = tokens * channels, Fraction(channels)
            layers[f"{prefix}.token.height.spikes"] = tokens * channels, Fraction(channels)
            layers[f"{prefix}.token.width.spikes"] = tokens * channels, Fraction(channels)
            layers[f"{prefix}.token.spikes"] = tokens * channels, Fraction(hidden)
            layers[f"{prefix}.channel.hidden.spikes"] = tokens * hidden, Fraction(channels)
            following = block if index + 1 < depth else _after(config, stage)
            layers[f"{prefix}.channel.spikes"] = tokens * channels, following
    return layers


def _after(config, stage) -> Fraction:
    """Fan-out of a stage's last spikes, into the next stage's encoding or the head."""
    if stage + 1 == config.stages:
        return Fraction(config.num_classes)
    size, padding = (3, 1) if config.encoding == "spe" else (2, 0)
    return config.stage_dim(stage + 1) * _windows(config.stage_side(stage), size, 2, padding) ** 2


def _windows(side, size, stride, padding) -> Fraction:
    """Windows of a convolution that a position along one axis is in, mean over the axis."""
    outputs = (side + 2 * padding - size) // stride + 1
    starts = range(-padding, outputs * stride - padding, stride)
    return Fraction(sum(min(start + size, side) - max(start, 0) for start in starts), side)
