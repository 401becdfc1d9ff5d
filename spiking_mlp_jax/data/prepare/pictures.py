"""Where the encoded pictures of one split lie: in one archive, or in a file each."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spiking_mlp_jax.data.sources import FolderSource
from spiking_mlp_jax.errors import InputError

# How TFDS calls the folders of a split.
SPLITS = {"train": "train", "val": "validation", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Encoded pictures, in the order in which they lie on the disk.

    Attributes:
      split: as TFDS calls it: "train", "validation" or "test".
      source: the archive, or the folder that the names start from.
      names: file names.
      labels: int64 [N].
      sizes: bytes of each, int64 [N].
      offsets: where each starts in the archive, int64 [N]; None when each is a file of its own.
      class_names: one for each label.
    """

    split: str
    source: Path
    names: list[str]
    labels: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray | None
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def counts(self) -> np.ndarray:
        """Pictures of each class, int64 [K]."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def digest(self) -> str:
        """Tells whether two lists of pictures are the same: names, labels, sizes and places, wherever they are kept."""
        result = hashlib.sha256("\n".join([*self.class_names, "", *self.names]).encode("utf-8", "surrogateescape"))
        for array in (self.labels, self.sizes, self.offsets):
            result.update(b"none" if array is None else array.astype("<i8").tobytes())
        return result.hexdigest()

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of the pictures from start to stop, read from front to back.

        Raises:
          InputError: a file or the archive cannot be read, or changed since it was listed.
        """
        try:
            if self.offsets is None:
                for name in self.names[start:stop]:
                    yield (self.source / name).read_bytes()
                return
            with open(self.source, "rb") as file:
                for i in range(start, stop):
                    file.seek(self.offsets[i])
                    data = file.read(self.sizes[i])
                    if len(data) < self.sizes[i]:
                        raise InputError(f"{self.source} ends within {self.names[i]}: start again once it is complete.")
                    yield data
        except OSError as error:
            where = error.filename or self.source
            raise InputError(
                f"Cannot read {where} ({error.strerror or error}): start again once it is there."
            ) from error


def folder_pictures(folder: Path, part: str) -> Pictures:
    """The pictures in `folder`/`part`/<class>/, classes and files sorted by name.

    Args:
      folder: holds train, val or test.
      part: which of them.

    Raises:
      InputError: as for `FolderSource`.
    """
    source = FolderSource(folder, part)
    root, names, labels = source.listing()
    try:
        sizes = np.array([os.stat(f"{root}/{name}").st_size for name in names], np.int64)
    except OSError as error:
        raise InputError(f"Cannot read {error.filename} ({error.strerror}): repair or remove it.") from error
    return Pictures(SPLITS[part], root, names, labels.astype(np.int64), sizes, None, source.class_names)


def save_listing(pictures: Pictures, path: Path) -> None:
    """Keeps the list of an archive's pictures, because reading 1.3 million headers takes minutes on a slow disk."""
    if pictures.offsets is None:
        raise ValueError("only an archive's pictures are kept in a list")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    names = np.frombuffer("\n".join(pictures.names).encode("utf-8", "surrogateescape"), np.uint8)
    with open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            state=_state(pictures.source),
            names=names,
            class_names=np.array(pictures.class_names),
            labels=pictures.labels,
            sizes=pictures.sizes,
            offsets=pictures.offsets,
        )
    temporary.replace(path)


def load_listing(split: str, source: Path, path: Path) -> Pictures | None:
    """The list that `save_listing` kept; None if there is none, or if the archive is not the same file any more."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            if not np.array_equal(kept["state"], _state(source)):
                return None
            names = kept["names"].tobytes().decode("utf-8", "surrogateescape").split("\n")
            arrays = (kept["labels"], kept["sizes"], kept["offsets"])
            return Pictures(split, source, names, *arrays, tuple(kept["class_names"].tolist()))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # it is made anew


def _state(path: Path) -> np.ndarray:
    status = path.stat()
    return np.array([status.st_size, status.st_mtime_ns], np.int64)
