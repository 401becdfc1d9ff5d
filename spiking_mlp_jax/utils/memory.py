"""What the C library does with memory that a process has freed (glibc; elsewhere nothing is changed)."""

from __future__ import annotations

import ctypes

# Options of malloc.h, and what switches each off: never give the heap's top back, never map a request by itself. (A
# raised M_MMAP_THRESHOLD would not do: it is an int, and temporaries are more than 2 GB.)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER_TRIM, _NEVER_MAP = -1, 0


def return_freed_memory() -> bool:
    """Return freed memory to the system.

    Compiling a network leaves hundreds of megabytes freed but resident, which then add to what training needs.

    Returns:
        whether the C library can.
    """
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)
    return trim is not None


def keep_freed_memory() -> bool:
    """Keep freed memory for the next request, instead of asking the system for new pages each time.

    A step's temporaries are hundreds of megabytes, freed at its end; on a CPU allocating them again by pages, takes a
    quarter of a small network's training step. Only memory that the main thread asks for is kept, so JAX has to run
    programs there (`jax_cpu_enable_async_dispatch` False, set before its first use). Call it after compiling, which
    is slower with it.

    Returns:
        whether the C library can.
    """
    mallopt = _function("mallopt")
    return mallopt is not None and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM) and mallopt(_M_MMAP_MAX, _NEVER_MAP))


def _function(name: str):
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):
        return None
