"""Damaged images while training and evaluating: skipped, counted and named, until there are too many."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from spiking_mlp_jax.data.image import DamagedImageError
from spiking_mlp_jax.data.sources import EncodedSource, Source
from spiking_mlp_jax.errors import InputError

NONE = -1  # stands for "not damaged" in a batch's "damaged"


class Damaged:
    """Keeps count of a source's images that cannot be decoded.

    The processes of a run read different images: each remembers what it met, and `share` makes that known to all.

    Args:
      source: where the images come from.
      limit: largest share of its images that may be damaged, 0 to 1.
      say: is told of each damaged image once, in a sentence.
      union: function of positions to those of all processes, which call it together; None where there is one.

    Attributes:
      seen: positions in the source of those met so far; to be saved and restored with a run.
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
        """Takes "damaged" int64 [b] out of a batch: each image's position if it is damaged, otherwise -1.

        Raises:
          InputError: there are more than `limit` allows.
        """
        batch = dict(batch)
        found = set(batch.pop("damaged").tolist()) - {NONE}
        if self._union is None:
            self._count(found)
        else:
            self._unshared |= found - self.seen
        return batch

    def share(self) -> None:
        """Counts what any process has met since the last time; all of them call it together.

        Raises:
          InputError: there are more than `limit` allows.
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
                    f"Cannot decode image {self._name(index)}, and {count} damaged of {total} are more than "
                    f"max_bad_images {self._limit} allows: replace or remove the damaged files."
                )
            self._say(f"warning: cannot decode image {self._name(index)}: left out ({count} damaged of {total} so far)")

    def sifted(self, batches: Iterable[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """`sift` of each batch."""
        return map(self.sift, batches)

    def _name(self, index):
        source = self._source
        return source.encoded(index)["image"].where if isinstance(source, EncodedSource) else str(index)


def next_decodable(source: Source, index: int) -> dict:
    """The record at a position or, where its image is damaged, the next one whose image is not.

    Raises:
      DamagedImageError: of the image at the position, if no other can be decoded.
    """
    for at in range(index, index + len(source)):
        with contextlib.suppress(DamagedImageError):
            return source[at % len(source)]
    return source[index]
