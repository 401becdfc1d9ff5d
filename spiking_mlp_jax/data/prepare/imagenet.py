"""The archives of ImageNet's ILSVRC2012: which picture lies where, and which class it is of.

`ILSVRC2012_img_train.tar` holds a tar for each of 1000 synsets, `ILSVRC2012_img_val.tar` holds pictures with numbers.
Nothing is unpacked: only the headers are read, and pictures later by their place.
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

from spiking_mlp_jax.data.prepare.pictures import Pictures
from spiking_mlp_jax.errors import InputError

# Russakovsky et al. 2015, "ImageNet Large Scale Visual Recognition Challenge", table 2.
TRAIN_IMAGES, FEWEST, MOST = 1_281_167, 732, 1300
VAL_IMAGES, VAL_PER_CLASS = 50_000, 50

_SYNSET_TAR = re.compile(r"(?:.*/)?(n\d{8})\.tar")
_TRAIN_PICTURE = re.compile(r"(?:.*/)?((n\d{8})_[^/]+\.jpe?g)", re.IGNORECASE)
_VAL_PICTURE = re.compile(r"(?:.*/)?(ILSVRC2012_val_(\d{8})\.jpe?g)", re.IGNORECASE)


def class_names() -> tuple[str, ...]:
    """The 1000 synsets, sorted; the place of one is its label.

    Raises:
      InputError: the installed tensorflow-datasets does not hold them.
    """
    return tuple(_tfds_list("labels.txt", 1000))


def validation_labels(file: Path | None) -> list[str]:
    """The synset of each validation picture: the first is that of ILSVRC2012_val_00000001.JPEG.

    Args:
      file: None takes the list that comes with tensorflow-datasets. Otherwise one line for each picture, a synset, or
        an id from 1 to 1000 of the development kit, whose meta.mat then lies beside it.

    Raises:
      InputError: the file is missing or holds something else.
    """
    if file is None:
        return _tfds_list("validation_labels.txt", VAL_IMAGES)
    try:
        lines = file.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read the validation labels {file} ({error}): give a text file.") from error
    if lines and all(line.isdigit() for line in lines):
        lines = _from_devkit_ids(file, lines)
    known = set(class_names())
    for number, line in enumerate(lines, 1):
        if line not in known:
            raise InputError(
                f'Line {number} of {file} is "{line}", but a synset such as n01440764 or an id of the development kit '
                "is needed: give one line for each validation picture."
            )
    return lines


def _tfds_list(name: str, length: int) -> list[str]:
    # Found without importing the package, which takes long.
    spec = importlib.util.find_spec("tensorflow_datasets")
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(root) / "datasets" / "imagenet2012" / name
        if path.is_file() and len(lines := path.read_text(encoding="ascii").split()) == length:
            return lines
    raise InputError(
        f"The installed tensorflow-datasets has no datasets/imagenet2012/{name} of {length:,} lines: "
        + ("name them with --val-labels" if length == VAL_IMAGES else "install version 4.9.9 or 4.9.10.")
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
            f"{file} holds ids, which need the development kit's meta.mat beside it, and {meta} cannot be read or does "
            f"not know them ({type(error).__name__}: {error}): copy it from ILSVRC2012_devkit_t12/data."
        ) from error


def train_pictures(archive: Path, progress: Callable[[int, int], None]) -> Pictures:
    """Lists the training pictures of `ILSVRC2012_img_train.tar`, class after class, as they lie there.

    Args:
      archive: a tar of tars n01440764.tar, ..., each of pictures n01440764_10026.JPEG, ...
      progress: told how many bytes of how many are behind.

    Raises:
      InputError: another layout, an unknown synset, a name that is there twice, or an archive that is cut off or
        damaged.
    """
    labels = {name: label for label, name in enumerate(class_names())}
    found: list[tuple[str, int, int, int]] = []
    with _open(archive) as file:
        end = _size(file)
        for inner in list(_members(file, archive, 0, end)):
            match = _SYNSET_TAR.fullmatch(inner.name)
            if match is None or match[1] not in labels:
                raise InputError(
                    f"{archive} holds {inner.name}, which is no tar of one of ImageNet's 1000 synsets, such as "
                    "n01440764.tar: give ILSVRC2012_img_train.tar."
                )
            for member in _members(file, archive, inner.offset_data, inner.offset_data + inner.size):
                picture = _TRAIN_PICTURE.fullmatch(member.name)
                if picture is None or picture[2] != match[1]:
                    raise InputError(
                        f"{archive} holds {inner.name} with {member.name}, which is no picture {match[1]}_....JPEG: "
                        "give ILSVRC2012_img_train.tar."
                    )
                found.append((picture[1], labels[match[1]], member.size, member.offset_data))
            progress(inner.offset_data + inner.size, end)
    return _pictures("train", archive, found)


def val_pictures(archive: Path, file: Path | None, progress: Callable[[int, int], None]) -> Pictures:
    """Lists the validation pictures of `ILSVRC2012_img_val.tar`.

    Args:
      archive: a tar of ILSVRC2012_val_00000001.JPEG, ...
      file: their labels, see `validation_labels`.
      progress: told how many bytes of how many are behind.

    Raises:
      InputError: as for `train_pictures`, or a picture has no label.
    """
    truth = validation_labels(file)
    labels = {name: label for label, name in enumerate(class_names())}
    found = []
    with _open(archive) as opened:
        end = _size(opened)
        for member in _members(opened, archive, 0, end):
            picture = _VAL_PICTURE.fullmatch(member.name)
            if picture is None:
                raise InputError(
                    f"{archive} holds {member.name}, which is no ILSVRC2012_val_00000001.JPEG: "
                    "give ILSVRC2012_img_val.tar."
                )
            number = int(picture[2])
            if not 1 <= number <= len(truth):
                raise InputError(
                    f"{picture[1]} in {archive} has no label, there are {len(truth):,}: give labels of all pictures."
                )
            found.append((picture[1], labels[truth[number - 1]], member.size, member.offset_data))
            progress(member.offset_data + member.size, end)
    return _pictures("validation", archive, found)


def check_counts(pictures: Pictures) -> None:
    """Compares the number of pictures, in all and of each class, with that of the published set.

    Raises:
      InputError: they differ; the message tells how.
    """
    total, fewest, most = TRAIN_IMAGES, FEWEST, MOST
    if pictures.split != "train":
        total, fewest, most = VAL_IMAGES, VAL_PER_CLASS, VAL_PER_CLASS
    counts = pictures.counts()
    odd = np.flatnonzero((counts < fewest) | (counts > most))
    if len(pictures) == total and not len(odd):
        return
    wanted = f"{fewest} to {most:,}" if fewest < most else f"{most}"
    examples = ", ".join(f"{pictures.class_names[label]} has {counts[label]:,}" for label in odd[:3])
    detail = f" and {len(odd)} classes do not have {wanted} ({examples}{', ...' * (len(odd) > 3)})" if len(odd) else ""
    raise InputError(
        f"{pictures.source} holds {len(pictures):,} images where ImageNet's {pictures.split} set has {total:,}"
        f"{detail}: download it again, or add --partial to take what is there."
    )


def _open(archive: Path) -> BinaryIO:
    if archive.is_dir():
        raise InputError(f'{archive} is a folder, not a tar: for unpacked images use "spiking-mlp prepare folder".')
    try:
        return open(archive, "rb")
    except OSError as error:
        raise InputError(f"Cannot open {archive} ({error.strerror}): give the path of the tar.") from error


def _size(file: BinaryIO) -> int:
    return file.seek(0, 2)


def _members(file: BinaryIO, archive: Path, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """The files of the tar that lies in `file` from start to end; their `offset_data` counts from the file's start.

    Nobody else may move in the file until all are read.
    """
    position = start
    try:
        file.seek(start)
        with tarfile.TarFile(fileobj=file) as tar:  # it begins where the file stands
            while member := tar.next():
                position = tar.offset
                if member.offset_data + member.size > end:
                    raise InputError(f"{archive} is cut off within {member.name}: download it again.")
                if member.isfile():
                    yield member
        file.seek(position)
        # tarfile takes a damaged header for the end; the end is a block of zeros.
        if file.read(min(tarfile.BLOCKSIZE, max(0, end - position))).strip(b"\0"):
            raise InputError(f"{archive} is damaged at byte {position:,}: download it again.")
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{archive} is no uncompressed tar, or damaged at byte {position:,} ({error}): download it again."
        ) from error


def _pictures(split: str, archive: Path, found: list[tuple[str, int, int, int]]) -> Pictures:
    if not found:
        raise InputError(f"{archive} holds no images: give the tar as it was downloaded.")
    names = [entry[0] for entry in found]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise InputError(f"{archive} holds {twice} more than once: download it again.")
    labels, sizes, offsets = np.array([entry[1:] for entry in found], np.int64).T
    return Pictures(split, archive, names, labels.copy(), sizes.copy(), offsets.copy(), class_names())
