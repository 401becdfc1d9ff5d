"""The spiking MLP, image to class scores.

    images -> stem -> [LIF, blocks] -> encode -> [LIF, blocks] -> ... -> norm -> mean over tokens -> linear

Inside, the batch leads and time is on axis 1, [B, T, H, W, C]: merged for a convolution, a batch sharded over devices
stays in place. Logits leave as [T, B, K].

References: Li et al., "Efficient deep spiking multi-layer perceptrons with multiplication-free inference",
arXiv 2306.12465.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import jax
import jax.numpy as jnp
from flax import nnx

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.encoding import PlainDownsampling, SpikingPatchEncoding, Stem
from spiking_mlp_jax.models.mixing import Block
from spiking_mlp_jax.models.pixels import Pixels
from spiking_mlp_jax.nn.layers import Neuron, batch_norm, linear

if TYPE_CHECKING:
    from jaxtyping import Array, Float

__all__ = ["ModelConfig", "Observe", "SpikingMLP", "Stage"]

Observe = Callable[[str, jax.Array], Any]


class Stage(nnx.Module):
    """Encoding of what comes in, and the stage's blocks, stacked on a leading axis and scanned."""

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
        self.neuron = Neuron(config)

        @nnx.split_rngs(splits=self.depth)
        @nnx.vmap
        def stack(rngs):
            return Block(config, stage, rngs=rngs)

        self.blocks = stack(rngs)

    def __call__(self, x: Float[Array, "B T H W C"], record: _Recorder) -> Float[Array, "B T H2 W2 C2"]:
        """Spikes for the spikes of the stage before, or for images with a time axis of length 1."""
        # Scopes are named as the intermediates are: `infer.audit` and profilers read them.
        with jax.named_scope("encode"):
            h = self.encode(x, record)
            record("encode.potential", h)
            x = self.neuron(h)
        record("encode.spikes", x)
        graphdef, params, stats = nnx.split(self.blocks, nnx.Param, nnx.BatchStat)

        order: list[str] = []

        def run_block(params, stats, x, h):
            block = nnx.merge(graphdef, params, stats, copy=True)
            seen: dict[str, Array] = {}
            # The scan stacks whatever is recorded, so the index is put into the names after it.
            with jax.named_scope("block*"):
                x = block(x, h, lambda name, value: record(f"block*.{name}", value, seen))
            order[:] = seen
            return x, nnx.state(block, nnx.BatchStat), seen

        if self.remat:
            run_block = remat_binary(run_block)

        select, each = block_selector((params, stats))

        def body(x, variables):
            params, stats = select(variables)
            x, stats, seen = run_block(params, stats, x, h)
            return x, (stats, seen)

        x, (stats, seen) = jax.lax.scan(body, x, each)
        # Left alone in evaluation, so that a model can be closed over by a jitted function.
        if not self.use_running_average:
            nnx.update(self.blocks, stats)
        for i in range(self.depth):
            for name in order:
                record.seen[name.replace("block*", f"block{i}")] = jax.tree.map(lambda leaf, i=i: leaf[i], seen[name])
        return x


def block_selector(stacked):
    """How a scan over blocks gets each block's variables.

    A scan slices every stacked array at an index that only the running program knows. Compiled for a CPU, such a
    slice of a vector ends up inside the loops of norms and neurons, which are then four times slower. So all vectors
    are packed into one array, of which each turn sums out its row: one small array for all of a block's norms.

    Args:
        stacked: arrays with a leading axis for the blocks.

    Returns:
        function of one turn's slice to the block's own arrays, structured like `stacked`; what is to be scanned over.
    """
    leaves, structure = jax.tree.flatten(stacked)
    depth = leaves[0].shape[0]
    dtype = next(leaf.dtype for leaf in leaves if leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating))
    is_vector = [leaf.ndim == 2 and leaf.dtype == dtype for leaf in leaves]
    vectors = [leaf for leaf, vector in zip(leaves, is_vector, strict=True) if vector]
    packed = jnp.concatenate(vectors, 1)
    ends = list(itertools.accumulate(leaf.shape[1] for leaf in vectors))

    def select(turn):
        index, others = turn
        # A sum of one row and zeros: exact, and not NaN where only another block is.
        row = jnp.sum(jnp.where(jnp.arange(depth)[:, None] == index, packed, 0), 0)
        parts, others = iter(jnp.split(row, ends[:-1])), iter(others)
        return jax.tree.unflatten(structure, [next(parts if vector else others) for vector in is_vector])

    others = [leaf for leaf, vector in zip(leaves, is_vector, strict=True) if not vector]
    return select, (jnp.arange(depth), others)


