"""The spiking MLP, from images to class scores.

    images -> stem -> [LIF, blocks] -> encoding -> [LIF, blocks] -> ... -> norm -> mean over tokens -> linear

Activations are [B, T, H, W, C], with the batch leading: merged for a convolution, [B * T, ...], a sharded batch stays
where it is. Logits are [T, B, K].

References: Li et al., "Efficient deep spiking multi-layer perceptrons with multiplication-free inference",
arXiv 2306.12465.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, overload

import jax
import jax.numpy as jnp
from flax import nnx

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import folder
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.pixels import Pixels
from spiking_mlp_jax.nn.layers import Conv, Neuron, bias_of, convolve, fire, linear, mix_axis, spike_dense
from spiking_mlp_jax.nn.module import Module
from spiking_mlp_jax.nn.norm import BatchNorm, LayerNorm, uniform_fan_in
from spiking_mlp_jax.nn.scan import scan_blocks

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Observe = Callable[[str, jax.Array], Any]
HEIGHT, WIDTH, CHANNELS = 2, 3, 4  # axes of [B, T, H, W, C]


def neuron(config: ModelConfig, channels: int) -> Neuron:
    """A layer of the configured neurons."""
    return Neuron(
        config.neuron,
        channels=channels if config.tau_per_channel else None,
        tau=config.tau,
        v_threshold=config.v_threshold,
        v_reset=config.v_reset,
        decay_input=config.decay_input,
        detach_reset=config.detach_reset,
        surrogate=config.surrogate,
        surrogate_alpha=config.surrogate_alpha,
        time_steps=config.time_steps,
        # With "float32" spikes follow the potentials, which are float64 where x64 is on.
        dtype=None if config.dtype == "float32" else config.dtype,
        backend=config.neuron_backend,
    )


def batch_norm(config: ModelConfig, features: int, axis: int = -1) -> BatchNorm:
    """The configured batch norm over one axis; plain BatchNorm with norm="layer", for norms outside of the mixing."""
    return BatchNorm(
        features,
        axis,
        step_scales=config.time_steps if config.norm == "tebn" else None,
        # tdBN: alpha * v_threshold, with alpha = 1.
        gain=config.v_threshold if config.norm == "tdbn" else 1.0,
    )


class Stem(Module):
    """Pixels to the potential of the first stage: patch x patch convolution, norm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.repeats = config.time_steps
        self.conv = Conv(config.in_channels, config.dim, config.patch_size, config.patch_size, 0, rngs=rngs)
        self.norm = batch_norm(config, config.dim)

    def __call__(self, images: Float[Array, "B 1 H W C"], record: Recorder) -> Float[Array, "B T H2 W2 C2"]:
        """Run once per image, not once per step: the time axis keeps length 1, except that TEBN makes it T."""
        return self.norm(self.conv(images), repeats=self.repeats)


