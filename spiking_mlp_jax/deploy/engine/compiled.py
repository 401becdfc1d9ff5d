"""The kernels compiled by numba at their first call, and cached on disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numba
from numba import config as numba_config  # pyright: ignore[reportPrivateImportUsage]

from spiking_mlp_jax.deploy.engine.ends import head, stem
from spiking_mlp_jax.deploy.engine.kernels import OPTIONS, fire, identity, layer, mix

SOURCES = ("ends", "kernels", "operands", "simd")
KERNELS = {function.__name__: function for function in (layer, fire, identity, mix, stem, head)}
config: Any = numba_config


def _cache_folder() -> str:
    """A folder for these very sources: numba itself would notice changes in a kernel's own file alone."""
    sources = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in SOURCES)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    base = config.CACHE_DIR or os.path.join(cache, "spiking_mlp_jax", "numba")
    return os.path.join(base, hashlib.sha256(sources).hexdigest()[:16])


def _compiled(function: Any) -> Any:
    try:
        return numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # the folder cannot be written to: every process compiles
        return numba.njit(**OPTIONS)(function)


def _all_compiled() -> dict[str, Any]:
    before, config.CACHE_DIR = config.CACHE_DIR, _cache_folder()
    try:
        return {name: _compiled(function) for name, function in KERNELS.items()}
    finally:
        config.CACHE_DIR = before


COMPILED = _all_compiled()


def run(kernel: str, *arguments: Any) -> None:
    """Call a kernel, compiled without the cache where the cache cannot be read or written."""
    function = COMPILED[kernel]
    try:
        function(*arguments)
    except Exception:  # a full disk, or any error that unpickling a damaged file can raise; the kernel has not run yet
        COMPILED[kernel] = numba.njit(**OPTIONS)(KERNELS[kernel])
        COMPILED[kernel](*arguments)
