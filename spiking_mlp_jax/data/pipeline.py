"""Batches for training and evaluation, made by Grain.

Training: shuffle -> drop the incomplete batch -> augment -> this process's share -> batch -> repeat. Each
stage is random access, so position k of the stream is a pure function of the seed and k: that makes the
iterator's state one number, restoring it O(1), and the continuation bit-identical.
"""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import grain
import numpy as np
from absl import flags

from spiking_mlp_jax.data.augment import Augment, check_resize, fit_image
from spiking_mlp_jax.data.sources import Source
from spiking_mlp_jax.errors import InputError

__all__ = ["batch_records", "eval_batches", "fit_image", "steps_per_epoch", "train_batches"]


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Number of whole batches of `batch_size` (over all processes) in one pass.

    Raises:
      InputError: there is not even one.
    """
    steps = len(source) // batch_size
    if not steps:
        raise InputError(f"batch_size is {batch_size}, but there are only {len(source)} training images: lower it.")
    return steps


def train_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    in_channels: int,
    augment: Augment,
    seed: int,
    epochs: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> grain.DatasetIterator:
    """Shuffled, augmented batches of whole epochs, each epoch in a new order.

    The images of a step and their augmentation depend on seed and step only, not on `process_count` or
    `workers`; the processes' shares are disjoint and equal.

    Args:
      source: from `open_source`.
      batch_size: images per step over all processes.
      image_size: side of the square images.
      in_channels: 1 or 3.
      augment: what to do with each image.
      seed: 0 <= seed < 2**32.
      epochs: number of passes.
      process_index: which share this process takes.
      process_count: number of processes.
      workers: processes that prepare batches; 0 uses threads of this process. A saved iterator state fits
        only the number of workers it was saved with.

    Returns:
      Iterator of {"image": uint8 [b, image_size, image_size, in_channels], "label": int32 [b]} with
      b = batch_size // process_count; `get_state()` gives a small JSON-able dict for `set_state()`.

    Raises:
      InputError: a setting is impossible; while iterating, an image cannot be read.
    """
    local = _local_batch(batch_size, process_index, process_count)
    check_resize(augment.resize_mode, augment.eval_resize, image_size)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}, but it must be at least 0 and below 2**32.")
    if epochs < 1:
        raise InputError(f"epochs is {epochs}, but must be at least 1.")
    positions = _order(source, batch_size, seed)
    # Augmenting before taking the share keys the randomness by position in the global batch: no two processes
    # draw the same numbers.
    images = positions.random_map(_TrainLoad(source, augment, image_size, in_channels))
    return iter(_prefetch(images[process_index::process_count].batch(local).repeat(epochs), workers))


def batch_records(source: Source, *, batch_size: int, seed: int, step: int) -> list[dict]:
    """Which records a step of `train_batches` takes, without reading any.

    Args:
      source: as for `train_batches`.
      batch_size: likewise, over all processes.
      seed: likewise.
      step: 1 for the first.

    Returns:
      {"index": position in the source} of each image of the global batch, in the order in which the processes take
      turns (a single process: the order in its batch); with "path" where the source has a file for each image.
    """
    order: Any = _order(source, batch_size, seed).repeat()
    path = getattr(source, "path", None)
    indices = (int(order[k]) for k in range((step - 1) * batch_size, step * batch_size))
    return [{"index": i} if path is None else {"index": i, "path": str(path(i))} for i in indices]


def _order(source: Source, batch_size: int, seed: int) -> grain.MapDataset:
    """Indices of one epoch; repeated, those of all, each in an order of its own."""
    used = steps_per_epoch(source, batch_size) * batch_size
    # Indices travel until the image is needed: Grain's bookkeeping of a source costs as much as a tiny image.
    return grain.MapDataset.range(len(source)).seed(seed).shuffle()[:used]


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    in_channels: int,
    resize_mode: str = "pad",
    eval_resize: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Iterable[dict[str, np.ndarray]]:
    """Every image once, in order, without randomness; the last batch is filled up and masked.

    All processes get the same number of batches, so that collective operations match; together their masks
    count each image exactly once.

    Args:
      source: from `open_source`.
      batch_size: images per step over all processes.
      image_size: side of the square images.
      in_channels: 1 or 3.
      resize_mode: see `fit_image`.
      eval_resize: see `fit_image`.
      process_index: which share this process takes.
      process_count: number of processes.
      workers: processes that prepare batches; 0 uses threads of this process.

    Returns:
      Something to iterate over, any number of times: {"image": uint8 [b, image_size, image_size,
      in_channels], "label": int32 [b], "mask": bool [b]}, b = batch_size // process_count. Where the mask is
      False the image is black and the label 0.

    Raises:
      InputError: a setting is impossible; while iterating, an image cannot be read.
    """
    local = _local_batch(batch_size, process_index, process_count)
    check_resize(resize_mode, eval_resize, image_size)
    padded = -(-len(source) // batch_size) * batch_size
    load = _EvalLoad(source, image_size, in_channels, resize_mode, eval_resize)
    share = grain.MapDataset.range(padded)[process_index::process_count]
    return _prefetch(share.map(load).batch(local), workers)


def _local_batch(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index is {process_index}, but there are {process_count} processes.")
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"batch_size is {batch_size}, but must be a positive multiple of {process_count} processes.")
    return batch_size // process_count


def _prefetch(batches: grain.MapDataset, workers: int) -> grain.IterDataset:
    """Prepare batches ahead of time; one thread or worker makes one batch, and their order is kept."""
    if workers < 0:
        raise InputError(f"workers is {workers}, but must be 0 (threads) or a number of processes.")
    if workers:
        # Grain reads its own absl flags to start a worker, also where no program has parsed any (a notebook).
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        return batches.to_iter_dataset(one_thread).mp_prefetch(options)
    threads = min(8, os.cpu_count() or 1)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2))


@dataclasses.dataclass(frozen=True)
class _TrainLoad(grain.transforms.RandomMap):
    source: Source
    augment: Augment
    image_size: int
    in_channels: int

    def random_map(self, element: int, rng: np.random.Generator) -> dict:
        record = self.source[element]
        image = self.augment(record["image"], self.image_size, self.in_channels, rng)
        return {"image": image, "label": record["label"]}


@dataclasses.dataclass(frozen=True)
class _EvalLoad(grain.transforms.Map):
    source: Source
    image_size: int
    in_channels: int
    resize_mode: str
    eval_resize: int

    def map(self, element: int) -> dict:
        if element >= len(self.source):
            blank = np.zeros((self.image_size, self.image_size, self.in_channels), np.uint8)
            return {"image": blank, "label": np.int32(0), "mask": False}
        record = self.source[element]
        image = fit_image(record["image"], self.image_size, self.in_channels, self.resize_mode, self.eval_resize)
        return {"image": image, "label": record["label"], "mask": True}
