"""The heap of a process that trains on a CPU.

A step frees what the next one asks for again. glibc gives the kernel back what lies free at the end
of its heap, and whole blocks beyond a size, and each page of them that is touched again is a fault:
of a step of the 5M model 5 % (docs/lab-log.md). Told to keep them, it holds at most KEEP more.
"""

from __future__ import annotations

import ctypes
import os
import platform

KEEP = 1 << 30  # bytes that may lie free at the end of the heap
LARGEST = 1 << 25  # bytes of a block from the heap, as many as glibc allows; larger ones go back
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Whether glibc is there and did as told; it is not where the environment has told it already
    (MALLOC_..., GLIBC_TUNABLES)."""
    told = "GLIBC_TUNABLES" in os.environ or any(n.startswith("MALLOC_") for n in os.environ)
    if told or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST) and mallopt(_TRIM_THRESHOLD, KEEP))
