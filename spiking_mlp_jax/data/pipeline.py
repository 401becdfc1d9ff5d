"""Grain pipelines for training and evaluation.

Training: shuffle -> copies, drop the incomplete batch -> augment -> this process's share -> batch -> repeat. Every
stage has random access: position k of the stream is a pure function of the seed and k. So the iterator's state is one
number, restoring it takes O(1), and resuming is bit-exact.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from spiking_mlp_jax.data.damaged import NONE, Damaged
from spiking_mlp_jax.data.image import DamagedImageError
from spiking_mlp_jax.data.sources import EncodedSource, Source
from spiking_mlp_jax.data.transforms import Augment, fit_image
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.pixels import check_resize

TRIES = 100  # images tried in place of a corrupt one


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Number of complete batches of `batch_size` (over all processes) in one epoch.

    Raises:
      InputError: there is none.
    """
    steps = len(source) // batch_size
    if not steps:
        raise InputError(f"batch_size must be at most {len(source)}, the number of training images, got {batch_size}")
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
    copies: int = 1,
    damaged: Damaged | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> "TrainBatches":
    """Shuffled, augmented batches; each epoch has a new order and complete batches only.

    The images of a step and their augmentation depend on seed and step only, not on `process_count` or `workers`. The
    processes' shares are disjoint and of equal size; concatenated, they are the global batch.

    With `copies` above 1 (repeated augmentation), an epoch is as long, but uses 1 / copies of the source's images, each
    `copies` times in a batch with different augmentation. Copies are as far apart in the batch as possible, so that
    they fall on different processes and devices, and mixing neighbours never mixes copies.

    Args:
      source: from `open_source`.
      batch_size: images per step over all processes.
      image_size: side of the square images.
      in_channels: 1 or 3.
      augment: of each image.
      seed: 0 <= seed < 2**32.
      epochs: number of epochs.
      copies: of each image in a batch.
      damaged: counts corrupt images, each of which is replaced by the next one of the source; None: a corrupt image is
        an error.
      process_index: of this process.
      process_count: number of processes.
      workers: processes that prepare batches; 0: threads of this process.

    Returns:
      Iterator of {"image": uint8 [b, image_size, image_size, in_channels], "label": int32 [b]} with
      b = batch_size // process_count; `get_state()` gives a small JSON-able dict for `set_state()`.

    Raises:
      InputError: invalid arguments; while iterating, an image cannot be read, or too many are corrupt.

    References:
      Hoffer et al., Augment your batch, https://arxiv.org/abs/1901.09335; the order follows DeiT's sampler.
    """
    local = _local_batch(batch_size, process_index, process_count, workers)
    check_resize(augment.resize_mode, augment.eval_resize, image_size)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be at least 0 and below 2**32, got {seed}")
    if epochs < 1:
        raise InputError(f"epochs must be at least 1, got {epochs}")
    positions = _order(source, batch_size, seed, copies)
    # Augment before sharding: randomness is keyed by the position in the global batch, so that it differs between
    # processes.
    images = positions.random_map(_TrainLoad(source, augment, image_size, in_channels, damaged is not None))
    share = _Reordered(
        images, len(positions) // process_count, functools.partial(_member, batch_size, local, process_index)
    )
    return TrainBatches(share.batch(local).repeat(epochs), workers, damaged)


