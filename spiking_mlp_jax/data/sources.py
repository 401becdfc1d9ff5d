"""Labelled images with random access: embedded, in arrays, IDX or .npz files, in folders, or from TFDS."""

import contextlib
import hashlib
import os
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from spiking_mlp_jax.data.idx import find_idx, read_idx_split
from spiking_mlp_jax.data.image import DamagedImageError, decode_image, read_encoded
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
DATASETS = ("fashion_mnist", "idx", "folder", "npz:<file>", "tfds:<name>")
ARRAYS = "arrays"  # the dataset of a run whose images were passed to `fit`
NPZ_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
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


def spaced(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spaced."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def spread(source: Source, limit: int | None) -> Source:
    """At most `limit` images of a source, evenly spaced: sources are often sorted by class. None for all."""
    if limit is None or limit >= len(source):
        return source
    return Chosen(source, spaced(len(source), limit))


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
        "folder": `data_dir`/train|val|test/<class>/*.jpg|jpeg|png; "npz:<file>": see `NpzSource`, a relative path
        starts at `data_dir`, if given, else at the working folder; "tfds:<name>": a prepared TFDS dataset with `image`
        and `label`, in `data_dir` or TFDS's default folder.
      split: "train" or "test". Without a test split, "test" is val (folder) or validation (TFDS).
      data_dir: folder of the files; optional for "fashion_mnist", "npz:<file>" and "tfds:<name>".

    Returns:
      The source. Pickled into a worker process, it opens its files again.

    Raises:
      InputError: unknown dataset or split, or a missing or corrupt file; the message names the path.
    """
    if split not in ("train", "test"):
        raise InputError(f'unknown split "{split}": use "train" or "test"')
    if dataset == ARRAYS:
        raise InputError(
            "the network was trained on arrays passed to fit: pass train_data and test_data to fit again, or name a "
            "dataset, in commands with --dataset and --data-dir"
        )
    check_dataset(dataset)
    folder = user_path(data_dir) if data_dir else None
    if folder is not None and not folder.is_dir():
        raise InputError(f"data_dir {folder} is not a folder: use the folder of the dataset")
    if dataset == "fashion_mnist":
        return _open_fashion_mnist(split, folder)
    if dataset.startswith("tfds:"):
        source = TfdsSource(find_version(dataset.removeprefix("tfds:"), folder), split)
        _readable(source.class_names, dataset)
        return source
    if dataset.startswith("npz:"):
        return NpzSource((folder or Path()) / user_path(dataset.removeprefix("npz:")), split)
    if folder is None:
        raise InputError(
            f'dataset "{dataset}" needs data_dir: name its folder with --data-dir, in training with --config.data_dir'
        )
    return IdxSource(folder, split) if dataset == "idx" else FolderSource(folder, split)


def check_dataset(dataset: str) -> None:
    """Raise InputError unless `open_source` knows datasets of this name."""
    kind, _, name = dataset.partition(":")
    if dataset not in DATASETS and not (name and kind in ("npz", "tfds")):
        raise InputError(f'unknown dataset "{dataset}": {nearest(dataset, DATASETS)}')


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


def array_sources(train_data: Any, test_data: Any, num_classes: int) -> dict[str, Source]:
    """Sources of images in memory, by split; their classes are named "0", "1", ...

    Args:
      train_data: (images, labels): uint8 [N, H, W] or [N, H, W, C] with C = 1, 3 or 4, and integers [N] below
        `num_classes`; None: no such split.
      test_data: likewise.
      num_classes: number of classes.

    Raises:
      InputError: other arrays.
    """
    sources: dict[str, Source] = {}
    for split, data in (("train", train_data), ("test", test_data)):
        if data is None:
            continue
        if not isinstance(data, tuple | list) or len(data) != 2:
            raise InputError(f"{split}_data must be a pair (images, labels), got {type(data).__name__}")
        try:
            images, labels = map(np.asarray, data)
        except ValueError as error:
            raise InputError(f"{split}_data must hold arrays of one shape per image ({error})") from error
        images, labels = _checked_images(images, f"{split}_data[0]"), _checked_labels(labels, f"{split}_data[1]")
        if len(images) != len(labels):
            raise InputError(
                f"{split}_data holds {len(images)} images but {len(labels)} labels: pass one label per image"
            )
        if labels.max() >= num_classes:
            raise InputError(f"the labels in {split}_data go up to {labels.max()}, but num_classes is {num_classes}")
        sources[split] = _ArraySource(images, labels, tuple(map(str, range(num_classes))))
    return sources


def _checked_images(images: np.ndarray, where: str) -> np.ndarray:
    if images.dtype != np.uint8:
        raise InputError(
            f"{where} holds {images.dtype}: convert to uint8 from 0 to 255; values from 0 to 1 with "
            "np.round(255 * images).astype(np.uint8)"
        )
    if images.ndim == 4 and images.shape[-1] not in (1, 3, 4) and images.shape[1] in (1, 3, 4):
        raise InputError(f"{where} has shape {images.shape}: channels come last, use images.transpose(0, 2, 3, 1)")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3, 4)):
        raise InputError(f"{where} has shape {images.shape}: use [N, H, W] or [N, H, W, C] with 1, 3 or 4 channels")
    if not images.size:
        raise InputError(f"{where} is empty (shape {images.shape}): use at least one image")
    return images if images.ndim == 4 else images[..., None]


def _checked_labels(labels: np.ndarray, where: str) -> np.ndarray:
    if labels.ndim != 1:
        hint = "; from one-hot labels with labels.argmax(1)" if labels.ndim == 2 and labels.shape[1] > 1 else ""
        raise InputError(f"{where} has shape {labels.shape}: use one integer per image, [N]{hint}")
    if labels.dtype.kind not in "iu":
        raise InputError(f"{where} holds {labels.dtype}: use integers from 0, one per class")
    if not labels.size:
        raise InputError(f"{where} is empty: use at least one image")
    if labels.min() < 0 or labels.max() >= 2**31:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise InputError(f"{where} holds the label {wrong}: number the classes from 0")
    return labels.astype(np.int32)


class NpzSource(_ArraySource):
    """A split of a NumPy archive, read into memory.

    Args:
      file: holds train_images and test_images, uint8 [N, H, W] or [N, H, W, C] with C = 1, 3 or 4; train_labels and
        test_labels, integers [N]; optionally class_names, strings [classes], else "0", "1", ... up to the largest label
        of both splits. Archives with pickled objects are refused.
      split: "train" or "test".

    Raises:
      InputError: a missing or corrupt file or array; the message names the file and the array.
    """

    def __init__(self, file: Path, split: str):
        self._arguments = (file, split)
        try:
            with file.open("rb") as opened:
                archive: Any = np.load(opened, allow_pickle=False)
                if isinstance(archive, np.ndarray):
                    raise InputError(f"{file} holds a single array: save an archive with np.savez({_savez()})")
                if missing := [name for name in NPZ_ARRAYS if name not in archive]:
                    raise InputError(
                        f"{file} has no {' and no '.join(missing)}, it holds {', '.join(archive) or 'nothing'}: save "
                        f"it with np.savez({_savez()})"
                    )
                labels = {part: _npz_array(archive, file, f"{part}_labels") for part in ("train", "test")}
                images = _npz_array(archive, file, f"{split}_images")
                names = _npz_array(archive, file, "class_names") if "class_names" in archive else None
        except FileNotFoundError as error:
            raise InputError(f"there is no file {file.absolute()}: name a .npz file") from error
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file} is not a NumPy archive, or it is corrupt: save it again with np.savez") from error
        labels = {part: _checked_labels(array, f"{part}_labels in {file}") for part, array in labels.items()}
        images = _checked_images(images, f"{split}_images in {file}")
        if len(images) != len(labels[split]):
            raise InputError(
                f"{file} holds {len(images)} {split}_images but {len(labels[split])} {split}_labels: save one label "
                "per image"
            )
        largest = max(int(array.max()) for array in labels.values())
        super().__init__(images, labels[split], _npz_names(names, largest, file))

    def __reduce__(self):
        return NpzSource, self._arguments


def _savez() -> str:
    return "file, " + ", ".join(f"{name}=..." for name in NPZ_ARRAYS)


def _npz_array(archive: Mapping[str, Any], file: Path, name: str) -> np.ndarray:
    try:
        array = archive[name]
    except (ValueError, MemoryError) as error:  # objects, or more than memory holds
        raise InputError(
            f"{name} in {file} cannot be read ({' '.join(str(error).split())}): save plain arrays, "
            "class_names as strings"
        ) from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name} in {file} is not an array: save it with np.savez")
    return array


def _npz_names(names: np.ndarray | None, largest: int, file: Path) -> tuple[str, ...]:
    if names is None:
        return tuple(map(str, range(largest + 1)))
    if names.dtype.kind != "U" or names.ndim != 1 or "" in names or len(set(names.tolist())) != len(names):
        raise InputError(f"class_names in {file} must be different strings, [classes], got {names.dtype} {names.shape}")
    if largest >= len(names):
        raise InputError(f"the labels in {file} go up to {largest}, but there are only {len(names)} class_names")
    return _readable(names.tolist(), file)


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
        try:
            return {"image": read_encoded(self.path(index)), "label": self._labels[index]}
        except DamagedImageError:
            raise
        except InputError as error:
            # The file was there when the source was opened: one that has vanished since counts as damaged.
            raise DamagedImageError(str(error)) from error

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
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    return _readable(names, root)


def _readable(names: Iterable[str], where: str | os.PathLike[str]) -> tuple[str, ...]:
    """Class names that every file and terminal can hold, and that differ for people, too.

    Raises:
      InputError: a name is not UTF-8 or has control characters, or two differ only in how accents are encoded.
    """
    seen: dict[str, str] = {}
    for name in names:
        # Surrogates (Cs) stand for bytes that are not UTF-8. Other formatting, e.g. of Persian, is text.
        if {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, name)):
            raise InputError(f"class name {name!a} in {where} is not printable UTF-8 text: rename it")
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise InputError(f"class names {other!a} and {name!a} in {where} look the same: merge or rename one")
    return tuple(names)
