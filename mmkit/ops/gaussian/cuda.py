"""The renderer on CUDA: gsplat's own kernels (Apache-2.0, arXiv 2409.06765), which it compiles on first use.

What is tested without a GPU: which arguments gsplat would get, with the signatures of its releases 1.5 and 1.6. Its pictures and its
speed beside ours (`benchmarks/rasterizer.py --cuda`) have not been compared yet: no GPU was at hand.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from typing import Any

import torch
from torch import Tensor

_PIP = "pip install 'mmkit[cuda]' (gsplat; needs nvcc, and minutes to compile on first use)"


def version() -> str | None:
    """The installed gsplat's version, without importing it."""
    try:
        return importlib.metadata.version("gsplat")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _build_problem() -> str | None:
    if importlib.util.find_spec("gsplat") is None:
        return f"gsplat is not installed: {_PIP}."
    try:
        from gsplat.cuda._backend import _C
    except Exception as error:  # a failing build shows as whatever the compiler driver raises
        return f"gsplat's kernels cannot be built ({type(error).__name__}: {error}): {_PIP}."
    return None if _C is not None else f"gsplat found no CUDA toolkit: {_PIP}."


def problem(device: torch.device) -> str | None:
    """Why gsplat cannot render tensors on `device`; `None` when it can."""
    return _build_problem() if device.type == "cuda" else "gsplat renders CUDA tensors only."


def rasterization(means: Tensor, colors: Tensor | None, **others: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """gsplat's function of that name, called by keyword: the order of its arguments changed between releases."""
    from gsplat import rasterization as render

    if colors is None:  # release 1.5 looks at them even where only depths are asked for
        colors, others["sh_degree"] = means.new_zeros(*means.shape[:-1], 1), None
    return render(means=means, colors=colors, **others)
