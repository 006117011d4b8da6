"""What the C library does with freed memory (glibc; elsewhere nothing happens)."""

from __future__ import annotations

import contextlib
import ctypes
import gc

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h


def keep_freed_memory() -> None:
    """Let this process keep what is freed for what comes next.

    Else every large buffer, such as the output of a layer, is mapped anew, which can cost more than the layer itself. One arena for
    all threads, so that `return_freed_memory` finds it all. For processes of our own: the command line and the studio.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option, value in ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, (1 << 31) - 1), (_ARENA_MAX, 1)):
            libc.mallopt(option, value)


def return_freed_memory() -> None:
    """Give the system back what is free."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
