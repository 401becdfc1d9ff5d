"""Files of a `state_dict`: PyTorch's own, .safetensors and NumPy's .npz. Reading executes nothing in them."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from spiking_mlp_jax.deploy.artifact import MAGIC
from spiking_mlp_jax.errors import InputError, nearest
from spiking_mlp_jax.utils.files import write_whole
from spiking_mlp_jax.utils.paths import user_path

TORCH = (".pth", ".pt", ".tar")
SUFFIXES = (*TORCH, ".safetensors", ".npz")
# In every official state, and in no optimizer's or scaler's.
FIRST = "to_patch_embedding.0.0.weight"
# What NumPy and zipfile raise for a damaged .npz.
_DAMAGE = (OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error)


def read_state(path: str | os.PathLike[str], key: str | None = None) -> dict[str, np.ndarray]:
    """Read a state; the first bytes determine the format, not the name.

    Args:
        path: a file that any version of `torch.save` wrote, a .safetensors or a .npz.
        key: of the state in a checkpoint that holds several, such as "model_ema".

    Returns:
        names to arrays, in the file's order and dtypes, except that float16 and bfloat16 become float32.

    Raises:
        InputError: the file is missing, damaged, of another format or holds anything but data; it has no state, or
            several and no key is given; PyTorch is needed and not installed.
    """
    path = user_path(path)
    kind = _kind(path)
    if kind == "torch":
        return {name: _plain(path, name, value) for name, value in _read_torch(path, key).items()}
    if key is not None:
        raise InputError(f"--key needs a PyTorch checkpoint; {path} is a plain state")
    state = _read_npz(path) if kind == "npz" else _read_safetensors(path)
    if not state:
        raise InputError(f"{path} holds no arrays: give a file with a state_dict")
    return {name: _plain(path, name, value) for name, value in state.items()}


def write_state(path: str | os.PathLike[str], state: Mapping[str, np.ndarray]) -> None:
    """Write a state atomically.

    Args:
        path: its suffix, one of `SUFFIXES`, determines the format.
        state: names to arrays; PyTorch files hold a plain dict of tensors.

    Raises:
        InputError: another suffix, PyTorch is needed and not installed, or the file cannot be written.
    """
    suffix = Path(path).suffix
    check_suffix(path)
    if suffix == ".safetensors":
        # PyTorch's own readers look for this entry.
        content = to_safetensors({name: np.require(a, requirements="C") for name, a in state.items()}, {"format": "pt"})
    elif suffix == ".npz":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            # np.savez takes names as keyword arguments, which may collide with its own.
            for name, array in state.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
        content = buffer.getvalue()
    else:
        torch = _torch(f"{path} is written by PyTorch", "name a .safetensors or .npz, which torch modules can load too")
        buffer = io.BytesIO()
        # A copy, because tensors cannot share read-only memory.
        torch.save({name: torch.from_numpy(np.array(array)) for name, array in state.items()}, buffer)
        content = buffer.getvalue()
    write_whole(path, [content])


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raise `InputError` unless a file's suffix is one of `SUFFIXES`."""
    if Path(path).suffix not in SUFFIXES:
        raise InputError(f"{path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, which chooses the format")


def _kind(path: Path) -> str:
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder: give the file with the state_dict")
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}: give one with a state_dict ({', '.join(SUFFIXES)})")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    if head.startswith(MAGIC):
        raise InputError(f"{path} is a compiled network, whose norms are folded: convert its trained weights")
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                return "npz" if all(name.endswith(".npy") for name in archive.namelist()) else "torch"
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise _damaged(path, error) from error
    if head[8:9] == b"{":
        return "safetensors"
    # PyTorch's formats before zip: a pickle, and before that a tar.
    if head.startswith(b"\x80") or head[257:262] == b"ustar":
        return "torch"
    raise InputError(f"{path} is not a PyTorch, .safetensors or .npz file: give one with a state_dict")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except _DAMAGE as error:
        if "allow_pickle" in str(error):
            raise InputError(f"{path} holds Python objects, which were not run: save only arrays") from error
        raise _damaged(path, error) from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    state = {}
    try:
        with safe_open(path, framework="np") as stored:
            for name in stored.keys():  # noqa: SIM118 (it is not a dict)
                state[name] = stored.get_tensor(name)
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is truncated, damaged or of a dtype that NumPy lacks ({_short(error)})") from error
    return state


