"""Training checkpoints: folders of safetensors and JSON that appear complete or not at all, and hold no pickled code.

A checkpoint is `checkpoints/step_00000120/` with

- `weights.safetensors`: the trainable parameters and all buffers (frozen weights are not repeated),
- `optimizer.safetensors`: the optimiser's tensors as `<parameter>/<key>`,
- `best.safetensors`, `ema.safetensors`: when there are such weights,
- `state.json`: step, history, scalars, the run's fingerprint, and the sha256 of every other file.

Random states are not kept: what training draws is a function of the step.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.errors import CheckpointError
from mmkit.storage.files import absolute, read_json, remove, sha256_file, sync, write_json, writing
from mmkit.storage.tensors import read_tensors, write_safetensors

FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")
_FINITE = ("weights", "best", "ema", "optimizer")


# ---------------------------------------------------------------------------------------------- tensors of a module


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU; gathers the shards of FSDP2 (all processes must call it)."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu()


def _fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `target`, sharding it as `target` is."""
    target.detach().copy_(shard_like(target, value))


def shard_like(target: Tensor, value: Tensor) -> Tensor:
    """`value` on the device of `target`, split over the processes as `target` is."""
    value = value.to(target.device)
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, target.device_mesh, target.placements)  # type: ignore[attr-defined]
    return value


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What training can change: the trainable parameters and the persistent buffers."""
    state: dict[str, Tensor] = {k: p for k, p in module.named_parameters() if p.requires_grad}
    caches = {
        id(b)
        for m in module.modules()
        for k, b in m.named_buffers(recurse=False)
        if k in m._non_persistent_buffers_set  # left out of state_dict() as well
    }
    return state | {k: b for k, b in module.named_buffers() if id(b) not in caches}


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of what training can change in `module`: trainable parameters and buffers, by name."""
    return {k: whole(v).clone() for k, v in trained_tensors(module).items()}


