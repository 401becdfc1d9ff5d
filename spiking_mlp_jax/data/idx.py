"""IDX files, the format of MNIST and Fashion-MNIST: a big-endian header, then raw bytes."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from spiking_mlp_jax.errors import InputError

_PREFIX = {"train": "train", "test": "t10k"}
_DIMENSIONS = {"images": (3, 4), "labels": (1,)}  # grey or colour; labels


def find_idx(folder: Path, split: str, kind: str) -> Path | None:
    """The IDX file of a split, or None.

    Args:
      folder: where to look.
      split: "train" or "test".
      kind: "images" or "labels".
    """
    for joint in ("-", "."):  # both spellings circulate
        for suffix in ("", ".gz"):
            for dimensions in _DIMENSIONS[kind]:
                path = folder / f"{_PREFIX[split]}-{kind}{joint}idx{dimensions}-ubyte{suffix}"
                if path.is_file():
                    return path
    return None


def read_idx(path: Path, *dimensions: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes, gzip-compressed if its name ends in ".gz".

    Args:
      path: the file.
      dimensions: allowed numbers of axes: 3 for images [N, H, W], 4 for images [N, H, W, C], 1 for labels [N].

    Returns:
      uint8 array.

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
    magics = [bytes((0, 0, 8, count)) for count in dimensions]
    if data[:4] not in magics:
        raise InputError(
            f"{path} is not an IDX file of bytes with {' or '.join(map(str, dimensions))} dimensions (it starts with "
            f"0x{data[:4].hex()}, not {' or '.join(f'0x{magic.hex()}' for magic in magics)}): use the original file"
        )
    start = 4 + 4 * data[3]
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
    """Images uint8 [N, H, W, 1 | 3] and labels int32 [N] of one split.

    Raises:
      InputError: a file is missing or damaged, the numbers of images and labels differ, or images have neither 1 nor 3
        channels.
    """
    paths = {}
    for kind in ("images", "labels"):
        path = find_idx(folder, split, kind)
        if path is None:
            raise InputError(
                f"folder {folder} has no {_PREFIX[split]}-{kind}-idx{_DIMENSIONS[kind][0]}-ubyte[.gz]"
                f"{' (grey) or idx4 (colour)' if kind == 'images' else ''}: put the four standard IDX files there"
            )
        paths[kind] = path
    images, labels = (read_idx(paths[kind], *_DIMENSIONS[kind]) for kind in ("images", "labels"))
    if len(images) != len(labels):
        raise InputError(
            f"{paths['images']} holds {len(images)} images but {paths['labels']} holds {len(labels)} labels: "
            "use files of the same dataset"
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[-1] not in (1, 3):
        raise InputError(
            f"{paths['images']} holds images of shape {images.shape[1:]}: write [N, H, W] (grey) or "
            "[N, H, W, 3] (colour)"
        )
    return images, labels.astype(np.int32)