def _damaged(path: Path, error: BaseException) -> InputError:
    return InputError(f"{path} is truncated or damaged ({_short(error)}): copy it again")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _plain(path: Path, name: str, value: np.ndarray) -> np.ndarray:
    """The array in native byte order, with floats of 4 or 8 bytes."""
    if value.dtype.kind == "f" and value.dtype.itemsize > 8:
        raise InputError(f'"{name}" in {path} is {value.dtype}, which JAX does not have: save it as float64')
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    return value.astype(np.float32) if value.dtype in (np.float16, ml_dtypes.bfloat16) else value


def _torch(what: str, instead: str) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"{what}, which is not installed: pip install torch, or {instead}") from error
    return torch


def _read_torch(path: Path, key: str | None) -> dict[str, np.ndarray]:
    torch = _torch(f"{path} is a file of PyTorch", "save the state_dict as a .safetensors or .npz")
    try:
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise InputError(f"{path} is damaged or holds more than weights, and was not run: copy it again") from error
        raise InputError(
            f"{path} holds code ({named[1]}), which was not run: save only the weights, with "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    # On a damaged file, torch.load raises whatever its parts raise.
    except Exception as error:
        raise InputError(
            f"{path} is damaged or not a file of weights ({type(error).__name__}: {_short(error)})"
        ) from error
    return {name: _array(path, torch, name, tensor) for name, tensor in _unwrapped(path, torch, content, key).items()}


def _harmless() -> list[Any]:
    """Harmless types that training scripts save beside weights: arguments, NumPy scalars."""
    scalar = np._core.multiarray.scalar  # pyright: ignore[reportAttributeAccessIssue]
    dtypes = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")]
    # The second name is NumPy 1's.
    return [argparse.Namespace, scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes]


def _unwrapped(path: Path, torch: Any, content: Any, key: str | None) -> Mapping[str, Any]:
    """The state in a file: its whole content, or one entry of a checkpoint."""

    def is_state(value):
        return (
            isinstance(value, Mapping)
            and bool(value)
            and all(isinstance(n, str) and isinstance(x, torch.Tensor) for n, x in value.items())
        )

    def gather(value, name=""):
        if is_state(value):
            states[name] = value
        elif isinstance(value, Mapping) and name.count(".") < 3:
            for inner, part in value.items():
                gather(part, f"{name}.{inner}" if name else str(inner))

    states: dict[str, Mapping[str, Any]] = {}
    if not is_state(content):
        gather(content)
    if key is not None:
        if key not in states:
            known = "it is a plain state, which needs no --key" if is_state(content) else "it has no state at all"
            known = nearest(key, states) if states else known
            raise InputError(f'{path} has no state under the key "{key}": {known}')
        return states[key]
    if is_state(content):
        return content
    if len(states) == 1:
        return next(iter(states.values()))
    official = [state for state in states.values() if any(name.endswith(FIRST) for name in state)]
    if len(official) == 1:
        return official[0]
    if states:
        names = ", ".join(f'"{name}"' for name in states)
        raise InputError(f"{path} holds several states, {names}: choose one with --key")
    raise InputError(f"{path} holds no state_dict (names and tensors), neither at the top nor under a key")


def _array(path: Path, torch: Any, name: str, tensor: Any) -> np.ndarray:
    try:
        tensor = tensor.detach()
        return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise InputError(f'"{name}" in {path} is not a dense array of numbers ({_short(error)})') from error
