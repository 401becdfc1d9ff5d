"""Runs a network over images and reduces what its layers do.

`run` takes many images, batch by batch. Its measures are parts that share one pass: each reduces every intermediate of
a batch to sums over the batch's images while the pass is traced, and the sums are added up on the host in 64 bits.
`rasters` and `spikes_of_first` return the spikes of a few images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.config import ModelConfig
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.models.topology import intermediate_names
from spiking_mlp_jax.train.evaluate import added

SPIKES, POTENTIAL = ".spikes", ".potential"
BATCH = 64
Value = TypeVar("Value")


def in_network_order(layers: Mapping[str, Value], config: ModelConfig) -> dict[str, Value]:
    """The entries from the network's input to its output; `jax.jit` leaves a dict sorted by name.

    Args:
        layers: anything by the name of an intermediate ("stage0.encode.spikes").
        config: of the network; names that it does not have are left out.
    """
    return {name: layers[name] for name in intermediate_names(config) if name in layers}


def spikes_of_first(
    model: SpikingMLP, images: Float[Array, "B H W C"]
) -> tuple[Float[np.ndarray, "T B K"], dict[str, Bool[np.ndarray, "T H W C"]]]:
    """Logits of some images at each time step, and the spikes of the first one as `rasters` returns them."""
    # One byte a spike instead of four.
    logits, seen = observed(model, images, lambda name, x: x[0].astype(bool) if name.endswith(SPIKES) else None)
    return np.asarray(logits), {name: np.asarray(spikes) for name, spikes in seen.items()}


def rasters(model: SpikingMLP, images: Float[Array, "B H W C"]) -> dict[str, Bool[np.ndarray, "B T H W C"]]:
    """Every spike of some images; `plots.spike_raster` draws one image's.

    Args:
        model: in evaluation mode; it is not changed.
        images: normalised pixels; the result needs a byte per neuron, step and image.

    Returns:
        by layer ("stage0.encode.spikes"), in the network's order, whether each neuron fires at each step.
    """
    _, seen = observed(model, images, lambda name, x: x.astype(bool) if name.endswith(SPIKES) else None)
    return {name: np.asarray(spikes) for name, spikes in seen.items()}


def observed(model: SpikingMLP, images: Float[Array, "B H W C"], observe):
    """Logits [T, B, K] and what `observe` returns, in the network's order, in one compiled pass."""
    graphdef, variables = nnx.split(model)
    names: list[str] = []

    @jax.jit
    def run(variables, images):
        logits, seen = nnx.merge(graphdef, variables, copy=True)(images, observe=observe)
        # Recorded while tracing, because jit returns dicts sorted by name.
        names[:] = seen
        return logits, list(seen.values())

    logits, values = run(variables, images)
    return logits, dict(zip(names, values, strict=True))


# One array [N, H, W, C], or batches of any sizes; with labels, batches are pairs (images, labels).
Images = Float[Array, "N H W C"] | Iterable[Any]
Progress = Callable[[int], None]


class Part(Protocol):
    """A streaming statistic."""

    def observe(self, name: str, value: Array, mask: Bool[Array, " B"]) -> Any:
        """Sums over the images of a batch whose mask is set, from an intermediate [B, T, H, W, C]; None for nothing.

        Called while tracing. Intermediates come in the network's order, a layer's potential right before its spikes.
        """

    def finish(self, name: str, found: Any) -> Any:
        """The sums from what `observe` returned; here `name` has the index of the block, not "block*"."""
        return found


class Batch(NamedTuple):
    """A batch padded to a common size, so that the pass is compiled once.

    Attributes:
        images: [B, H, W, C].
        labels: int32 [B], 0 without labels.
        mask: bool [B], False for padding.
    """

    images: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


class Sums(NamedTuple):
    """Results of a pass.

    Attributes:
        images: number of images.
        layers: by part, then by layer in the network's order, the summed arrays, int64 or float64.
        logits: sums of `logits_sums`, or None.
        kept: by layer [N, ...], what `keep` returned for the first images.
    """

    images: int
    layers: dict[str, dict[str, Any]]
    logits: Any
    kept: dict[str, np.ndarray]


