"""IDX files, the format of MNIST and Fashion-MNIST: a big-endian header, then raw bytes."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from spiking_mlp_jax.errors import InputError

_PREFIX = {"train": "train", "test": "t10k"}
_DIMENSIONS = {"images": 3, "labels": 1}


def find_idx(folder: Path, split: str, kind: str) -> Path | None:
    """The IDX file of a split, or None.

    Args:
      folder: where to look.
      split: "train" or "test".
      kind: "images" or "labels".
    """
    for joint in ("-", "."):  # both spellings circulate
        for suffix in ("", ".gz"):
            path = folder / f"{_PREFIX[split]}-{kind}{joint}idx{_DIMENSIONS[kind]}-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes, gzip-compressed if its name ends in ".gz".

    Args:
      path: the file.
      dimensions: 3 for images [N, H, W], 1 for labels [N].

    Returns:
      uint8 array with `dimensions` axes.

    Raises:
      InputError: not such a file, truncated, or too long; the message names the file.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read IDX file {path} ({error}): download it again") from error
    # Two zero bytes, 8 for "unsigned byte", the number of dimensions.
    magic = bytes((0, 0, 8, dimensions))
    if data[:4] != magic:
        raise InputError(
            f"{path} is not an IDX file of bytes with {dimensions} dimensions (it starts with "
            f"0x{data[:4].hex()}, not 0x{magic.hex()}): use the original file"
        )
    start = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4))
    if len(data) < start or len(data) - start != math.prod(shape):
        raise InputError(
            f"IDX file {path} should hold {math.prod(shape)} bytes of data, but holds "
            f"{max(0, len(data) - start)}: download it again"
        )
    if 0 in shape:
        raise InputError(f"IDX file {path} is empty (shape {shape}): use a file with at least one entry")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_idx_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, 1] and labels int32 [N] of one split.

    Raises:
      InputError: a file is missing or damaged, or the numbers of images and labels differ.
    """
    paths = {}
    for kind in ("images", "labels"):
        path = find_idx(folder, split, kind)
        if path is None:
            raise InputError(
                f"folder {folder} has no {_PREFIX[split]}-{kind}-idx{_DIMENSIONS[kind]}-ubyte[.gz]: "
                "put the four standard IDX files there"
            )
        paths[kind] = path
    images, labels = read_idx(paths["images"], 3), read_idx(paths["labels"], 1)
    if len(images) != len(labels):
        raise InputError(
            f"{paths['images']} holds {len(images)} images but {paths['labels']} holds {len(labels)} labels: "
            "use files of the same dataset"
        )
    return images[..., None], labels.astype(np.int32)
