"""The spiking MLP in PyTorch, built from SpikingJelly's layers: the peer of this package's benchmarks.

Names, order and data layout are those of the paper's official code: `spiking_mlp_jax.interop.official.state_dict` is
its `state_dict`, data are [T, B, C, H, W], every layer is in multi-step mode, and the image is repeated T times.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn


class Permute(nn.Module):
    """Permute axes, so that a 1 x 1 convolution mixes an axis other than the channels."""

    def __init__(self, *order: int):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(*self.order)


class TokenNorm(nn.BatchNorm1d):
    """BatchNorm over the tokens of [T, B, tokens, C], as in the official channel block."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view(x.shape)


class ChannelNorm(nn.BatchNorm1d):
    """BatchNorm over the channels of [T, B, tokens, C]."""

    def forward(self, x):
        return super().forward(x.flatten(0, 2)).view(x.shape)


def lif(config) -> neuron.LIFNode:
    """The configured LIF over all time steps."""
    if config.neuron != "lif" or config.surrogate not in ("sigmoid", "atan"):
        raise ValueError(f'the twin has LIF neurons with "sigmoid" or "atan", got {config.neuron}, {config.surrogate}')
    spike = {"sigmoid": surrogate.Sigmoid, "atan": surrogate.ATan}[config.surrogate](alpha=config.surrogate_alpha)
    return neuron.LIFNode(
        tau=config.tau,
        decay_input=config.decay_input,
        v_threshold=config.v_threshold,
        v_reset=config.v_reset,
        surrogate_function=spike,
        detach_reset=config.detach_reset,
        step_mode="m",
    )


def conv(channels_in: int, channels_out: int, size: int, stride: int, padding: int) -> nn.Sequential:
    """Convolution without bias, and norm."""
    return nn.Sequential(
        layer.Conv2d(channels_in, channels_out, size, stride, padding, bias=False, step_mode="m"),
        layer.BatchNorm2d(channels_out, step_mode="m"),
    )


class SpikingPatchEncoding(nn.Module):
    """Three nodes, each the sum of its own convolution and those of the spikes of earlier nodes."""

    def __init__(self, config, stage: int):
        super().__init__()
        channels = config.stage_dim(stage)
        node = channels // 3
        self.cell2node = nn.ModuleList([conv(channels // 2, node, 3, 2, 1) for _ in range(3)])
        self.node1_node2 = conv(node, node, 3, 1, 1)
        self.node2_node3 = conv(node, node, 3, 1, 1)
        self.lif = nn.ModuleList([lif(config) for _ in range(2)])

    def forward(self, x):
        node1, node2, node3 = (cell(x) for cell in self.cell2node)
        node2 = node2 + self.node1_node2(self.lif[0](node1))
        node3 = node3 + node1 + self.node2_node3(self.lif[1](node2))
        return torch.cat([node1, node2, node3], 2)


class TokenBlock(nn.Module):
    """Row and column mixing beside the identity, fused by a 1 x 1 convolution and norm."""

    def __init__(self, config, stage: int):
        super().__init__()
        side, channels = config.stage_side(stage), config.stage_dim(stage)

        def mixing(*order):
            # Each order is its own inverse.
            return nn.Sequential(
                Permute(*order),
                layer.Conv2d(side, side, 1, step_mode="m"),
                layer.BatchNorm2d(side, step_mode="m"),
                lif(config),
                Permute(*order),
            )

        self.proj_h = mixing(0, 1, 3, 2, 4)
        self.proj_w = mixing(0, 1, 4, 3, 2)
        if config.encoding == "plain":
            self.BN = layer.BatchNorm2d(channels, step_mode="m")
            self.activation = lif(config)
        self.plain = config.encoding == "plain"
        self.fuse = nn.Sequential(
            layer.Conv2d(3 * channels, channels, 1, bias=False, step_mode="m"),
            layer.BatchNorm2d(channels, step_mode="m"),
        )

    def forward(self, x):
        identity = self.activation(self.BN(x)) if self.plain else x
        return self.fuse(torch.cat([identity, self.proj_h(x), self.proj_w(x)], 2))


class ChannelMLP(nn.Module):
    """Two-layer MLP over the channels of each token."""

    def __init__(self, config, stage: int):
        super().__init__()
        channels, tokens = config.stage_dim(stage), config.stage_side(stage) ** 2
        hidden = config.expansion * channels
        by_token = config.norm_features == "token"
        self.net = nn.Sequential(
            nn.Linear(channels, hidden),
            TokenNorm(tokens) if by_token else ChannelNorm(hidden),
            lif(config),
            nn.Linear(hidden, channels),
            TokenNorm(tokens) if by_token else ChannelNorm(channels),
        )

    def forward(self, x):
        return self.net(x)


class Tokens(nn.Module):
    """[T, B, C, H, W] to [T, B, H * W, C]."""

    def forward(self, x):
        return x.flatten(3).transpose(2, 3)


class Grid(nn.Module):
    """[T, B, H * W, C] to [T, B, C, H, W]."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x):
        return x.transpose(2, 3).unflatten(3, (self.side, self.side))


class Twin(nn.Module):
    """The network of a `spiking_mlp_jax.ModelConfig` with BatchNorm and LIF neurons.

    Args:
        config: the network.

    Raises:
        ValueError: a norm or neuron that the twin does not have.
    """

    def __init__(self, config):
        super().__init__()
        if config.norm != "batch":
            raise ValueError(f'the twin has norm="batch", not "{config.norm}"')
        self.time_steps, self.depths = config.time_steps, config.depths
        stages = range(config.stages)
        size = config.patch_size
        self.to_patch_embedding = nn.ModuleList([conv(config.in_channels, config.dim, size, size, 0)])
        for i in stages[1:]:
            self.to_patch_embedding.append(
                SpikingPatchEncoding(config, i)
                if config.encoding == "spe"
                else conv(config.stage_dim(i - 1), config.stage_dim(i), 2, 2, 0)
            )
        self.to_patch_embedding_lif = nn.ModuleList([lif(config) for _ in stages])
        blocks = [i for i in stages for _ in range(config.depths[i])]
        self.token_mix = nn.ModuleList([TokenBlock(config, i) for i in blocks])
        self.token_mix_lif = nn.ModuleList([lif(config) for _ in blocks])
        self.channel_mix = nn.ModuleList(
            [nn.Sequential(Tokens(), ChannelMLP(config, i), Grid(config.stage_side(i))) for i in blocks]
        )
        self.channel_mix_lif = nn.ModuleList([lif(config) for _ in blocks])
        channels = config.stage_dim(config.stages - 1)
        self.batch_norm = layer.BatchNorm2d(channels, step_mode="m")
        self.mlp_head = nn.Sequential(nn.Identity(), nn.Linear(channels, config.num_classes))

    def forward(self, images):
        """Logits [T, B, K] for normalized images [B, C, H, W]; the neurons start at rest."""
        functional.reset_net(self)
        x = images.unsqueeze(0).repeat(self.time_steps, 1, 1, 1, 1)
        n = 0
        for i, depth in enumerate(self.depths):
            h = self.to_patch_embedding[i](x)
            x = self.to_patch_embedding_lif[i](h)
            for _ in range(depth):
                potential = h + self.token_mix[n](x)
                x = self.token_mix_lif[n](potential)
                x = self.channel_mix_lif[n](potential + self.channel_mix[n](x))
                n += 1
        return self.mlp_head(self.batch_norm(x).mean((3, 4)))

    def load_official(self, state: Mapping[str, Any]) -> None:
        """Load the arrays of `official.state_dict`, strictly."""
        self.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
