"""Files on a disk or in an object store (gs://, s3://): written atomically, and checked against checksums.

On a disk a file is written under a temporary name and renamed. An object store has no rename and needs none: an object
appears when its upload is complete, and readers see the older one until then. Nothing beyond Python is imported for
files on a disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiking_mlp_jax.errors import InputError, StorageError
from spiking_mlp_jax.utils.paths import is_remote, user_path

if TYPE_CHECKING:
    from etils import epath

SUMS = "SHA256SUMS"
_SUM = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\0]+)")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BROKEN = (errno.EROFS, errno.ESTALE, errno.EIO, errno.ENODEV, errno.ENOTCONN)


def as_path(where: str | os.PathLike[str]) -> epath.Path:
    """A path whose methods work on disks and object stores; on disks it is absolute.

    Raises:
        InputError: no installed package can reach that object store.
    """
    from etils import epath

    path = epath.Path(user_path(where))
    if not is_remote(path):
        return path.absolute()
    try:
        path.exists()
    except ImportError as error:
        raise unreachable(where, error) from error
    return path


def unreachable(where: str | os.PathLike[str], error: ImportError) -> InputError:
    """The error for an object store whose package is not installed."""
    return InputError(
        f'"{where}" cannot be reached ({error}): install the package for that store, e.g. gcsfs and '
        "google-cloud-storage for gs:// or s3fs for s3://, or give a local folder"
    )


def write_whole(path: str | os.PathLike[str], content: str | bytes | Iterable[bytes]) -> None:
    """Write a file, and its folder if missing, so that no reader sees half of it.

    Args:
        path: on a disk or in an object store.
        content: text (UTF-8), bytes or parts of them.

    Raises:
        StorageError: the disk is full.
        InputError: it cannot be written for another reason.
    """
    content = content.encode() if isinstance(content, str) else content
    parts = [content] if isinstance(content, bytes) else content
    try:
        if is_remote(path):
            with as_path(path).open("wb") as file:
                file.writelines(parts)
            return
    except OSError as error:
        raise _write_error(error, path) from error
    write_together({Path(path): parts})


def write_together(contents: Mapping[Path, Iterable[bytes]]) -> None:
    """Write local files, and their folders if missing; all are complete before the first one gets its name.

    Raises:
        StorageError: the disk is full.
        InputError: a file cannot be written for another reason.
    """
    temporaries = {path: path.parent / f"{path.name}.{os.getpid()}.tmp" for path in contents}
    path = Path()
    try:
        for path, parts in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporaries[path], "wb") as file:
                file.writelines(parts)
        for path, temporary in temporaries.items():
            temporary.replace(path)
    except OSError as error:
        raise _write_error(error, path) from error
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink()


def _write_error(error: OSError, path: str | os.PathLike[str]) -> InputError:
    # Without the error's file name, which is that of the temporary file.
    reason = error.strerror or error
    found = system_error(OSError(error.errno, reason), path)
    if isinstance(found, StorageError):
        return found
    return InputError(f"{path} cannot be written ({reason}): use another path")


def write_folder(folder: epath.Path, write: Callable[[Path], None]) -> None:
    """Call a function that writes local files, and upload them if the folder is remote; one level deep.

    Args:
        folder: where they go.
        write: is called with a local folder, which is `folder` itself if that is on a disk.
    """
    if not is_remote(folder):
        write(Path(folder))
        return
    with tempfile.TemporaryDirectory() as local:
        write(Path(local))
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(Path(local).iterdir()):
            write_whole(folder / file.name, file.read_bytes())


class Lines:
    """A text file that grows by lines.

    Object stores cannot append: there, each line uploads the file again.

    Args:
        path: the file.
        lines: what it holds at first, without line ends; None: what it already holds.
    """

    def __init__(self, path: str | os.PathLike[str], lines: list[str] | None = None):
        self._path = path
        self._text: str | None = None
        if is_remote(path) and lines is None:
            lines = read_lines(path)
        if lines is not None:
            text = "".join(line + "\n" for line in lines)
            write_whole(path, text)
            self._text = text if is_remote(path) else None

    def add(self, line: str) -> None:
        """Add a line, which readers see at once."""
        if self._text is None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        else:
            self._text += line + "\n"
            write_whole(self._path, self._text)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file; empty if there is no file."""
    file = as_path(path)
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def read_json(path: str | os.PathLike[str], advice: str) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no file.

    Args:
        path: of a local file.
        advice: what to do about a corrupt one, for the error message.

    Raises:
        InputError: it is not readable JSON, or not an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object; {advice}")
    return content


def short_reason(error: Exception) -> str:
    """Why a write failed, in the operating system's words where a library buries them in many more."""
    text = " ".join(str(error).split())
    return next((os.strerror(number) for number in _FULL + _BROKEN if os.strerror(number) in text), text[:200])


def system_error(error: OSError, where: str | os.PathLike[str]) -> InputError:
    """The message for what the operating system refuses; a StorageError if the fault is the disk's, not the path's.

    Args:
        error: from the operating system.
        where: what was being read or written, if the error does not name it.
    """
    path, reason = error.filename or os.fspath(where), error.strerror or error
    if error.errno in _FULL:
        return StorageError(f"{path} could not be written ({reason}): free disk space, then rerun the same command")
    if error.errno in _BROKEN:
        return StorageError(f"{path} cannot be used ({reason}): remount that disk, then rerun the same command")
    return InputError(f"{path} cannot be used ({reason}): change its permissions, or use another path")


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a local file, in hexadecimal.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): download it again") from error


def write_sums(folder: Path, names: Sequence[str]) -> None:
    """Write SHA256SUMS, the checksums of some files of a folder, as `sha256sum --check` reads them.

    Raises:
        InputError: a file cannot be read or SHA256SUMS cannot be written.
    """
    write_whole(folder / SUMS, "".join(f"{file_hash(folder / name)}  {name}\n" for name in names))


def verify(folder: Path, needed: Sequence[str]) -> None:
    """Compare a folder with its SHA256SUMS; do nothing if it has none.

    Args:
        folder: that may hold SHA256SUMS.
        needed: names of files that the checksums must cover.

    Raises:
        InputError: a file differs or is missing, a line is malformed, or a needed file has no checksum.
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
        found = _SUM.fullmatch(line)
        if found is None or found[2] in (".", "..") or found[2] in listed:
            raise InputError(
                f"line {number} of {sums} is not the checksum of a file beside it: download the folder again"
            )
        listed[found[2]] = found[1]
    for name in needed:
        if name not in listed:
            raise InputError(f"{sums} has no checksum of {name}: download the folder again")
    for name, expected in listed.items():
        if not os.path.isfile(folder / name):
            raise InputError(f"{folder / name} is missing, but {SUMS} lists it: download the folder again")
        if file_hash(folder / name) != expected:
            raise InputError(
                f"{folder / name} is not the file that {SUMS} lists: download the folder again or, if you changed "
                f"the file on purpose, update the checksums: sha256sum {' '.join(sorted(listed))} > {SUMS}"
            )
