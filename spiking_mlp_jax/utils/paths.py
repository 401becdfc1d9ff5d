"""Paths as users write them."""

from __future__ import annotations

import os
import urllib.parse
from pathlib import Path
from typing import Any

from spiking_mlp_jax.errors import InputError

LONGEST_NAME = 255  # bytes, on every common file system


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path names an object store (gs://, s3://) rather than a disk."""
    return "://" in os.fspath(path) and not os.fspath(path).startswith("file:/")


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path with `~` expanded and otherwise as the user wrote it; that of an object store is an unchanged epath.Path.

    Every command and public function that takes a path passes it through here first.

    Raises:
        InputError: it is empty, or no file can have such a name.
    """
    text = os.fspath(path)
    if not text:
        raise InputError("a path is empty: name a file or folder")
    # Most functions of os.path return False for these, those of pathlib raise.
    if "\0" in text or any(len(os.fsencode(part)) > LONGEST_NAME for part in text.split(os.sep)):
        raise InputError(f"{text[:60]!r}... is not a path: a name has at most {LONGEST_NAME} bytes, none of them zero")
    if is_remote(path):
        from etils import epath

        remote: Any = epath.Path(path)
        return remote
    if os.fspath(path).startswith("file:/"):
        url = urllib.parse.urlsplit(os.fspath(path))
        if url.netloc not in ("", "localhost"):
            raise InputError(f'"{path}" is a file on another machine: give a path, or file:///FOLDER')
        path = urllib.parse.unquote(url.path)
    # os.path's version leaves "~name" alone where there is no such user, as a shell does.
    return Path(os.path.expanduser(path))


def real_path(path: str | os.PathLike[str]) -> Path:
    """The path that a user's path leads to: absolute, without `~`, `.`, `..` and links; object stores as `user_path`.

    What is read or written for long goes through here once, so that no link or change of folder can lead elsewhere.
    """
    return user_path(path) if is_remote(path) else Path(os.path.realpath(user_path(path)))


def real_name(path: str | os.PathLike[str]) -> str:
    """The name of the file or folder that a path leads to, through `.`, `..` and links.

    Examples:
        >>> real_name("runs/demo/../cifar10/.")
        'cifar10'
    """
    return real_path(path).name


def output_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file to write.

    Raises:
        InputError: it is a folder, or its folder does not exist.
    """
    path = user_path(path)
    # os.path returns False where pathlib raises, e.g. for a name that is too long.
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        raise InputError(f"{path} cannot be written: name a file in an existing folder")
    return path


def output_folder(path: str | os.PathLike[str], option: str = "-o") -> Path:
    """The path of a folder to write to; it need not exist yet.

    Args:
        path: as the user wrote it.
        option: the command-line option that names it, for the message.

    Raises:
        InputError: it, or the nearest folder above that exists, is not a folder.
    """
    path = user_path(path)
    existing = next(x for x in (path, *path.absolute().parents) if os.path.exists(x))
    if not os.path.isdir(existing):
        raise InputError(f"{existing} is not a folder: name another with {option}")
    return path
