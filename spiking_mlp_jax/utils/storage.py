"""Files of the workdir, on a disk or in an object store (gs://, s3://), through etils.epath.

On a disk a file is written under a temporary name and renamed. An object store has no rename, and needs none: an object
appears when its upload is complete, whole, and the older one is there until then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from etils import epath

from spiking_mlp_jax.errors import InputError, StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path names an object store rather than a disk."""
    return "://" in os.fspath(path)


def as_path(where: str | os.PathLike[str]) -> epath.Path:
    """A path whose methods work on disks and object stores; on disks it is absolute.

    Raises:
        InputError: no installed package can reach that object store.
    """
    path = epath.Path(where)
    if not is_remote(path):
        return path.expanduser().absolute()
    try:
        path.exists()
    except ImportError as error:
        raise unreachable(where, error) from error
    return path


def unreachable(where: str | os.PathLike[str], error: ImportError) -> InputError:
    """The sentence for an object store whose package is missing."""
    return InputError(
        f'"{where}" cannot be reached ({error}): install what reaches that store, such as gcsfs and '
        "google-cloud-storage for gs:// or s3fs for s3://, or give a folder"
    )


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file so that it is never seen half written."""
    path = epath.Path(path)
    if is_remote(path):
        path.write_text(text)
        return
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_folder(folder: epath.Path, write: Callable[[Path], None]) -> None:
    """Lets a function that knows only disks write the files of a folder, one level deep.

    Args:
        folder: where they shall be.
        write: is called with a folder on a disk, `folder` itself if that is one.
    """
    if not is_remote(folder):
        write(Path(folder))
        return
    with tempfile.TemporaryDirectory() as local:
        write(Path(local))
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(Path(local).iterdir()):
            (folder / file.name).write_bytes(file.read_bytes())


class Lines:
    """A text file that grows by lines.

    Object stores cannot append: there, each line uploads the file anew.

    Args:
        path: the file.
        lines: what it holds at first, without line ends; None: what it holds already.
    """

    def __init__(self, path: str | os.PathLike[str], lines: list[str] | None = None):
        self._path = epath.Path(path)
        self._text: str | None = None
        if is_remote(path) and lines is None:
            lines = read_lines(path)
        if lines is not None:
            text = "".join(line + "\n" for line in lines)
            write_text(path, text)
            self._text = text if is_remote(path) else None

    def add(self, line: str) -> None:
        """Adds a line, which others can read at once."""
        if self._text is None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        else:
            self._text += line + "\n"
            self._path.write_text(self._text)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file, none if there is no file."""
    path = epath.Path(path)
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def shortly(error: Exception) -> str:
    """The reason of a failed write, in the operating system's words where a library hides them in many more."""
    text = " ".join(str(error).split())
    return next((os.strerror(number) for number in _FULL if os.strerror(number) in text), text[:200])


def storage_error(error: OSError, where: str | os.PathLike[str]) -> StorageError | None:
    """The sentence for a write that failed for want of space, None for every other error.

    Args:
        error: what the operating system answered.
        where: what was being written to.
    """
    if error.errno not in _FULL:
        return None
    what = f"{error.filename}" if error.filename else f"{where}"
    return StorageError(
        f"{what} could not be written ({error.strerror}): make room, then the same command continues from the last "
        "checkpoint"
    )