def run(
    model: SpikingMLP,
    images: Images,
    parts: Mapping[str, Part],
    *,
    labels: Int[np.ndarray, " N"] | None = None,
    logits_sums: Callable[[Array, Array, Array], Any] | None = None,
    keep: Callable[[str, Array], Array | None] | None = None,
    keep_images: int = 0,
    batch_size: int = BATCH,
    progress: Progress | None = None,
) -> Sums:
    """One pass over the images.

    Args:
        model: in evaluation mode; it is not changed.
        images: normalised pixels, an array [N, H, W, C] or batches, which may differ in size.
        parts: the statistics, by any name.
        labels: for an array of images; batches have their own, as pairs (images, labels).
        logits_sums: function of logits [T, B, K], labels and mask to sums over the images; it requires labels.
        keep: function like `Part.observe` to arrays [B, ...], returned for the first `keep_images` images.
        keep_images: see there.
        batch_size: images at a time.
        progress: called with the number of images done.

    Raises:
        InputError: a model in training mode, no images, pixels that are not finite or of a wrong shape, or labels of a
            wrong number or range.
    """
    if not model.norm.use_running_average:
        raise InputError("the model is in training mode, where its norms use batch statistics: call model.eval() first")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, but must be at least 1")
    step = _compiled(model, parts, logits_sums, keep if keep_images else None)
    count, total = 0, None
    kept: list[dict[str, np.ndarray]] = []
    for batch in batches(images, labels, batch_size, model.config.num_classes if logits_sums else None):
        found, values = jax.device_get(step(batch))
        total = added(total, found)
        if count < keep_images and values:
            wanted = batch.mask & (count + np.cumsum(batch.mask) <= keep_images)
            kept.append({name: value[wanted] for name, value in values.items()})
        count += int(batch.mask.sum())
        if progress is not None:
            progress(count)
    if total is None:
        raise InputError("there are no images: give at least one")
    layers, logits = total
    ordered = {part: in_network_order(sums, model.config) for part, sums in layers.items()}
    joined = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]} if kept else {}
    return Sums(count, ordered, logits, in_network_order(joined, model.config))


def _compiled(model, parts, logits_sums, keep):
    graphdef, variables = nnx.split(model)

    @jax.jit
    def step(variables, batch):
        def observe(name, value):
            found = {part: part_of.observe(name, value, batch.mask) for part, part_of in parts.items()}
            found = {part: sums for part, sums in found.items() if sums is not None}
            value = None if keep is None else keep(name, value)
            return (found, value) if found or value is not None else None

        logits, seen = nnx.merge(graphdef, variables, copy=True)(batch.images, observe=observe)
        layers: dict[str, dict[str, Any]] = {part: {} for part in parts}
        for name, (found, _) in seen.items():
            for part, sums in found.items():
                layers[part][name] = parts[part].finish(name, sums)
        values = {name: value for name, (_, value) in seen.items() if value is not None}
        last = None if logits_sums is None else logits_sums(logits, batch.labels, batch.mask)
        return (layers, last), values

    return lambda batch: step(variables, batch)


def batches(
    images: Images, labels: Int[np.ndarray, " N"] | None, batch_size: int, classes: int | None
) -> Iterator[Batch]:
    """Images in batches of one size, padded with zeros.

    Args:
        images, labels, batch_size: as for `run`.
        classes: number of classes; None ignores labels.

    Raises:
        InputError: as for `run`.
    """
    whole = hasattr(images, "shape")
    for given in [(images, labels)] if whole else images:
        pixels, classes_of = given if isinstance(given, tuple) else (given, None)
        pixels = np.asarray(pixels)
        if pixels.ndim != 4:
            raise InputError(f"images must be [batch, height, width, channels], but they are {pixels.shape}")
        if not np.issubdtype(pixels.dtype, np.floating):
            raise InputError(f"images must be normalised floating pixels, but they are {pixels.dtype}")
        if not np.isfinite(pixels).all():
            raise InputError("images have pixels that are not finite: normalise them with a std above 0")
        classes_of = _labels(classes_of, len(pixels), classes)
        for start in range(0, len(pixels), batch_size):
            part, named = pixels[start : start + batch_size], classes_of[start : start + batch_size]
            missing = batch_size - len(part)
            # An array that fits into one batch is not padded.
            if whole and len(pixels) < batch_size:
                missing = 0
            mask = np.arange(len(part) + missing) < len(part)
            filler = np.zeros((missing, *part.shape[1:]), part.dtype)
            yield Batch(np.concatenate([part, filler]), np.concatenate([named, np.zeros(missing, np.int32)]), mask)


def _labels(labels, count, classes) -> np.ndarray:
    if classes is None:
        return np.zeros(count, np.int32)
    if labels is None:
        raise InputError("labels are missing: give one for each image")
    labels = np.asarray(labels)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels must be {count} integers, one per image, but they are {labels.dtype} {labels.shape}")
    if count and not 0 <= labels.min() <= labels.max() < classes:
        raise InputError(f"labels go from {labels.min()} to {labels.max()}, but the network has {classes} classes")
    return labels.astype(np.int32)