def load_module_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put `tensors` back; raises `CheckpointError`, changing nothing, when names or shapes differ."""
    own = trained_tensors(module)
    wrong = [k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    if own.keys() != tensors.keys() or wrong:
        differ = sorted(own.keys() ^ tensors.keys()) or sorted(wrong)
        raise CheckpointError(
            f"{source} belongs to another model or adapter: {len(differ)} tensors differ, such as "
            f"{', '.join(differ[:4])}."
        )
    for key, value in tensors.items():
        _fill(own[key], value)


def optimizer_tensors(names: list[str], optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state: (tensors by `<parameter>/<key>`, JSON-friendly rest). `names`: in the groups' order."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = whole(value)
            else:
                scalars.setdefault(name, {})[key] = value
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return tensors, {"state": scalars, "param_groups": groups}


def load_optimizer_tensors(
    names: list[str], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(zip(names, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    state: dict[int, dict[str, Any]] = {}
    index = {name: i for i, name in enumerate(names)}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        like_parameter = value.shape == parameters[name].shape and value.ndim > 0
        state.setdefault(index[name], {})[entry] = shard_like(parameters[name], value) if like_parameter else value
    for name, entries in rest["state"].items():
        state.setdefault(index[name], {}).update(entries)
    current = optimizer.state_dict()["param_groups"]
    groups = [
        {**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}, "params": group["params"]}
        for saved, group in zip(rest["param_groups"], current, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# ------------------------------------------------------------------------------------------------------------ folders


class CheckpointWriter:
    """Write one checkpoint: into a hidden folder first, renamed when everything is on the disk.

    Args:
        folder: the final folder.
        rank: this process; process 0 writes.
        barrier: waits for all processes.
    """

    def __init__(self, folder: Path, rank: int = 0, barrier: Any = lambda: None) -> None:
        self.folder, self.rank, self.barrier = folder, rank, barrier
        self.temporary = folder.parent / f".{folder.name}.tmp"

    def write(self, files: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        """Write `files` (tensors by stem) and `state`; replaces a folder of the same name.

        Raises `StorageError`; nothing half-written is left then.
        """
        with writing(self.folder):
            try:
                if self.rank == 0:
                    remove(self.temporary)
                    self.temporary.mkdir(parents=True)
                    self._complete(files, state)
                self.barrier()
            except BaseException:
                remove(self.temporary)
                raise

    def _complete(self, files: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        for stem, tensors in files.items():
            write_safetensors(self.temporary / f"{stem}.safetensors", tensors)
        digests = {p.name: sha256_file(p) for p in sorted(self.temporary.glob("*.safetensors"))}
        write_json(self.temporary / "state.json", sealed({"format": FORMAT, **state, "files": digests}))
        if self.folder.exists():
            _remove(self.folder)
        os.replace(self.temporary, self.folder)
        sync(self.folder.parent)


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` as JSON gives it back, with the sha256 of its content as "digest"."""
    plain = json.loads(json.dumps({k: v for k, v in state.items() if k != "digest"}))
    return {**plain, "digest": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint after `step` optimiser steps."""
    return f"step_{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoint folders in `root`, oldest first."""
    found = [p for p in root.glob("step_*") if _NAME.fullmatch(p.name) and p.is_dir()] if root.is_dir() else []
    return sorted(found, key=lambda p: int(p.name[5:]))


def prune_checkpoints(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and left-over half-written ones."""
    for folder in list_checkpoints(root)[:-keep]:
        _remove(folder)
    clean_checkpoints(root)


def clean_checkpoints(root: Path) -> None:
    """Delete what a killed process left half-written or half-deleted in `root`; the caller holds the run's lock."""
    for pattern in (".step_*.tmp", ".step_*.old", ".failed_at_*"):
        for folder in root.glob(pattern):
            remove(folder)


def remove_checkpoints(root: Path, after: int = -1) -> None:
    """Delete the checkpoints of an earlier run beyond step `after`, including those saved by a failure."""
    for folder in list_checkpoints(root):
        if int(folder.name[5:]) > after:
            _remove(folder)
    for folder in root.glob("failed_at_*"):
        _remove(folder)


def _remove(folder: Path) -> None:
    hidden = folder.with_name(f".{folder.name}.old")  # renamed first: a half-deleted one must not look complete
    remove(hidden)
    os.replace(folder, hidden)
    remove(hidden)


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """`(state, tensors by file stem)` of a checkpoint whose files all carry the recorded sha256.

    Raises:
        CheckpointError: missing, damaged, not finite, or of an unknown format.
    """
    state = read_json(folder / "state.json")
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("files"), dict):
        raise CheckpointError(f"{folder} is not a training checkpoint of format {FORMAT}.")
    if state.get("digest") != sealed(state)["digest"]:
        raise CheckpointError(f"{folder / 'state.json'} is damaged: its content is not what was written.")
    tensors = {}
    for name, digest in state["files"].items():
        path = folder / name
        if not path.is_file() or path.parent != folder or sha256_file(path) != digest:
            raise CheckpointError(f"{path} is missing or damaged; use an earlier checkpoint.")
        tensors[path.stem] = read_tensors(path, allow_pickle_format=False)
        bad = [k for k, v in tensors[path.stem].items() if v.is_floating_point() and bool(v.isnan().any())]
        if bad and path.stem in _FINITE:
            raise CheckpointError(f"{path} holds NaN in {', '.join(bad[:4])}; use an earlier checkpoint.")
    return state, tensors


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints at `folder`, newest first: one itself, or those of an `output_dir` or its `checkpoints` folder."""
    if (folder / "state.json").is_file():
        return [folder]
    return (list_checkpoints(folder / "checkpoints") or list_checkpoints(folder))[::-1]


def passed_over(error: Exception) -> None:
    """Say that a checkpoint cannot be used and an earlier one will be."""
    warnings.warn(f"Passing over a damaged checkpoint: {error}", stacklevel=3)


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """The newest readable one of `checkpoints_of(folder)`, or None; damaged ones are passed over with a warning."""
    for path in checkpoints_of(folder):
        try:
            return path, *read_checkpoint(path)
        except CheckpointError as error:
            passed_over(error)
    return None


def load_trained(folder: str | os.PathLike[str], model: nn.Module, adapter: nn.Module | None = None) -> None:
    """Put the newest checkpoint of an `output_dir` into a fresh model (and adapter), for example after FSDP training.

    The parameters that were trained must have `requires_grad`, as when `fit` ran.
    Raises `CheckpointError` when there is no checkpoint or it belongs to another model.
    """
    found = newest_checkpoint(absolute(folder))
    if found is None:
        raise CheckpointError(f"{folder} holds no training checkpoint.")
    path, _, tensors = found
    holder = nn.Module()
    holder.model = model
    if adapter is not None:
        holder.adapter = adapter
    load_module_tensors(holder, tensors["weights"], str(path))
