"""The archives of ImageNet (ILSVRC2012): offset and class of each image.

`ILSVRC2012_img_train.tar` holds a tar for each of 1000 synsets, `ILSVRC2012_img_val.tar` holds numbered images.
Nothing is unpacked: only the headers are read here, and the images later by their offsets.
"""

from __future__ import annotations

import importlib.util
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from spiking_mlp_jax.data.prepare.listing import Listing
from spiking_mlp_jax.errors import InputError

# Russakovsky et al. 2015, "ImageNet Large Scale Visual Recognition Challenge", table 2.
TRAIN_IMAGES, FEWEST, MOST = 1_281_167, 732, 1300
VAL_IMAGES, VAL_PER_CLASS = 50_000, 50

_SYNSET_TAR = re.compile(r"(?:.*/)?(n\d{8})\.tar")
_TRAIN_IMAGE = re.compile(r"(?:.*/)?((n\d{8})_[^/]+\.jpe?g)", re.IGNORECASE)
_VAL_IMAGE = re.compile(r"(?:.*/)?(ILSVRC2012_val_(\d{8})\.jpe?g)", re.IGNORECASE)


def class_names() -> tuple[str, ...]:
    """The 1000 synsets, sorted; the index of one is its label.

    Raises:
      InputError: the installed tensorflow-datasets lacks them.
    """
    return tuple(_tfds_list("labels.txt", 1000))


def validation_labels(file: Path | None) -> list[str]:
    """The synset of each validation image: the first is that of ILSVRC2012_val_00000001.JPEG.

    Args:
      file: one line for each image: a synset, or an id from 1 to 1000 of the development kit, whose meta.mat must be in
        the same folder. None: the list of tensorflow-datasets.

    Raises:
      InputError: the file is missing or not such a list.
    """
    if file is None:
        return _tfds_list("validation_labels.txt", VAL_IMAGES)
    try:
        lines = file.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the validation labels {file} ({error}): use a text file") from error
    if lines and all(line.isdigit() for line in lines):
        lines = _from_devkit_ids(file, lines)
    known = set(class_names())
    for number, line in enumerate(lines, 1):
        if line not in known:
            raise InputError(
                f"line {number} of {file} must be a synset, e.g. n01440764, or an id of the development kit, got "
                f'"{line}": use one line for each validation image'
            )
    return lines


def _tfds_list(name: str, length: int) -> list[str]:
    # Without importing the package, which is slow.
    spec = importlib.util.find_spec("tensorflow_datasets")
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(root) / "datasets" / "imagenet2012" / name
        if path.is_file() and len(lines := path.read_text(encoding="ascii").split()) == length:
            return lines
    raise InputError(
        f"the installed tensorflow-datasets has no datasets/imagenet2012/{name} of {length:,} lines: "
        + ("name them with --val-labels" if length == VAL_IMAGES else "install version 4.9.9 or 4.9.10")
    )


def _from_devkit_ids(file: Path, ids: list[str]) -> list[str]:
    from scipy.io import loadmat

    meta = file.with_name("meta.mat")
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        names = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets}
        return [names[int(line)] for line in ids]
    except (OSError, ValueError, KeyError, TypeError, IndexError, NotImplementedError) as error:
        raise InputError(
            f"{file} holds ids, which need the development kit's meta.mat beside it, but {meta} cannot be read or "
            f"lacks them ({type(error).__name__}: {error}): copy it from ILSVRC2012_devkit_t12/data"
        ) from error


def list_train(archive: Path, progress: Callable[[int, int], None]) -> Listing:
    """The training images in `ILSVRC2012_img_train.tar`, in its order, which is by class.

    Args:
      archive: a tar of tars n01440764.tar, ..., each of images n01440764_10026.JPEG, ...
      progress: called with the bytes done and their total.

    Raises:
      InputError: another layout, an unknown synset, a duplicate name, or a truncated or corrupt archive.
    """
    labels = {name: label for label, name in enumerate(class_names())}
    found: list[tuple[str, int, int, int]] = []
    with _open(archive) as file:
        end = _size(file)
        for inner in list(_members(file, archive, 0, end)):
            match = _SYNSET_TAR.fullmatch(inner.name)
            if match is None or match[1] not in labels:
                raise InputError(
                    f"{archive} holds {inner.name}, which is not the tar of one of ImageNet's 1000 synsets, e.g. "
                    "n01440764.tar: use ILSVRC2012_img_train.tar"
                )
            for member in _members(file, archive, inner.offset_data, inner.offset_data + inner.size):
                image = _TRAIN_IMAGE.fullmatch(member.name)
                if image is None or image[2] != match[1]:
                    raise InputError(
                        f"{archive} holds {inner.name} with {member.name}, which is not an image {match[1]}_....JPEG: "
                        "use ILSVRC2012_img_train.tar"
                    )
                found.append((image[1], labels[match[1]], member.size, member.offset_data))
            progress(inner.offset_data + inner.size, end)
    return _listing("train", archive, found)


