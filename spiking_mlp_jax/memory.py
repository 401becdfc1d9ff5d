"""What the C library does with memory that a process has freed (glibc; elsewhere nothing is changed)."""

from __future__ import annotations

import ctypes

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def return_freed_memory() -> bool:
    """Gives freed memory back to the system.

    Compiling a network leaves hundreds of megabytes freed but resident, which then add to what training needs.

    Returns:
        whether the C library can.
    """
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)
    return trim is not None


def keep_freed_memory() -> bool:
    """Keeps freed memory for the next request, instead of asking the system for new pages each time.

    A step's temporaries are hundreds of megabytes, freed at its end; on a CPU getting them anew, page by page, takes a
    quarter of a small network's training step. Only memory that the main thread asks for is kept, so JAX has to run
    programs there (`jax_cpu_enable_async_dispatch` False, set before its first use). Call it after compiling, which
    is slower with it.

    Returns:
        whether the C library can.
    """
    mallopt = _function("mallopt")
    return mallopt is not None and all(mallopt(option, _LARGEST) for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def _function(name: str):
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):
        return None
