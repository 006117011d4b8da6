"""The selective scan on CUDA: mamba-ssm's own kernel."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

_PIP = "pip install 'mmkit[cuda]' (mamba-ssm; needs nvcc or a prebuilt wheel for this torch)"


def kernels() -> ModuleType:
    """mamba-ssm's interface, with `selective_scan_fn`."""
    return importlib.import_module("mamba_ssm.ops.selective_scan_interface")


@functools.cache
def mamba_ssm_problem() -> str | None:
    """Why mamba-ssm's kernel cannot be used; some of its releases import without having it, others fail to import."""
    try:
        interface = kernels()
    except (ImportError, OSError, RuntimeError) as error:
        return f"mamba-ssm cannot be imported ({type(error).__name__}: {error}): {_PIP}."
    if getattr(interface, "selective_scan_cuda", None) is None:
        return f"mamba-ssm was installed without its CUDA kernels: {_PIP}."
    return None


def problem(device: torch.device) -> str | None:
    """Why tensors on `device` cannot be scanned here; `None` when they can."""
    return mamba_ssm_problem() if device.type == "cuda" else "mamba-ssm runs on CUDA tensors only."
