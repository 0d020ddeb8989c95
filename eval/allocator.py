"""Freed memory stays in the process.

A forward pass on a CPU allocates and frees some megabytes in each layer. glibc's allocator gives them back to the
system at once, which hands them out again page by page and zeroed: 3 to 10 % of the pass.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform

# malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20
NEVER = 2**31 - 1
_OWN_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let glibc reuse what this process frees, blocks up to 32 MiB; for the rest of the process, which stays as large
    as it was at its peak. So for commands, not for a library's functions.

    Returns:
        Whether it does now: not with another C library, nor where the user chose an allocator or its settings.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _OWN_CHOICES):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))


def give_back_freed_memory() -> None:
    """Free what only cycles hold, as models do that hooks point back to, and let glibc give all freed memory to the
    system, also from between blocks in use: before something large."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
