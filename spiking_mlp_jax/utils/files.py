"""Files that are never seen half written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from spiking_mlp_jax.errors import InputError


def write_whole(path: str | os.PathLike[str], parts: Iterable[bytes]) -> None:
    """Writes a file under a temporary name and renames it, so that a reader never sees half of it.

    Raises:
        InputError: it cannot be written.
    """
    path = Path(path)
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}): give another place") from error
