"""Labelled images with random access: embedded, in IDX files, in folders, or from TFDS."""

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from spiking_mlp_jax.data.idx import find_idx, read_idx_split
from spiking_mlp_jax.data.image import decode_image, read_encoded
from spiking_mlp_jax.data.tfds import TfdsSource, find_version
from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.utils.paths import user_path

FASHION_MNIST_FILE = Path(__file__).parent / "fashion_mnist" / "fashion_mnist.npz"
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DATASETS = ("fashion_mnist", "idx", "folder", "tfds:<name>")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class Source(Protocol):
    """Random access to labelled images.

    Attributes:
      class_names: one name per label.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict:
        """{"image": uint8 [H, W, C], "label": np.int32}."""
        ...


class Chosen:
    """Some images of a source.

    Args:
        source: where they come from.
        positions: of them in it, in the order they shall have here.
    """

    def __init__(self, source: Source, positions: Sequence[int]):
        self._source, self.positions = source, positions
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int, /) -> dict:
        return self._source[self.positions[index]]


def spread(source: Source, limit: int | None) -> Source:
    """At most `limit` images of a source, evenly spaced: sources are often sorted by class. None for all."""
    if limit is None or limit >= len(source):
        return source
    return Chosen(source, np.linspace(0, len(source) - 1, limit).round().astype(int).tolist())


@runtime_checkable
class EncodedSource(Source, Protocol):
    """A source that also returns images still encoded, so that a crop decodes only what it needs."""

    def encoded(self, index: int, /) -> dict:
        """{"image": Encoded, "label": np.int32}; or uint8 [H, W, C] if images are stored as arrays."""
        ...


def open_source(dataset: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> Source:
    """One split of a dataset.

    Args:
      dataset: "fashion_mnist": the embedded 20,000 training and 10,000 test images, or the full dataset if
        `data_dir` holds its IDX files or a TFDS copy; "idx": the four standard IDX files in `data_dir`;
        "folder": `data_dir`/train|val|test/<class>/*.jpg|jpeg|png; "tfds:<name>": a prepared TFDS dataset with
        `image` and `label`, in `data_dir` or TFDS's default folder.
      split: "train" or "test". Without a test split, "test" is val (folder) or validation (TFDS).
      data_dir: folder of the files; optional for "fashion_mnist" and "tfds:<name>".

    Returns:
      The source. Pickled into a worker process, it opens its files again.

    Raises:
      InputError: unknown dataset or split, or a missing or corrupt file; the message names the path.
    """
    if split not in ("train", "test"):
        raise InputError(f'unknown split "{split}": use "train" or "test"')
    if dataset not in DATASETS and not dataset.startswith("tfds:"):
        raise InputError(f'unknown dataset "{dataset}": {nearest(dataset, DATASETS)}')
    folder = user_path(data_dir) if data_dir else None
    if folder is not None and not folder.is_dir():
        raise InputError(f"data_dir {folder} is not a folder: use the folder of the dataset")
    if dataset == "fashion_mnist":
        return _open_fashion_mnist(split, folder)
    if dataset.startswith("tfds:"):
        return TfdsSource(find_version(dataset.removeprefix("tfds:"), folder), split)
    if folder is None:
        raise InputError(
            f'dataset "{dataset}" needs data_dir: name its folder with --data-dir, in training with --config.data_dir'
        )
    return IdxSource(folder, split) if dataset == "idx" else FolderSource(folder, split)


def check_classes(source: Source, num_classes: int, name: str, dataset: str) -> Source:
    """The source itself, after checking its number of classes.

    Raises:
        InputError: it differs from `num_classes`.
    """
    if len(source.class_names) != num_classes:
        raise InputError(
            f"{name} has {num_classes} classes, but {dataset} has {len(source.class_names)}: name its own dataset "
            "with --dataset and --data-dir"
        )
    return source


def identity(sources: Mapping[str, Source]) -> dict[str, Any]:
    """What tells a dataset from another, as JSON values; the folder it is in does not matter.

    Args:
        sources: {"train" or "test": source}, with the same classes.

    Returns:
        {"class_names": [...], split: {"images": count, "digest": of names and sizes of the files, or of the arrays}}.
        The digest is None for a source without `fingerprint`.
    """
    found: dict[str, Any] = {}
    for split, source in sources.items():
        fingerprint = getattr(source, "fingerprint", lambda: None)
        found["class_names"] = list(source.class_names)
        found[split] = {"images": len(source), "digest": fingerprint()}
    return found


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How two identities of datasets differ, in words; what one of them lacks is not compared.

    Examples:
        >>> differences({"class_names": ["a", "b"]}, {"class_names": ["b", "zebra"]})
        ['class 0 is "a" there, "b" now', 'class 1 is "b" there, "zebra" now']
    """
    found = []
    names, ours = saved.get("class_names") or [], now.get("class_names") or []
    numbers = [list(map(str, range(len(x)))) for x in (names, ours)]
    # IDX files hold numbers in place of names.
    if names and ours and names != numbers[0] and ours != numbers[1]:
        if len(names) != len(ours):
            found.append(f"{len(names)} classes there, {len(ours)} now")
        other = [i for i, (a, b) in enumerate(zip(names, ours, strict=False)) if a != b]
        found += [f'class {i} is "{names[i]}" there, "{ours[i]}" now' for i in other[:3]]
        found += [f"{len(other) - 3} more classes differ"] if len(other) > 3 else []
    for split, word in (("train", "training"), ("test", "test")):
        before, after = saved.get(split), now.get(split)
        if not before or not after:
            continue
        if before["images"] != after["images"]:
            found.append(f"{before['images']:,} {word} images there, {after['images']:,} now")
        elif before["digest"] and after["digest"] and before["digest"] != after["digest"]:
            found.append(f"the {word} images differ in names, sizes or contents")
    return found


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], where: str, allowed: bool) -> str | None:
    """Compares the data with those of a run or of a network.

    Args:
        saved: their `identity`; {} where an older version saved none.
        now: the identity of the data in use.
        where: what has the other data, e.g. "the run in DIR".
        allowed: whether other data are allowed.

    Returns:
        the differences that are allowed, in words; None if there are none.

    Raises:
        InputError: the data differ, and that is not allowed.
    """
    found = differences(saved, now)
    if not found:
        return None
    text = f"{where} has other data: {'; '.join(found)}"
    if allowed:
        return text
    raise InputError(f"{text}: use the same data, or set allow_other_data")


def _digest(parts) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _open_fashion_mnist(split: str, folder: Path | None) -> Source:
    if folder is None:
        return EmbeddedSource(split)
    # One IDX file is enough to choose this format: the error then names the missing files.
    if any(find_idx(folder, part, kind) for part in ("train", "test") for kind in ("images", "labels")):
        return IdxSource(folder, split, FASHION_MNIST_CLASSES)
    try:
        version = find_version("fashion_mnist", folder)
    except InputError as error:
        raise InputError(
            f"data_dir {folder} holds neither the IDX files of Fashion-MNIST (train-images-idx3-ubyte.gz and so on) "
            "nor a prepared TFDS copy: use the folder of one, or no data_dir for the embedded images"
        ) from error
    return TfdsSource(version, split)


class _ArraySource:
    """Images and labels held in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]):
        self._images = images  # uint8 [N, H, W, C]
        self._labels = labels  # int32 [N]
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int, /) -> dict:
        return {"image": self._images[index], "label": self._labels[index]}

    def fingerprint(self) -> str:
        """A digest of the arrays."""
        arrays = self._images, self._labels
        return _digest(part for x in arrays for part in (str((x.shape, x.dtype)).encode(), np.ascontiguousarray(x)))


class EmbeddedSource(_ArraySource):
    """The part of Fashion-MNIST in this package: 20,000 training and all 10,000 test images, 28 x 28 x 1.

    The training images are the first 2,000 of each class, in their original order.
    """

    def __init__(self, split: str):
        self._split = split
        with np.load(FASHION_MNIST_FILE, allow_pickle=False) as arrays:
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        super().__init__(images[..., None], labels.astype(np.int32), FASHION_MNIST_CLASSES)

    def __reduce__(self):
        return EmbeddedSource, (self._split,)  # workers read the file, which is cheaper than pickling the pixels


class IdxSource(_ArraySource):
    """A pair of IDX files, read into memory.

    Args:
      folder: holds the four standard files.
      split: "train" or "test".
      class_names: names of the labels; None takes "0", "1", ... up to the largest label of both splits.

    Raises:
      InputError: a file is missing or corrupt, or a label has no name.
    """

    def __init__(self, folder: Path, split: str, class_names: tuple[str, ...] | None = None):
        self._arguments = (folder, split, class_names)
        images, labels = read_idx_split(folder, split)
        if class_names is None:
            _, other = read_idx_split(folder, "train" if split == "test" else "test")
            class_names = tuple(str(label) for label in range(max(labels.max(), other.max()) + 1))
        elif labels.max() >= len(class_names):
            raise InputError(
                f"the {split} labels in {folder} go up to {labels.max()}, but there are only "
                f"{len(class_names)} classes: use the files of this dataset"
            )
        super().__init__(images, labels, class_names)

    def __reduce__(self):
        return IdxSource, self._arguments


class FolderSource:
    """Images in `folder`/train|val|test/<class>/, decoded on access; classes sorted by name.

    Raises:
      InputError: the split, its classes or the images of a class are missing, or the splits' classes differ; on
        access, an image cannot be decoded. The message names the path.
    """

    def __init__(self, folder: Path, split: str):
        root = folder / split
        if split == "test" and not root.is_dir():
            root = folder / "val"
        if not root.is_dir():
            wanted = "train" if split == "train" else "test (or val)"
            raise InputError(f"{folder} has no folder {wanted}: expected {folder}/train|val|test/<class>/*.jpg|png")
        self._root = root
        self.class_names = _class_folders(root)
        if not self.class_names:
            raise InputError(f"{root} has no class folders: expected {root}/<class>/*.jpg|jpeg|png")
        for other in ("train", "val", "test"):
            other_root = folder / other
            if other_root.is_dir() and (different := set(_class_folders(other_root)) ^ set(self.class_names)):
                raise InputError(
                    f'{root} and {other_root} have different classes ("{min(different)}" is in only one): '
                    "use the same class folders in all splits"
                )
        self._files: list[str] = []
        labels = []
        for label, name in enumerate(self.class_names):
            files = sorted(
                entry.name
                for entry in os.scandir(root / name)
                if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith(".")
            )
            if not files:
                raise InputError(f"class folder {root / name} has no .jpg, .jpeg or .png image: fill or remove it")
            self._files += [f"{name}/{file}" for file in files]
            labels += [label] * len(files)
        self._labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int, /) -> dict:
        record = self.encoded(index)
        return {**record, "image": decode_image(*record["image"])}

    def encoded(self, index: int, /) -> dict:
        """{"image": Encoded, "label": np.int32}."""
        return {"image": read_encoded(self.path(index)), "label": self._labels[index]}

    def path(self, index: int) -> str:
        """The file of an image."""
        return f"{self._root}/{self._files[index]}"

    def fingerprint(self) -> str:
        """A digest of the files' names and sizes."""
        sizes = []
        for file in self._files:
            sizes.append(-1)
            with contextlib.suppress(OSError):  # a file that has vanished counts as damaged when it is read
                sizes[-1] = os.stat(f"{self._root}/{file}").st_size
        return _digest(b"%s %d\0" % (os.fsencode(file), size) for file, size in zip(self._files, sizes, strict=True))

    def listing(self) -> tuple[Path, list[str], np.ndarray]:
        """The split's folder, the files' paths relative to it, and their labels, int32 [N]."""
        return self._root, self._files, self._labels


def _class_folders(root: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")))