class PlainDownsampling(Module):
    """2 x 2 convolution with stride 2, norm ("MLP-*" networks)."""

    def __init__(self, config: ModelConfig, stage: int, *, rngs: nnx.Rngs):
        channels = config.stage_dim(stage)
        self.conv = Conv(channels // 2, channels, 2, 2, 0, rngs=rngs)
        self.norm = batch_norm(config, channels)

    def __call__(self, x: Float[Array, "B T H W C"], record: Recorder) -> Float[Array, "B T H/2 W/2 2C"]:
        """Spikes to the potential of the next stage."""
        return self.norm(self.conv(x))


class SpikingPatchEncoding(Module):
    """Spiking patch encoding ("MLP-SPE-*" networks): three nodes with a third of the channels each.

    n1 = c1(x), n2 = c2(x) + c12(LIF(n1)), n3 = c3(x) + n1 + c23(LIF(n2)); the result is their concatenation. All c are
    3 x 3 convolution and norm, c1, c2, c3 with stride 2, c12 and c23 with stride 1.
    """

    def __init__(self, config: ModelConfig, stage: int, *, rngs: nnx.Rngs):
        channels = config.stage_dim(stage)
        node = channels // 3
        self.cells = nnx.List([Conv(channels // 2, node, 3, 2, 1, rngs=rngs) for _ in range(3)])
        self.cell_norms = nnx.List([batch_norm(config, node) for _ in range(3)])
        self.edges = nnx.List([Conv(node, node, 3, 1, 1, rngs=rngs) for _ in range(2)])
        self.edge_norms = nnx.List([batch_norm(config, node) for _ in range(2)])
        self.neurons = nnx.List([neuron(config, node) for _ in range(2)])

    def __call__(self, x: Float[Array, "B T H W C"], record: Recorder) -> Float[Array, "B T H/2 W/2 2C"]:
        """Spikes to the potential of the next stage."""
        # One convolution for all three nodes, which read the same input.
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


class AxisMixing(Module):
    """Token mixing along one axis: LIF(norm(W x + b)), with W [out, in] shared by all other positions.

    BatchNorm's features are the positions along the axis; LayerNorm normalizes over the other axis and the channels.
    """

    def __init__(self, config: ModelConfig, stage: int, axis: int, *, rngs: nnx.Rngs):
        side = config.stage_side(stage)
        self.axis = axis
        self.kernel = nnx.Param(uniform_fan_in(rngs.params(), (side, side), side))
        self.bias = nnx.Param(uniform_fan_in(rngs.params(), (side,), side))
        if config.norm == "layer":
            other = WIDTH if axis == HEIGHT else HEIGHT
            self.norm = LayerNorm((side, config.stage_dim(stage)), (other, CHANNELS))
        else:
            self.norm = batch_norm(config, side, axis)
        self.neuron = neuron(config, config.stage_dim(stage))

    def __call__(self, x: Float[Array, "B T H W C"], record: Recorder) -> Float[Array, "B T H W C"]:
        """Spikes to spikes."""
        z: Array = mix_axis(x, self.kernel[...].astype(x.dtype), self.axis)  # pyright: ignore[reportAssignmentType]
        spikes, potential = fire(self.norm, self.neuron, z, feature_bias=self.bias[...], feature_axis=self.axis)
        record("potential", potential)
        record("spikes", spikes)
        return spikes


class TokenBlock(Module):
    """Row mixing, column mixing and identity, fused by a 1 x 1 convolution; `Block` applies the norm.

    The identity is x itself with "spe" encoding and LIF(norm(x)) with "plain".
    """

    def __init__(self, config: ModelConfig, stage: int, *, rngs: nnx.Rngs):
        channels = config.stage_dim(stage)
        self.height = AxisMixing(config, stage, HEIGHT, rngs=rngs)
        self.width = AxisMixing(config, stage, WIDTH, rngs=rngs)
        self.identity_norm = batch_norm(config, channels) if config.encoding == "plain" else None
        self.identity_neuron = neuron(config, channels) if config.encoding == "plain" else None
        self.fuse = linear(3 * channels, channels, use_bias=False, rngs=rngs)
        self.norm = batch_norm(config, channels)

    def __call__(self, x: Float[Array, "B T H W C"], record: Recorder) -> Float[Array, "B T H W C"]:
        """Spikes to the input of the norm."""
        identity = x
        if self.identity_norm is not None and self.identity_neuron is not None:
            with jax.named_scope("identity"):
                identity, potential = fire(self.identity_norm, self.identity_neuron, x)
            record("token.identity.potential", potential)
            record("token.identity.spikes", identity)
        with jax.named_scope("height"):
            a = self.height(x, record.within("token.height."))
        with jax.named_scope("width"):
            b = self.width(x, record.within("token.width."))
        with jax.named_scope("fuse"):
            return spike_dense(jnp.concatenate([identity, a, b], -1), self.fuse.kernel[...].astype(x.dtype))


class ChannelBlock(Module):
    """Two-layer MLP over the channels of each token: linear, norm, LIF, linear; `Block` applies the last norm.

    Features of the norms are the H * W tokens, as in the official code, or the channels (`norm_features`).
    """

    def __init__(self, config: ModelConfig, stage: int, *, rngs: nnx.Rngs):
        channels, tokens = config.stage_dim(stage), config.stage_side(stage) ** 2
        hidden = config.expansion * channels

        def norm(features):
            if config.norm == "layer":
                return LayerNorm((features,), (-1,))
            if config.norm_features == "token":
                return batch_norm(config, tokens, -2)
            return batch_norm(config, features)

        self.expand = linear(channels, hidden, rngs=rngs)
        self.hidden_norm = norm(hidden)
        self.neuron = neuron(config, hidden)
        self.project = linear(hidden, channels, rngs=rngs)
        self.norm = norm(channels)

    def __call__(self, x: Float[Array, "B T H W C"], record: Recorder) -> Float[Array, "B T H W C"]:
        """Spikes to the input of the last norm, [B, T, H * W, C], without the bias of `project`."""
        b, t, h, w, c = x.shape
        with jax.named_scope("hidden"):
            z = spike_dense(x.reshape(b, t, h * w, c), self.expand.kernel[...].astype(x.dtype))
            spikes, potential = fire(self.hidden_norm, self.neuron, z, bias=bias_of(self.expand))
        record("channel.hidden.potential", potential.reshape(b, t, h, w, -1))
        record("channel.hidden.spikes", spikes.reshape(b, t, h, w, -1))
        with jax.named_scope("project"):
            return spike_dense(spikes, self.project.kernel[...].astype(x.dtype))


class Block(Module):
    """One block of a stage. The skip connection is the stage's potential h in every block.

    token = TokenBlock(x); x = LIF(h + token); x = LIF(h + token + ChannelBlock(x))
    """

    def __init__(self, config: ModelConfig, stage: int, *, rngs: nnx.Rngs):
        channels = config.stage_dim(stage)
        self.token = TokenBlock(config, stage, rngs=rngs)
        self.token_neuron = neuron(config, channels)
        self.channel = ChannelBlock(config, stage, rngs=rngs)
        self.channel_neuron = neuron(config, channels)

    def __call__(
        self, x: Float[Array, "B T H W C"], h: Float[Array, "B T H W C"], record: Recorder
    ) -> Float[Array, "B T H W C"]:
        """Spikes to spikes.

        Args:
            x: spikes of the previous block.
            h: potential of the stage; a time axis of length 1 stands for T equal steps.
            record: called with the name and value of each intermediate.
        """
        with jax.named_scope("token"):
            spikes, potential = fire(self.token.norm, self.token_neuron, self.token(x, record), skip=h)
        record("token.potential", potential)
        record("token.spikes", spikes)
        with jax.named_scope("channel"):
            z = self.channel(spikes, record)
            bias = bias_of(self.channel.project)
            spikes, potential = fire(self.channel.norm, self.channel_neuron, z, bias=bias, skip=potential)
        record("channel.potential", potential)
        record("channel.spikes", spikes)
        return spikes


class Stage(Module):
    """Encoding, neuron, and blocks, whose variables are stacked on a leading axis and scanned."""

    def __init__(self, config: ModelConfig, stage: int, *, rngs: nnx.Rngs):
        self.remat = config.remat == "block"
        self.use_running_average = False
        self.depth = config.depths[stage]
        if stage == 0:
            self.encode = Stem(config, rngs=rngs)
        elif config.encoding == "spe":
            self.encode = SpikingPatchEncoding(config, stage, rngs=rngs)
        else:
            self.encode = PlainDownsampling(config, stage, rngs=rngs)
        self.neuron = neuron(config, config.stage_dim(stage))

        @nnx.split_rngs(splits=self.depth)
        @nnx.vmap
        def stack(rngs):
            return Block(config, stage, rngs=rngs)

        self.blocks = stack(rngs)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Called by `nnx.view`; see `BatchNorm.set_view`."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: Float[Array, "B T H W C"], record: Recorder) -> Float[Array, "B T H2 W2 C2"]:
        """Spikes of the previous stage, or images with a time axis of length 1, to spikes."""
        # Scopes have the names of the intermediates; the audit and profilers read them.
        with jax.named_scope("encode"):
            h = self.encode(x, record)
            record("encode.potential", h)
            x = self.neuron(h)
        record("encode.spikes", x)

        def run(block, x, h):
            # The scan traces one block for all; their indices are filled in below.
            inner = record.within("block*.", {})
            with jax.named_scope("block*"):
                return block(x, h, inner), inner.seen

        update = not self.use_running_average
        x, seen = scan_blocks(self.blocks, run, x, h, remat=self.remat, update=update)
        for i in range(self.depth):
            for name, values in seen.items():
                record.seen[name.replace("block*", f"block{i}")] = jax.tree.map(lambda leaf, i=i: leaf[i], values)
        return x


class SpikingMLP(Module):
    """A spiking MLP.

    Args:
        config: all choices of the architecture.
        rngs: random keys of the parameters, `nnx.Rngs(seed)`.

    `.train()` normalizes with batch statistics and updates the running averages, `.eval()` uses these. A new model is
    in training mode. Parameters are `nnx.Param`, running averages `nnx.BatchStat`.

    Attributes:
        config: the ModelConfig.
        pixels: preprocessing and class names of a trained network, else None; not used by the network itself.
        meta: "data", "result" and other metadata of a trained network, else None.
        loaded_from: its weights folder, beside whose workdir the folder of its images is found; else None.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.pixels: Pixels | None = None
        self._meta: str | None = None
        self.loaded_from: str | None = None
        self.stages = nnx.List([Stage(config, i, rngs=rngs) for i in range(config.stages)])
        channels = config.stage_dim(config.stages - 1)
        self.norm = batch_norm(config, channels)
        self.head = linear(channels, config.num_classes, rngs=rngs)

    @classmethod
    def from_pretrained(
        cls, where: str | os.PathLike[str], *, revision: str | None = None, download: bool = False
    ) -> SpikingMLP:
        """A trained network.

        Args:
            where: a weights folder, a training run's workdir, the name of a network in the package, or OWNER/NAME on
                the Hugging Face Hub, in this order of precedence.
            revision: branch, tag or commit on the Hub; None: the main branch.
            download: fetch the network from the Hub if its files are not cached or outdated. Otherwise nothing is sent
                over the network.

        Returns:
            the network in evaluation mode, with `.pixels` and `.meta` as saved.

        Raises:
            InputError: there is no such network, it cannot be downloaded, or its files are damaged, changed or do not
                fit.

        Examples:
            >>> SpikingMLP.from_pretrained("fashion_mnist").pixels.class_names[9]
            'Ankle boot'
        """
        return folder.load(cls, folder.find(where, revision=revision, download=download))

    def save(self, path: str | os.PathLike[str], pixels: Pixels | None = None) -> None:
        """Writes a weights folder, which `from_pretrained`, `classify` and every command read.

        Args:
            path: the folder; made if missing, replaced if it is one.
            pixels: preprocessing and class names; None: the network's own `pixels`. Without any the folder holds the
                weights alone, and only `from_pretrained` reads it.

        Raises:
            InputError: the folder cannot be written, or pixels do not fit the network.
        """
        meta, pixels = self.meta or {}, pixels or self.pixels
        if pixels is not None:
            data = meta.get("data", {})
            meta["data"] = data | pixels.to_data(self.config.num_classes, data.get("dataset", "folder"))
        folder.save(path, self, meta)

    @property
    def meta(self) -> dict[str, Any] | None:
        """A copy of the metadata."""
        return None if self._meta is None else json.loads(self._meta)

    @meta.setter
    def meta(self, values: Mapping[str, Any] | None) -> None:
        # Kept as text because NNX hashes static attributes.
        self._meta = None if values is None else json.dumps(values)

    @overload
    def __call__(self, images: Float[Array, "B H W C"], observe: None = None) -> Float[Array, "T B K"]: ...

    @overload
    def __call__(
        self, images: Float[Array, "B H W C"], observe: Observe
    ) -> tuple[Float[Array, "T B K"], dict[str, Any]]: ...

    def __call__(self, images, observe=None):
        """Class scores over time.

        Args:
            images: normalized pixels, floating, sizes as in the config.
            observe: called as `observe(name, value)` during tracing, with every intermediate [B, T, H, W, C]. Names end
                in ".potential" or ".spikes"; blocks are scanned, so their index reads "block*". Results other than None
                are collected: `lambda name, x: x` collects everything, `lambda name, x: x.mean()` reduces at once and
                never stores the rest.

        Returns:
            logits [T, B, K]; the score of a class is their mean over T. With `observe`: (logits, dict of its results by
            names such as "stage0.block1.token.height.spikes", in the order of the network).

        Raises:
            InputError: no images, or shape or dtype do not fit the config.
        """
        c = self.config
        expected = (c.image_size, c.image_size, c.in_channels)
        images = jnp.asarray(images)
        if images.ndim != 4 or images.shape[1:] != expected or not images.shape[0]:
            raise InputError(f"images must be [batch, {', '.join(map(str, expected))}], got {images.shape}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"images must be normalized floating pixels, got {images.dtype}")
        x = images[:, None]
        # Stem and head stay in at least float32: they are cheap, and do not take spikes.
        x = x.astype(jnp.promote_types(x.dtype, self.head.kernel.dtype))
        recorder = Recorder(observe)
        for i, stage in enumerate(self.stages):
            with jax.named_scope(f"stage{i}"):
                x = stage(x, recorder.within(f"stage{i}."))
        with jax.named_scope("head"):
            features = jnp.mean(self.norm(x), (2, 3))
            logits = jnp.swapaxes(self.head(features), 0, 1) + nan_where_not_finite(images)[None]
        return logits if observe is None else (logits, recorder.seen)


def nan_where_not_finite(images: Float[Array, "B H W C"]) -> Float[Array, "B 1"]:
    """0 for each image, NaN for one that holds NaN or inf: a NaN potential never fires, and would go unnoticed."""
    total = jnp.sum(images, (1, 2, 3))
    return (total - total)[:, None]


class Recorder:
    """Pass intermediates to `observe`, if given, and collect its results in `seen` by name."""

    def __init__(self, observe: Observe | None, prefix: str = "", seen: dict[str, Any] | None = None):
        self.observe, self.prefix = observe, prefix
        self.seen: dict[str, Any] = {} if seen is None else seen

    def __repr__(self) -> str:
        return "Recorder"  # nnx.tabulate shows the arguments of every layer

    def within(self, prefix: str, seen: dict[str, Any] | None = None) -> Recorder:
        """A recorder of names with a longer prefix, into the same dict or another."""
        return Recorder(self.observe, self.prefix + prefix, self.seen if seen is None else seen)

    def __call__(self, name: str, value: Array) -> None:
        if self.observe is not None and (found := self.observe(self.prefix + name, value)) is not None:
            self.seen[self.prefix + name] = found


def mean_logits(logits: Float[Array, "T B K"]) -> Float[Array, "B K"]:
    """Logits averaged over the time steps, in float32 or wider: bfloat16 would round small differences away."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)).mean(0)