class TrainBatches:
    """Batches from any position on, without their "damaged".

    The position is a number of batches: batch k is a function of seed and k alone, so that `workers` and the number of
    processes may change where a run resumes. Reading starts with the first batch that is asked for.
    """

    def __init__(self, batches: grain.MapDataset, workers: int, damaged: Damaged | None):
        self._batches, self._workers, self._damaged = batches, workers, damaged
        self._iterator: grain.DatasetIterator | None = None
        self._position = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            if self._position >= len(self._batches):
                raise StopIteration
            self._iterator = iter(_prefetch(self._batches[self._position :], self._workers))
        batch = next(self._iterator)
        self._position += 1
        return batch if self._damaged is None else self._damaged.sift(batch)

    def get_state(self) -> dict[str, int]:
        """The position, as JSON values."""
        return {"batch": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        """Restores a position from `get_state`."""
        self.close()
        self._position = state["batch"]

    def close(self) -> None:
        """Stops the workers."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


class _Reordered(grain.MapDataset):
    """`length` elements of each epoch of a dataset; `where` maps their index to that in the parent's epoch."""

    def __init__(self, parent: grain.MapDataset, length: int, where: Callable[[int], int]):
        super().__init__(parent)
        self._epoch, self._length, self._where = len(parent), length, where

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, at = divmod(index, self._length)
        return self._parent[epoch * self._epoch + self._where(at)]


def _copy(batch_size: int, copies: int, at: int) -> int:
    """The shuffled image at a position of an epoch; a batch holds all first copies, then all second copies, ..."""
    step, place = divmod(at, batch_size)
    # Of 8 places and 3 copies the images are 0 0 0 1 1 1 2 2; taken in strides of 3 that is 0 1 2 | 0 1 2 | 0 1.
    longer = batch_size % copies
    per, cut = batch_size // copies, longer * (batch_size // copies + 1)
    copy, number = divmod(place, per + 1) if place < cut else divmod(place - cut, per)
    slot = number * copies + copy + (0 if place < cut else longer)
    return (step * batch_size + slot) // copies


def _member(batch_size: int, local: int, process_index: int, at: int) -> int:
    """The position in an epoch of the `at`-th image of a process."""
    step, place = divmod(at, local)
    return step * batch_size + process_index * local + place


def batch_records(source: Source, *, batch_size: int, seed: int, step: int, copies: int = 1) -> list[dict]:
    """The records of a step of `train_batches`, without reading them.

    Args:
      source: as for `train_batches`.
      batch_size: likewise, over all processes.
      seed: likewise.
      step: 1 for the first.
      copies: as for `train_batches`.

    Returns:
      {"index": position in the source} of each image of the global batch in order (the shares of process 0, 1, ...);
      also "path" if each image is a file. Corrupt images are listed, not their replacements.
    """
    order: Any = _order(source, batch_size, seed, copies)
    path = getattr(source, "path", None)
    indices = (int(order[k]) for k in range((step - 1) * batch_size, step * batch_size))
    return [{"index": i} if path is None else {"index": i, "path": str(path(i))} for i in indices]


def _order(source: Source, batch_size: int, seed: int, copies: int) -> "_Reordered":
    """Indices of one epoch; beyond its end, those of the next."""
    used = steps_per_epoch(source, batch_size) * batch_size
    if not 1 <= copies <= batch_size:
        raise InputError(f"repeats must be between 1 and batch_size ({batch_size}), got {copies}")
    # Indices rather than records: Grain's overhead for a source is as large as loading a tiny image.
    shuffled = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    return _Reordered(shuffled, used, functools.partial(_copy, batch_size, copies))


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    in_channels: int,
    resize_mode: str = "pad",
    eval_resize: int = 0,
    damaged: Damaged | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Iterable[dict[str, np.ndarray]]:
    """Every image once, in order; the last batch is padded and masked.

    All processes get the same number of batches, as collective operations need; their masks count each image exactly
    once.

    Args:
      source: from `open_source`.
      batch_size: images per step over all processes.
      image_size: side of the square images.
      in_channels: 1 or 3.
      resize_mode: see `fit_image`.
      eval_resize: see `fit_image`.
      damaged: counts corrupt images, which are masked; None: a corrupt image is an error.
      process_index: of this process.
      process_count: number of processes.
      workers: processes that prepare batches; 0: threads of this process.

    Returns:
      An iterable (once only with `damaged`) of {"image": uint8 [b, image_size, image_size,
      in_channels], "label": int32 [b], "mask": bool [b]}, b = batch_size // process_count. Where the mask is
      False the image is black and the label 0.

    Raises:
      InputError: invalid arguments; while iterating, an image cannot be read.
    """
    local = _local_batch(batch_size, process_index, process_count, workers)
    check_resize(resize_mode, eval_resize, image_size)
    padded = -(-len(source) // batch_size) * batch_size
    load = _EvalLoad(source, image_size, in_channels, resize_mode, eval_resize, damaged is not None)
    share = grain.MapDataset.range(padded)[process_index::process_count]
    batches = _prefetch(share.map(load).batch(local), workers)
    return batches if damaged is None else damaged.sifted(batches)


def network_batches(
    source: Source, config: Any, data: Mapping[str, Any], batch_size: int, damaged: Damaged | None = None
) -> Iterable[dict[str, np.ndarray]]:
    """`eval_batches` for a network: its `ModelConfig`, and the "data" of its weights."""
    return eval_batches(
        source,
        batch_size=batch_size,
        image_size=config.image_size,
        in_channels=config.in_channels,
        resize_mode=data["resize_mode"],
        eval_resize=data["eval_resize"],
        damaged=damaged,
    )


def _local_batch(batch_size: int, process_index: int, process_count: int, workers: int) -> int:
    if workers < 0:
        raise InputError(f"workers must be 0 (threads) or a number of processes, got {workers}")
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index must be between 0 and {process_count - 1}, got {process_index}")
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"batch_size must be a positive multiple of process_count ({process_count}), got {batch_size}")
    return batch_size // process_count


def _prefetch(batches: grain.MapDataset, workers: int) -> grain.IterDataset:
    """Prefetches batches, in order; each is made by one thread or worker."""
    if workers:
        # To start a worker, Grain reads its absl flags, which e.g. a notebook has not parsed.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        return batches.to_iter_dataset(one_thread).mp_prefetch(options, worker_init_fn=_without_devices)
    threads = min(8, os.cpu_count() or 1)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2))


