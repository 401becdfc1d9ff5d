"""Corrupt images in training and evaluation: skipped, counted and logged, up to a limit."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from spiking_mlp_jax.data.image import DamagedImageError
from spiking_mlp_jax.data.sources import EncodedSource, Source
from spiking_mlp_jax.errors import InputError

NONE = -1  # "damaged" of an image that could be decoded


class Damaged:
    """Count the corrupt images of a source.

    The processes of a run read different images; `share` exchanges what each has found.

    Args:
      source: the images.
      limit: largest share of them that may be corrupt, 0 to 1.
      say: called once for each corrupt image, with a message.
      union: collective union of a set of positions over all processes; None for a single process.

    Attributes:
      seen: positions of the corrupt images found so far; part of a checkpoint.
    """

    def __init__(
        self,
        source: Source,
        limit: float,
        say: Callable[[str], None],
        union: Callable[[set[int]], set[int]] | None = None,
    ):
        self._source, self._limit, self._say, self._union = source, limit, say, union
        self.seen: set[int] = set()
        self._unshared: set[int] = set()

    def sift(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch without "damaged", int64 [b]: the position of a corrupt image, otherwise -1.

        Raises:
          InputError: more are corrupt than `limit` allows.
        """
        batch = dict(batch)
        found = set(batch.pop("damaged").tolist()) - {NONE}
        if self._union is None:
            self._count(found)
        else:
            self._unshared |= found - self.seen
        return batch

    def share(self) -> None:
        """Count what all processes found since the last call; collective.

        Raises:
          InputError: more are corrupt than `limit` allows.
        """
        if self._union is not None:
            found, self._unshared = self._union(self._unshared), set()
            self._count(found)

    def _count(self, found: set[int]) -> None:
        for index in sorted(found - self.seen):
            self.seen.add(index)
            count, total = len(self.seen), len(self._source)
            if count > self._limit * total:
                raise InputError(
                    f"cannot decode image {self._name(index)}: {count} of {total} images are corrupt, more than "
                    f"max_bad_images={self._limit} allows: replace or remove the corrupt files"
                )
            self._say(f"warning: skipped corrupt image {self._name(index)} ({count} of {total} so far)")

    def sifted(self, batches: Iterable[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """`sift` of each batch."""
        return map(self.sift, batches)

    def _name(self, index):
        source = self._source
        path = getattr(source, "path", None)
        if path is not None:
            return str(path(index))  # without reading it: it may have vanished
        return source.encoded(index)["image"].where if isinstance(source, EncodedSource) else str(index)


def next_decodable(source: Source, index: int) -> dict:
    """The record at a position, or the next one whose image can be decoded.

    Raises:
      DamagedImageError: no image can be decoded.
    """
    for at in range(index, index + len(source)):
        with contextlib.suppress(DamagedImageError):
            return source[at % len(source)]
    return source[index]
