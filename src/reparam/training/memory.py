"""How this process handles memory."""

from __future__ import annotations

import ctypes
import sys

#: Parameters of mallopt in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have the C library keep the memory that is freed, for the next step, instead of handing it back to the system.

    On a CPU every step of a training frees its activations and asks for as much again, and by default glibc
    returns large blocks at once: the system then clears them anew, page by page, which is up to a quarter of
    a step. The process stays at its peak of memory. For processes that train and do nothing else.

    Returns:
        Whether the C library knows the setting.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MOST)) and bool(mallopt(_TRIM_THRESHOLD, _MOST))
