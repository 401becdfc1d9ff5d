"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from spiking_mlp_jax.errors import InputError


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path names an object store (gs://, s3://) rather than a disk."""
    return "://" in os.fspath(path)


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path with `~` expanded and otherwise as the user wrote it; that of an object store is an unchanged epath.Path.

    Every command and public function that takes a path passes it through here first.
    """
    if is_remote(path):
        from etils import epath

        remote: Any = epath.Path(path)
        return remote
    # os.path's version leaves "~name" alone where there is no such user, as a shell does.
    return Path(os.path.expanduser(path))


def real_name(path: str | os.PathLike[str]) -> str:
    """The name of the file or folder that a path leads to, through `.`, `..` and links.

    Examples:
        >>> real_name("runs/demo/../cifar10/.")
        'cifar10'
    """
    return Path(os.path.realpath(user_path(path))).name


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
        InputError: it exists and is not a folder.
    """
    path = user_path(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"{path} is not a folder: name another with {option}")
    return path
