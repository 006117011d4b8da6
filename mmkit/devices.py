"""Where a model runs and in which precision: `device` and `dtype` arguments resolved."""

from __future__ import annotations

import platform

import torch

from mmkit.errors import BackendUnavailableError, InputError


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """`device` as a `torch.device`; "auto" is CUDA when present. Raises when it does not exist here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not {device!r}.") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(f"device={device!r} was asked for, but torch sees no CUDA GPU; use device='cpu'.")
    return resolved


def resolve_dtype(dtype: str | torch.dtype = "auto", auto: torch.dtype = torch.float32) -> torch.dtype:
    """`dtype` as a `torch.dtype`; "auto" is `auto`."""
    resolved = auto if dtype == "auto" else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise InputError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', not {dtype!r}.")
    return resolved


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for bfloat16. An x86 CPU without them converts each number, many times slower than float32."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # torch does not tell; nothing is claimed
    checks = (getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks)
