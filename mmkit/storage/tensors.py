"""Tensors in files and out of them: safetensors written, several formats read, nothing ever unpickled, no key ignored."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.errors import CheckpointError, StorageError
from mmkit.storage.files import atomic_write


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as a safetensors file, atomically. Shared tensors are written as separate copies."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(plain, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # what it makes of an OSError
            raise StorageError(f"{path} cannot be written: {error}.") from error


_PICKLED_KEYS = ("state_dict", "model_state_dict", "model", "network_weights", "module", "net")


def read_tensors(path: str | os.PathLike[str], *, allow_pickle_format: bool = True) -> dict[str, Tensor]:
    """Read a state dict from a `.safetensors`, `.pth`, `.pt`, `.bin` or `.th` file on the CPU.

    Files in torch's pickle format are read with `weights_only=True`, which cannot run code; a file that needs more is
    refused. Wrappers such as `{"state_dict": ...}` and `module.` prefixes are removed.

    Args:
        path: the file.
        allow_pickle_format: `False` accepts safetensors only (adapter files).

    Raises:
        CheckpointError: missing, truncated, unsafe, or without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a file.")
    if path.suffix == ".safetensors" or not allow_pickle_format:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, ValueError, OSError) as error:
            hint = "It looks like a pickle file, which is never loaded here. " if _is_pickle(path) else ""
            raise CheckpointError(
                f"{path} is not a readable safetensors file ({error}). {hint}Save or download it again."
            ) from error
    try:
        with torch.serialization.safe_globals(_numpy_numbers()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged instructions make the reader fail in every way there is
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} cannot be loaded without running code from it, or is damaged ({reason}). "
            "Convert it to safetensors in the environment that made it."
        ) from error
    for key in _PICKLED_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not state:
        raise CheckpointError(f"{path} holds no tensors under the keys a state dict would use.")
    if all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return state


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts that a safetensors file carries beside its tensors. Raises `CheckpointError` for a file that is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}).") from error


def _numpy_numbers() -> list[Any]:
    """What torch must know to read numpy numbers (nnU-Net keeps its scores as such); they cannot run code."""
    import numpy as np

    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")]
    return [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype, *kinds]


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], *, source: str = "checkpoint", ignore: tuple[str, ...] = ()
) -> None:
    """Load `state` into `model`; every missing, unexpected or misshapen key is an error and then nothing is loaded.

    Args:
        model: the module to fill.
        state: tensors by key.
        source: what the tensors came from, for the message.
        ignore: keys (exact) that may be missing from `state`.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state and k not in ignore]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k}: file {tuple(v.shape)}, model {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and own[k].shape != v.shape
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__}: nothing was loaded."
            + _listing("missing", missing)
            + _listing("unexpected", unexpected)
            + _listing("of another shape", shapes)
        )
    model.load_state_dict(dict(state), strict=False)


def _listing(title: str, keys: list[str], limit: int = 8) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return f"\n  {len(keys)} {title}: {', '.join(keys[:limit])}{more}"


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as f:
        head = f.read(4)
    return head[:2] == b"PK" or head[:1] == b"\x80"
