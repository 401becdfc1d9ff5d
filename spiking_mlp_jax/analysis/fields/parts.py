"""Finished parts of a long measurement, kept in files so that it goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from flax import nnx

from spiking_mlp_jax.errors import StorageError
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP

Arrays = dict[str, np.ndarray]


class Kept:
    """Arrays that are computed once and then read from NPZ files.

    Args:
        folder: of the files; it is made when missing.
        fingerprint: of everything that the arrays depend on; files with another one are computed anew and replaced, as
            are damaged ones.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = folder, fingerprint

    def __call__(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """The arrays of that name.

        Raises:
            StorageError: they cannot be written.
        """
        file = self.folder / f"{name}.npz"
        try:
            # Opened here, because np.load leaves a file open that is no archive.
            with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
                if str(stored["fingerprint"]) == self.fingerprint:
                    return {key: stored[key] for key in stored.files if key != "fingerprint"}
        except (OSError, KeyError, ValueError, EOFError, BadZipFile):
            pass  # missing, damaged or of other settings: measured anew
        arrays = compute()
        content: dict[str, Any] = {"fingerprint": np.array(self.fingerprint), **arrays}
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as stream:
                np.savez_compressed(stream, **content)
            temporary.replace(file)
        except OSError as error:
            raise StorageError(f"cannot write {file} ({error.strerror}): give another folder") from error
        finally:
            # Below a file there is nothing to take away, and saying so would hide the error.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return arrays


def fingerprint(model: SpikingMLP, *others: Any) -> str:
    """A hash of a network's variables and of whatever else is given, as JSON values or dataclasses."""
    digest = hashlib.sha256()
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        digest.update(".".join(map(str, path)).encode())
        digest.update(np.asarray(variable[...]).tobytes())
    values = [
        dataclasses.asdict(other) if dataclasses.is_dataclass(other) and not isinstance(other, type) else other
        for other in others
    ]
    digest.update(json.dumps([dataclasses.asdict(model.config), *values], sort_keys=True).encode())
    return digest.hexdigest()
