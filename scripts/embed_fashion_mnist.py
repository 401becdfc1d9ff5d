"""Rebuild the Fashion-MNIST file inside the package from the original IDX files.

    apt-get install dataset-fashion-mnist         # Debian, Ubuntu; puts the files where --idx looks first
    python scripts/embed_fashion_mnist.py         # writes the file
    python scripts/embed_fashion_mnist.py --check # compares it

They are then in /usr/share/datasets/fashion-mnist; `--idx DIR` and `--out FILE` name other places.

The rule: the first 2,000 training images of each class, in the order of the original file, and the complete
test set. The file is an .npz archive (deflate, level 9, fixed timestamps) of four uint8 arrays: train_images
[20000, 28, 28], train_labels [20000], test_images [10000, 28, 28], test_labels [10000]. The same zlib gives
the same bytes; with another, --check compares the arrays.
"""

import argparse
import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

from spiking_mlp_jax.data.idx import read_idx_split
from spiking_mlp_jax.data.sources import FASHION_MNIST_CLASSES, FASHION_MNIST_FILE
from spiking_mlp_jax.errors import InputError

PER_CLASS = 2_000


def select(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Sorted indices of the first `per_class` entries of each class in labels [N]."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in np.unique(labels)]))


def build(idx_folder: Path) -> dict[str, np.ndarray]:
    """The four arrays to embed, from the four IDX files in `idx_folder`.

    Raises:
      InputError: a file is missing or damaged, or a class has too few images.
    """
    arrays = {}
    for split in ("train", "test"):
        images, labels = read_idx_split(idx_folder, split)
        if split == "train":
            chosen = select(labels, PER_CLASS)
            if len(chosen) != PER_CLASS * len(FASHION_MNIST_CLASSES):
                raise InputError(f"{idx_folder} has too few training images in some class: give the full set.")
            images, labels = images[chosen], labels[chosen]
        arrays[f"{split}_images"] = images[..., 0]
        arrays[f"{split}_labels"] = labels.astype(np.uint8)
    return arrays


def encode(arrays: dict[str, np.ndarray]) -> bytes:
    """An .npz archive that depends on the arrays only (np.savez would store the time)."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as target:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.create_system = 3  # by default the operating system
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            target.writestr(member, content.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
    return archive.getvalue()


def check(arrays: dict[str, np.ndarray], file: Path) -> str:
    """Compare with a shipped file: "identical", "same arrays" (another zlib) or what differs."""
    if file.read_bytes() == encode(arrays):
        return "identical"
    with np.load(file, allow_pickle=False) as shipped:
        if set(shipped.files) != set(arrays):
            return f"different arrays: {sorted(shipped.files)}"
        for name, array in arrays.items():
            if not np.array_equal(shipped[name], array):
                return f"different: {name}"
    return "same arrays"


def main() -> int:
    """Write or check the file; the exit status is 1 if the check fails and 2 on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--idx",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of the four IDX files",
    )
    parser.add_argument("--out", type=Path, default=FASHION_MNIST_FILE, help="file to write, or to check")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    arguments = parser.parse_args()
    try:
        arrays = build(arguments.idx)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.check:
        result = check(arrays, arguments.out)
        print(f"{arguments.out}: {result}")
        return 0 if result in ("identical", "same arrays") else 1
    data = encode(arrays)
    temporary = arguments.out.with_name(arguments.out.name + ".partial")
    temporary.write_bytes(data)
    os.replace(temporary, arguments.out)
    print(f"{arguments.out}: {len(data) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
