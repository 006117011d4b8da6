"""How mmkit writes CPU kernels: Numba functions that release the GIL, cached on disk, run by a small pool of threads.

The pattern for an operator `x`: kernels in `x/cpu.py`, one job per independent slice, decorated with `kernel(signature)`;
the module is imported on first use by `cpu_kernels("x")`; `run_jobs` spreads the jobs over `torch.get_num_threads()`
threads. Python threads and GIL-free kernels compile faster than `prange`, do not meet torch's OpenMP pool, and survive
the forked workers of a `DataLoader`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch

logger = logging.getLogger("mmkit.ops")

FAST_MATH = {"contract", "reassoc", "nsz", "arcp"}
"""What LLVM may reorder. Not "nnan"/"ninf": a NaN in the input has to come out again."""

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()


def kernel(signature: str, fast_math: set[str] = FAST_MATH) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: compile for `signature` now, without the GIL, from the disk cache when there is one.

    Numba caches beside the source file or, when that folder is read-only, in the user's cache folder; with neither
    writable the kernel is compiled in every process.
    """

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        options: dict[str, Any] = {"nogil": True, "fastmath": fast_math, "error_model": "numpy"}
        try:
            return numba.njit(signature, cache=True, **options)(function)
        except RuntimeError as error:
            if "cache" not in str(error):
                raise
            logger.warning("%s is compiled without a cache: %s", function.__name__, error)
            return numba.njit(signature, **options)(function)

    return compile_


def run_jobs(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> None:
    """Call `function(*job)` for every job, on up to `torch.get_num_threads()` threads; the first error is raised."""
    jobs = list(jobs)
    threads = min(torch.get_num_threads(), len(jobs))
    if threads <= 1:
        for job in jobs:
            function(*job)
        return

    def worker(first: int) -> None:
        for job in jobs[first::threads]:
            function(*job)

    for future in [_threads().submit(worker, i) for i in range(threads)]:
        future.result()


def _threads() -> ThreadPoolExecutor:
    """The process's pool; replaced when `torch.set_num_threads` asks for more threads."""
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < torch.get_num_threads():
            _pool_size = torch.get_num_threads()
            _pool = ThreadPoolExecutor(_pool_size, thread_name_prefix="mmkit-ops")
        return _pool


def _forget_pool() -> None:
    """After a fork the child has the pool object but not its threads."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
