"""What the C library does with memory that a process has freed (glibc; elsewhere nothing is changed)."""

from __future__ import annotations

import ctypes

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
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

    A step's temporaries are hundreds of megabytes, freed at its end. On a CPU getting them anew, page by page, takes a
    fifth of a small network's training step. Call it before JAX runs anything, because threads that already
    have memory pools of their own keep them.

    Returns:
        whether the C library can.
    """
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    return all(
        mallopt(option, value)
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, _LARGEST))
    )


def _function(name: str):
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):
        return None
