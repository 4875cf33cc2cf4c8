"""How much memory there is, and how much can still be had."""

from __future__ import annotations

import os
import re


def available() -> int | None:
    """Bytes of memory that can still be had; None where the system does not say."""
    try:
        # Not sysconf's SC_AVPHYS_PAGES, which leaves out what the file cache would give back.
        with open("/proc/meminfo", encoding="ascii") as file:
            found = re.search(r"^MemAvailable:\s+(\d+) kB", file.read(), flags=re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def total() -> int | None:
    """Bytes of memory in all; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def too_little(need: int) -> int | None:
    """The bytes that are available if they are known to be fewer than ``need``, else None."""
    free = available()
    return free if free is not None and free < need else None
