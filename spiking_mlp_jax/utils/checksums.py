"""SHA256SUMS: the checksums of a folder's files, as `sha256sum --check` reads them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.utils.files import write_whole

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\0]+)")


def write_sums(folder: Path, names: Sequence[str]) -> None:
    """Writes the checksums of some files of a folder.

    Args:
        folder: where they are.
        names: of files in it.

    Raises:
        InputError: they cannot be written.
    """
    lines = [f"{file_hash(folder / name)}  {name}\n" for name in names]
    write_whole(folder / SUMS, ["".join(lines).encode()])


def verify(folder: Path, needed: Sequence[str]) -> None:
    """Compares a folder with its checksums; does nothing where it has none.

    Args:
        folder: that may hold SHA256SUMS.
        needed: names of files that the checksums must cover.

    Raises:
        InputError: a file differs or is missing, a line is no checksum, or a needed file has none.
    """
    sums = folder / SUMS
    if not os.path.lexists(sums):
        return
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{sums} cannot be read ({error}): download the folder again") from error
    listed: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        found = _LINE.fullmatch(line)
        if found is None or found[2] in (".", "..") or found[2] in listed:
            raise InputError(f"line {number} of {sums} is no checksum of a file beside it: download the folder again")
        listed[found[2]] = found[1]
    for name in needed:
        if name not in listed:
            raise InputError(f"{sums} has no checksum of {name}: download the folder again")
    for name, expected in listed.items():
        if not os.path.isfile(folder / name):
            raise InputError(f"{folder / name} is missing, but {SUMS} lists it: download the folder again")
        if file_hash(folder / name) != expected:
            raise InputError(
                f"{folder / name} is not the file that {SUMS} lists: download the folder again, or, if you changed it "
                f"yourself and mean it, write the sums anew: sha256sum {' '.join(sorted(listed))} > {SUMS}"
            )


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): download it again") from error
