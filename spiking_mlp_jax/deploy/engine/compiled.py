"""The kernels as numba's functions, compiled when they are first called and then read from numba's cache on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numba

from spiking_mlp_jax.deploy.engine import ends as kernels_ends
from spiking_mlp_jax.deploy.engine import kernels, simd
from spiking_mlp_jax.deploy.engine import mixing as kernels_mix
from spiking_mlp_jax.deploy.engine import types as kernel_types
from spiking_mlp_jax.deploy.engine.kernels import OPTIONS


def _stamp() -> str:
    """Of all files that make up a kernel."""
    together = hashlib.sha256()
    for module in (simd, kernel_types, kernels, kernels_mix, kernels_ends):
        together.update(Path(str(module.__file__)).read_bytes())
    return together.hexdigest()


def _compiled(function, stamp) -> Any:
    try:
        compiled: Any = numba.njit(cache=True, **OPTIONS)(function)
        # numba itself looks at the function's own file alone, and would run an old neuron in it.
        compiled._cache._cache_file._source_stamp = stamp
    except (RuntimeError, AttributeError, OSError):
        # No place for the cache can be written to, or another numba's insides: compiled in every process then.
        return numba.njit(**OPTIONS)(function)
    return compiled


_STAMP = _stamp()
COMPILED: dict[str, Any] = {
    function.__name__: _compiled(function, _STAMP)
    for function in (
        kernels.layer,
        kernels.fire,
        kernels.identity,
        kernels_mix.mix,
        kernels_ends.stem,
        kernels_ends.head,
    )
}
