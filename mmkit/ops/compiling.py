"""Loading the CPU kernels of the operators, which Numba compiles once per machine."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import threading
from types import ModuleType

logger = logging.getLogger("mmkit.ops")

KERNELS = {"deformable_attention": 5, "selective_scan": 10, "points": 10, "gaussian": 25}
"""Operator -> about how many seconds its kernels take to compile."""

_ahead: dict[str, threading.Event] = {}


def cpu_kernels(op: str) -> ModuleType:
    """`mmkit.ops.<op>.cpu`; importing it compiles its kernels, which is said when it takes longer than 2.5 seconds."""
    message = "%s: compiling the CPU kernels, about %d s, once per machine ..."
    timer = threading.Timer(2.5, logger.warning, (message, op, KERNELS[op]))
    timer.daemon = True
    timer.start()
    try:
        if op in _ahead:
            _ahead[op].wait()
        return importlib.import_module(f"mmkit.ops.{op}.cpu")
    finally:
        timer.cancel()


def compile_ahead() -> None:
    """For servers: have what is not compiled yet compiled by another process, which takes the compiler's memory (140 MB) with it.

    Kernels that are needed meanwhile are waited for.
    """
    _ahead.update({op: threading.Event() for op in KERNELS})
    threading.Thread(target=_compile_apart, name="mmkit-compile", daemon=True).start()


def _compile_apart() -> None:
    code = f"from mmkit.ops.compiling import cpu_kernels\nfor op in {list(KERNELS)}: cpu_kernels(op); print(op, flush=True)"
    quiet = subprocess.DEVNULL
    try:
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, text=True
        ) as child:
            for op in child.stdout or ():
                _ahead[op.strip()].set()
    finally:  # also when that failed: what is missing is compiled here
        for compiled in _ahead.values():
            compiled.set()