def _without_devices(index: int, count: int) -> None:
    """Called in each worker before anything else: whatever it computes with takes no accelerator's memory."""
    os.environ.update(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="", ROCR_VISIBLE_DEVICES="", TPU_VISIBLE_CHIPS="")
    jax.config.update("jax_platforms", "cpu")  # Grain has imported JAX, which read its environment then


@dataclasses.dataclass(frozen=True)
class _TrainLoad(grain.transforms.RandomMap):
    source: Source
    augment: Augment
    image_size: int
    in_channels: int
    tolerant: bool

    def random_map(self, element: int, rng: np.random.Generator) -> dict:
        if not self.tolerant:
            return self._load(element, rng)
        total = len(self.source)
        # Sources are sorted by class: the next image is nearly always of the same class.
        for index in range(element, element + min(total, TRIES)):
            with contextlib.suppress(DamagedImageError):
                record = self._load(index % total, rng)
                return record | {"damaged": np.int64(NONE if index == element else element)}
        return self._load(element, rng)

    def _load(self, index: int, rng: np.random.Generator) -> dict:
        # Encoded if possible: decoding is most of the work, and a crop needs only a part.
        source = self.source
        record = source.encoded(index) if isinstance(source, EncodedSource) else source[index]
        image = self.augment(record["image"], self.image_size, self.in_channels, rng)
        return {"image": image, "label": record["label"]}


@dataclasses.dataclass(frozen=True)
class _EvalLoad(grain.transforms.Map):
    source: Source
    image_size: int
    in_channels: int
    resize_mode: str
    eval_resize: int
    tolerant: bool

    def map(self, element: int) -> dict:
        extra = {"damaged": np.int64(NONE)} if self.tolerant else {}
        if element < len(self.source):
            try:
                record = self.source[element]
                image = fit_image(
                    record["image"], self.image_size, self.in_channels, self.resize_mode, self.eval_resize
                )
                return {"image": image, "label": record["label"], "mask": True, **extra}
            except DamagedImageError:
                if not self.tolerant:
                    raise
                extra = {"damaged": np.int64(element)}
        blank = np.zeros((self.image_size, self.image_size, self.in_channels), np.uint8)
        return {"image": blank, "label": np.int32(0), "mask": False, **extra}