def list_val(archive: Path, file: Path | None, progress: Callable[[int, int], None]) -> Listing:
    """The validation images in `ILSVRC2012_img_val.tar`.

    Args:
      archive: a tar of ILSVRC2012_val_00000001.JPEG, ...
      file: their labels, see `validation_labels`.
      progress: called with the bytes done and their total.

    Raises:
      InputError: as for `list_train`, or an image has no label.
    """
    truth = validation_labels(file)
    labels = {name: label for label, name in enumerate(class_names())}
    found = []
    with _open(archive) as opened:
        end = _size(opened)
        for member in _members(opened, archive, 0, end):
            image = _VAL_IMAGE.fullmatch(member.name)
            if image is None:
                raise InputError(
                    f"{archive} holds {member.name}, which is not an image ILSVRC2012_val_....JPEG: "
                    "use ILSVRC2012_img_val.tar"
                )
            number = int(image[2])
            if not 1 <= number <= len(truth):
                raise InputError(
                    f"{image[1]} in {archive} has no label, there are {len(truth):,}: use labels of all images"
                )
            found.append((image[1], labels[truth[number - 1]], member.size, member.offset_data))
            progress(member.offset_data + member.size, end)
    return _listing("validation", archive, found)


def check_counts(listing: Listing) -> None:
    """Check the number of images, total and per class, against the published dataset.

    Raises:
      InputError: they differ.
    """
    total, fewest, most = TRAIN_IMAGES, FEWEST, MOST
    if listing.split != "train":
        total, fewest, most = VAL_IMAGES, VAL_PER_CLASS, VAL_PER_CLASS
    counts = listing.counts()
    odd = np.flatnonzero((counts < fewest) | (counts > most))
    if len(listing) == total and not len(odd):
        return
    wanted = f"{fewest} to {most:,}" if fewest < most else f"{most}"
    examples = ", ".join(f"{listing.class_names[label]} has {counts[label]:,}" for label in odd[:3])
    detail = f" and {len(odd)} classes do not have {wanted} ({examples}{', ...' * (len(odd) > 3)})" if len(odd) else ""
    raise InputError(
        f"{listing.source} holds {len(listing):,} images where ImageNet's {listing.split} set has {total:,}"
        f"{detail}: download it again, or add --partial to use these"
    )


def _open(archive: Path) -> BinaryIO:
    if archive.is_dir():
        raise InputError(f'{archive} is a folder, not a tar: for unpacked images use "spiking-mlp prepare folder"')
    try:
        return open(archive, "rb")
    except OSError as error:
        raise InputError(f"cannot open {archive} ({error.strerror}): use the path of the tar") from error


def _size(file: BinaryIO) -> int:
    return file.seek(0, 2)


def _members(file: BinaryIO, archive: Path, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """The files of the tar at bytes start to end of `file`; `offset_data` counts from the start of `file`.

    The position in `file` must not change between iterations.
    """
    position = start
    try:
        file.seek(start)
        with tarfile.TarFile(fileobj=file) as tar:  # starts at the current position
            while member := tar.next():
                position = tar.offset
                if member.offset_data + member.size > end:
                    raise InputError(f"{archive} is truncated within {member.name}: download it again")
                if member.isfile():
                    yield member
        file.seek(position)
        # To tarfile a corrupt header is the end; the real end is a block of zeros.
        if file.read(min(tarfile.BLOCKSIZE, max(0, end - position))).strip(b"\0"):
            raise InputError(f"{archive} is corrupt at byte {position:,}: download it again")
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{archive} is not an uncompressed tar, or is corrupt at byte {position:,} ({error}): download it again"
        ) from error


def _listing(split: str, archive: Path, found: list[tuple[str, int, int, int]]) -> Listing:
    if not found:
        raise InputError(f"{archive} holds no images: use the tar as downloaded")
    names = [entry[0] for entry in found]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise InputError(f"{archive} holds {twice} more than once: download it again")
    labels, sizes, offsets = np.array([entry[1:] for entry in found], np.int64).T
    return Listing(split, archive, names, labels.copy(), sizes.copy(), offsets.copy(), class_names())
