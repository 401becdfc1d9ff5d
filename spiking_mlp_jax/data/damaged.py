"""Damaged images while training and evaluating: skipped, counted and named, until there are too many."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from spiking_mlp_jax.data.sources import EncodedSource, Source
from spiking_mlp_jax.errors import InputError

NONE = -1  # stands for "not damaged" in a batch's "damaged"


class Damaged:
    """Keeps count of a source's images that cannot be decoded.

    Each process of a run counts the images that it read itself.

    Args:
      source: where the images come from.
      limit: largest share of its images that may be damaged, 0 to 1.
      say: is told of each damaged image once, in a sentence.

    Attributes:
      seen: positions in the source of those met so far; to be saved and restored with a run.
    """

    def __init__(self, source: Source, limit: float, say: Callable[[str], None]):
        self._source, self._limit, self._say = source, limit, say
        self.seen: set[int] = set()

    def sift(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Takes "damaged" int64 [b] out of a batch: each image's position if it is damaged, otherwise -1.

        Raises:
          InputError: there are more than `limit` allows.
        """
        batch = dict(batch)
        for index in sorted(set(batch.pop("damaged").tolist()) - {NONE} - self.seen):
            self.seen.add(index)
            count, total = len(self.seen), len(self._source)
            if count > self._limit * total:
                raise InputError(
                    f"Cannot decode image {self._name(index)}, and {count} damaged of {total} are more than "
                    f"max_bad_images {self._limit} allows: replace or remove the damaged files."
                )
            self._say(f"warning: cannot decode image {self._name(index)}: left out ({count} damaged of {total} so far)")
        return batch

    def sifted(self, batches: Iterable[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """`sift` of each batch."""
        return map(self.sift, batches)

    def _name(self, index):
        source = self._source
        return source.encoded(index)["image"].where if isinstance(source, EncodedSource) else str(index)
