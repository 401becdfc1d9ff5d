"""Between the pixels and the first stage, and between stages: stem, spiking patch encoding, plain downsampling.

Each returns a potential, not spikes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.nn.layers import Conv, Neuron, Record, batch_norm, convolve, fire

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class Stem(nnx.Module):
    """Patches of pixels to the first stage's potential: convolution of patch x patch, norm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.repeats = config.time_steps
        self.conv = Conv(config.in_channels, config.dim, config.patch_size, config.patch_size, 0, rngs=rngs)
        self.norm = batch_norm(config, config.dim)

    def __call__(self, images: Float[Array, "B 1 H W C"], record: Record) -> Float[Array, "B T H2 W2 C2"]:
        """Computed once an image, not once a step: the time axis stays of length 1, but with TEBN it becomes T."""
        return self.norm(self.conv(images), repeats=self.repeats)


class PlainDownsampling(nnx.Module):
    """Convolution 2 x 2 with stride 2, norm ("MLP-*" networks)."""

    def __init__(self, config: ModelConfig, stage: int, *, rngs: nnx.Rngs):
        channels = config.stage_dim(stage)
        self.conv = Conv(channels // 2, channels, 2, 2, 0, rngs=rngs)
        self.norm = batch_norm(config, channels)

    def __call__(self, x: Float[Array, "B T H W C"], record: Record) -> Float[Array, "B T H/2 W/2 2C"]:
        """Halves the grid of spikes and doubles the channels."""
        return self.norm(self.conv(x))


class SpikingPatchEncoding(nnx.Module):
    """Spiking patch encoding ("MLP-SPE-*" networks): three nodes of a third of the channels each.

    n1 = c1(x), n2 = c2(x) + c12(LIF(n1)), n3 = c3(x) + n1 + c23(LIF(n2)); the result is their concatenation.
    c1, c2, c3 are 3 x 3 convolutions of stride 2 and norm, c12 and c23 of stride 1.
    """

    def __init__(self, config: ModelConfig, stage: int, *, rngs: nnx.Rngs):
        channels = config.stage_dim(stage)
        node = channels // 3
        self.cells = nnx.List([Conv(channels // 2, node, 3, 2, 1, rngs=rngs) for _ in range(3)])
        self.cell_norms = nnx.List([batch_norm(config, node) for _ in range(3)])
        self.edges = nnx.List([Conv(node, node, 3, 1, 1, rngs=rngs) for _ in range(2)])
        self.edge_norms = nnx.List([batch_norm(config, node) for _ in range(2)])
        self.neurons = nnx.List([Neuron(config) for _ in range(2)])

    def __call__(self, x: Float[Array, "B T H W C"], record: Record) -> Float[Array, "B T H/2 W/2 2C"]:
        """Halves the grid of spikes and doubles the channels."""
        # One convolution for the three nodes: they read the same input.
        kernels = jnp.concatenate([cell.kernel[...] for cell in self.cells], -1)
        parts = jnp.split(convolve(x, kernels, 2, 1), 3, -1)
        with jax.named_scope("node1"):
            spikes, node1 = fire(self.cell_norms[0], self.neurons[0], parts[0])
        record("encode.node1.potential", node1)
        record("encode.node1.spikes", spikes)
        with jax.named_scope("node2"):
            spikes, node2 = fire(
                self.edge_norms[0], self.neurons[1], self.edges[0](spikes), skip=self.cell_norms[1](parts[1])
            )
        record("encode.node2.potential", node2)
        record("encode.node2.spikes", spikes)
        with jax.named_scope("node3"):
            node3 = self.cell_norms[2](parts[2]) + node1 + self.edge_norms[1](self.edges[1](spikes))
        return jnp.concatenate([node1, node2, node3], -1)
