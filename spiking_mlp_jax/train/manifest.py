"""What a finished folder holds, beside it: the size and a checksum of each file, so that damage is found and named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from etils import epath

MANIFEST = "manifest.json"
# Orbax adds to these after the rest is complete, and a restore does not need them.
UNLISTED = (MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt")
QUICK_BYTES = 1 << 16  # a quick look reads only files of at most this size


def write_manifest(folder: epath.Path) -> None:
    """Adds manifest.json to a folder that is complete but for its final name.

    Args:
        folder: any folder; its files are read once.
    """
    files = {name: {"bytes": len_, "blake2b": digest} for name, len_, digest in _described(folder)}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=1) + "\n")


def find_damage(folder: epath.Path, thorough: bool = True) -> str | None:
    """Compares a folder with its manifest.

    Args:
        folder: what `write_manifest` was given, under whatever name.
        thorough: False reads the contents of small files only, and of the others compares the size.

    Returns:
        what is wrong, in words that name the file; None when nothing is, or when an older version of this package
        wrote the folder without a manifest.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        return None
    try:
        files: dict[str, Any] = json.loads(manifest.read_text())["files"]
        listed = [(name, int(entry["bytes"]), str(entry["blake2b"])) for name, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, size, digest in listed:
        file = folder / name
        try:
            found = file.stat().length
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if (thorough or size <= QUICK_BYTES) and _digest(file) != digest:
                return f"{name} does not hold what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return None


def _described(folder: epath.Path) -> Iterator[tuple[str, int, str]]:
    for file in sorted(_files(folder), key=str):
        name = file.relative_to(folder).as_posix()
        if name not in UNLISTED:
            yield name, file.stat().length, _digest(file)


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry


def _digest(file: epath.Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
