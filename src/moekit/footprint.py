"""Memory of this process as the system counts it, and what makes it smaller."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import psutil

PRODUCTS = 128  # matrix products whose code oneDNN keeps; one for each shape, about 0.6 MB each whatever its size
_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # of oneDNN, and of what PyTorch keeps of it


def rss() -> int:
    """Bytes that this process holds now."""
    return psutil.Process().memory_info().rss


def peak_rss() -> int:
    """Bytes; the most that this process has had."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("VmHWM")).split()[1])
    return rss()


def trim() -> None:
    """Give freed memory back to the system: small things that outlive large ones keep glibc from doing so."""
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def keep_few_products() -> int:
    """Have oneDNN keep the code of a few bfloat16 products, not of 1,024; how many.

    Each number of rows has code of its own, and a prompt has experts with every number of rows: left alone, this grows
    by more than half a gigabyte while texts come and go. Heeded if said before the first such product; what the user's
    environment says goes first.
    """
    for name in _CAPACITIES:
        os.environ.setdefault(name, str(PRODUCTS))
    with suppress(ValueError):
        return max(int(os.environ[name]) for name in _CAPACITIES)
    return PRODUCTS
