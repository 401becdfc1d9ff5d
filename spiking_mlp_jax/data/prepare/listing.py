"""The encoded images of a split: in one archive, or a file each."""

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

# TFDS's names of the splits.
SPLITS = {"train": "train", "val": "validation", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Listing:
    """Encoded images, in the order of their places on disk.

    Attributes:
      split: TFDS's name: "train", "validation" or "test".
      source: the archive, or the folder that the names are relative to.
      names: file names.
      labels: int64 [N].
      sizes: bytes of each, int64 [N].
      offsets: of each in the archive, int64 [N]; None if each is a file.
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
        """Listing of each class, int64 [K]."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def digest(self) -> str:
        """SHA-256 of names, labels, sizes and offsets; independent of where the archive or folder is."""
        result = hashlib.sha256("\n".join([*self.class_names, "", *self.names]).encode("utf-8", "surrogateescape"))
        for array in (self.labels, self.sizes, self.offsets):
            result.update(b"none" if array is None else array.astype("<i8").tobytes())
        return result.hexdigest()

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of the images from start to stop, read sequentially.

        Raises:
          InputError: a file or the archive cannot be read, or has changed since.
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
                        raise InputError(
                            f"{self.source} ends within {self.names[i]}: complete it, then rerun the same command"
                        )
                    yield data
        except OSError as error:
            where = error.filename or self.source
            raise InputError(
                f"cannot read {where} ({error.strerror or error}): restore it, then rerun the same command"
            ) from error


def list_folder(folder: Path, part: str) -> Listing:
    """The images in `folder`/`part`/<class>/, classes and files sorted by name.

    Args:
      folder: holds train, val or test.
      part: one of them.

    Raises:
      InputError: as for `FolderSource`.
    """
    source = FolderSource(folder, part)
    root, names, labels = source.listing()
    try:
        sizes = np.array([os.stat(f"{root}/{name}").st_size for name in names], np.int64)
    except OSError as error:
        raise InputError(f"cannot read {error.filename} ({error.strerror}): repair or remove it") from error
    return Listing(SPLITS[part], root, names, labels.astype(np.int64), sizes, None, source.class_names)


def save_listing(listing: Listing, path: Path) -> None:
    """Caches the listing of an archive: reading 1.3 million headers takes minutes on a slow disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    names = np.frombuffer("\n".join(listing.names).encode("utf-8", "surrogateescape"), np.uint8)
    with open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            state=_state(listing.source),
            names=names,
            class_names=np.array(listing.class_names),
            labels=listing.labels,
            sizes=listing.sizes,
            offsets=np.asarray(listing.offsets),
        )
    temporary.replace(path)


def load_listing(split: str, source: Path, path: Path) -> Listing | None:
    """The listing that `save_listing` cached; None if it is missing or the archive has changed."""
    try:
        with np.load(path, allow_pickle=False) as cached:
            if not np.array_equal(cached["state"], _state(source)):
                return None
            names = cached["names"].tobytes().decode("utf-8", "surrogateescape").split("\n")
            arrays = (cached["labels"], cached["sizes"], cached["offsets"])
            return Listing(split, source, names, *arrays, tuple(cached["class_names"].tolist()))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _state(path: Path) -> np.ndarray:
    status = path.stat()
    return np.array([status.st_size, status.st_mtime_ns], np.int64)