def remat_binary(run_block):
    """Recomputes a block in the backward pass from its binary input, which is kept as bool, one byte a spike.

    `jax.checkpoint` would keep the input as it is, four bytes a spike. Parameters and the stage's potential h, the
    same for every block of a stage, are kept once by the scan around it.
    """

    @jax.custom_vjp
    def run(params, stats, x, h):
        return run_block(params, stats, x, h)

    def forward(params, stats, x, h):
        return run(params, stats, x, h), (params, stats, x.astype(bool), h)

    def backward(kept, cotangents):
        # The barrier keeps the compiler from merging the second computation with the first, and so storing it all.
        params, stats, x, h = jax.lax.optimization_barrier(kept)
        spikes = x.astype(cotangents[0].dtype)
        _, pull_back = jax.vjp(run_block, params, stats, spikes, h)
        return pull_back(cotangents)

    run.defvjp(forward, backward)
    return run


class SpikingMLP(nnx.Module):
    """A spiking MLP.

    Args:
        config: what it is made of.
        rngs: random keys for the parameters, `nnx.Rngs(seed)`.

    `.train()` normalises with batch statistics and updates the running ones, `.eval()` uses the running ones; a
    new model is in training mode. Parameters are `nnx.Param`, running statistics `nnx.BatchStat`. `.pixels` says how
    pictures become its inputs, where that is known; `weights.load` sets it, the network itself does not use it.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.pixels: Pixels | None = None
        self.stages = nnx.List([Stage(config, i, rngs=rngs) for i in range(config.stages)])
        channels = config.stage_dim(config.stages - 1)
        self.norm = batch_norm(config, channels)
        self.head = linear(channels, config.num_classes, rngs=rngs)

    @classmethod
    def from_pretrained(
        cls, where: str | os.PathLike[str], *, revision: str | None = None, download: bool = False
    ) -> SpikingMLP:
        """A trained network, ready to evaluate.

        Args:
            where: a weights folder, a training run's workdir, the name of a network that comes with the package, or
                OWNER/NAME on the Hugging Face Hub. A folder goes before a name, both go before the Hub.
            revision: branch, tag or commit on the Hub; None: the main branch.
            download: fetch the network from the Hub, if its files are not cached or outdated. Without it nothing is
                sent over the network.

        Returns:
            the model in evaluation mode; `.pixels` says how pictures become its inputs, where the folder does.

        Raises:
            InputError: there is no such network, it cannot be downloaded, or its files are damaged, changed or do not
                fit.

        Examples:
            >>> SpikingMLP.from_pretrained("fashion_mnist").pixels.class_names[9]
            'Ankle boot'
        """
        from spiking_mlp_jax.models import weights  # which imports this module

        return weights.load(weights.find(where, revision=revision, download=download))[0]

    @overload
    def __call__(self, images: Float[Array, "B H W C"], observe: None = None) -> Float[Array, "T B K"]: ...

    @overload
    def __call__(
        self, images: Float[Array, "B H W C"], observe: Observe
    ) -> tuple[Float[Array, "T B K"], dict[str, Any]]: ...

    def __call__(self, images, observe=None):
        """Class scores over time.

        Args:
            images: normalised pixels, floating, sizes as in the config.
            observe: when given, called as `observe(name, value)` while tracing with every named intermediate
                [B, T, H, W, C] (names end in ".potential" or ".spikes"; a block's index reads "block*", because
                the blocks are scanned). What it returns is kept, None is dropped: `lambda name, x: x` keeps all,
                and reducing inside it, as in `lambda name, x: x.mean()`, never stores the whole.

        Returns:
            logits [T, B, K], a class's score is their mean over T; with `observe`, (logits, dict of what it kept,
            under names such as "stage0.block1.token.height.spikes", in the order of the network).

        Raises:
            InputError: no images, or of another shape or dtype than the config's.
        """
        c = self.config
        expected = (c.image_size, c.image_size, c.in_channels)
        images = jnp.asarray(images)
        if images.ndim != 4 or images.shape[1:] != expected or not images.shape[0]:
            raise InputError(f"images must be [batch, {', '.join(map(str, expected))}], but they are {images.shape}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"images must be normalised floating pixels, but they are {images.dtype}")
        x = images[:, None]
        # Stem and head are not rounded to a narrower dtype: they are little work, and not of spikes.
        x = x.astype(jnp.promote_types(x.dtype, self.head.kernel.dtype))
        recorder = _Recorder(observe)
        for i, stage in enumerate(self.stages):
            with jax.named_scope(f"stage{i}"):
                x = stage(x, recorder.within(f"stage{i}."))
        with jax.named_scope("head"):
            features = jnp.mean(self.norm(x), (2, 3))
            logits = jnp.swapaxes(self.head(features), 0, 1)
        return logits if observe is None else (logits, recorder.seen)


class _Recorder:
    """Hands intermediates to `observe` and keeps its answers; does nothing without one."""

    def __init__(self, observe: Observe | None, prefix: str = "", seen: dict[str, Any] | None = None):
        self.observe, self.prefix = observe, prefix
        self.seen: dict[str, Any] = {} if seen is None else seen

    def within(self, prefix: str) -> _Recorder:
        return _Recorder(self.observe, prefix, self.seen)

    def __call__(self, name: str, value: Array, seen: dict[str, Any] | None = None):
        if self.observe is None:
            return
        kept = self.observe(self.prefix + name, value)
        if kept is not None:
            (self.seen if seen is None else seen)[self.prefix + name] = kept
