"""A system in a folder: the map, the head, the tree, and all that decides what comes next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkit.errors import CheckpointError, RunDiffersError
from mmkit.pointcloud.slam.config import HierSLAMConfig
from mmkit.pointcloud.slam.frames import RGBDFrame
from mmkit.pointcloud.slam.keyframes import Keyframe
from mmkit.pointcloud.slam.model import NAMES
from mmkit.pointcloud.slam.state import SlamState
from mmkit.pointcloud.slam.tree import SemanticTree
from mmkit.pointcloud.splat_files import save_splats
from mmkit.storage import new_folder, open_folder, read_json, read_tensors, write_json, write_safetensors
from mmkit.storage.files import expanded

KIND, MAP, STATE = "slam", "map.safetensors", "state.safetensors"


def save(slam: SlamState, folder: str | os.PathLike[str]) -> Path:
    """Write a system; the folder appears whole or not at all, and one of a system is replaced whole.

    `map.safetensors` holds the Gaussians and the head, `state.safetensors` poses, keyframes, scans, random state and the head's moments;
    `tree.json` and `config.json` the rest.
    """
    path = expanded(folder)
    with new_folder(path, KIND, {"frames": len(slam), "gaussians": len(slam.map)}) as draft:
        tensors = slam.map.tensors()
        if slam.head is not None:
            tensors |= {f"head.{k}": v for k, v in slam.head.state_dict().items()}
        write_safetensors(draft / MAP, tensors)
        write_safetensors(draft / STATE, _state(slam))
        write_json(draft / "config.json", {"config": slam.config.to_dict(), "tracker": slam.tracker})
        if slam.tree is not None:
            slam.tree.to_json(draft / "tree.json")
    return path


def _state(slam: SlamState) -> dict[str, Tensor]:
    state = {
        "poses": slam.trajectory(), "tracked": torch.tensor(slam.tracked, dtype=torch.bool), "random": slam.generator.get_state(),
        "losses": torch.tensor(slam.detector.losses, dtype=torch.float64), "radius": torch.tensor(slam.radius, dtype=torch.float64),
        "loops": torch.tensor(slam.loops, dtype=torch.int64).view(-1, 2),
    }  # fmt: skip
    state |= {f"scans.{k}": v for k, v in slam.scans.tensors().items()}
    if slam._origin is not None:
        state["origin"] = slam._origin
    if slam.seen is not None:
        state["seen"] = torch.tensor(list(slam.seen), dtype=torch.uint8)
    for k in slam.keyframes:
        parts = {"color": k.frame.color, "depth": k.frame.depth, "K": k.frame.K, "view": k.view}
        parts |= {} if k.frame.labels is None else {"labels": k.frame.labels}
        state |= {f"keyframe.{k.index}.{name}": value for name, value in parts.items()}
    if slam.head_optimizer is not None and slam.head is not None:
        for name, p in slam.head.named_parameters():
            state |= {f"adam.{name}.{key}": value for key, value in slam.head_optimizer.state[p].items()}
    return state


def settings(folder: str | os.PathLike[str]) -> tuple[HierSLAMConfig, SemanticTree | None]:
    """The settings and the tree of a folder.

    Raises:
        InputError: there is no such folder.
        CheckpointError: it is damaged, or holds something else.
    """
    path = expanded(folder)
    open_folder(path, KIND)
    return HierSLAMConfig(**_config(path)), _tree(path)


def _tree(path: Path) -> SemanticTree | None:
    return SemanticTree.from_json(path / "tree.json") if (path / "tree.json").is_file() else None


def _config(path: Path) -> dict[str, Any]:
    saved = read_json(path / "config.json")
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise CheckpointError(f"{path / 'config.json'} does not hold the settings of a system.")
    return saved["config"]


def restore(slam: SlamState, folder: str | os.PathLike[str]) -> None:
    """Bring a fresh system to the state of a folder. Raises `RunDiffersError` when it has other settings or another tree."""
    path = expanded(folder)
    open_folder(path, KIND)
    saved, own = _config(path), slam.config.to_dict()
    changes = {k: f"{saved.get(k)} is now {own[k]}" for k in sorted(own) if saved.get(k) != own[k]}
    if _tree(path) != slam.tree:
        changes["tree"] = "another label tree"
    if changes:
        raise RunDiffersError(path, changes)
    map_, state = (read_tensors(path / name, allow_pickle_format=False) for name in (MAP, STATE))
    try:
        _fill(slam, map_, state)
    except (KeyError, RuntimeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold a whole system ({type(error).__name__}: {error}).") from error


def _fill(slam: SlamState, map_: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    slam.map.replace({n: map_[n] for n in (*NAMES, "quats", "birth")})
    if slam.head is not None and slam.head_optimizer is not None:
        slam.head.load_state_dict({k.removeprefix("head."): v for k, v in map_.items() if k.startswith("head.")})
        for name, p in slam.head.named_parameters():
            prefix = f"adam.{name}."
            moments = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if moments:
                slam.head_optimizer.state[p] = moments
    slam.poses, slam.tracked = list(state["poses"]), state["tracked"].tolist()
    slam.generator.set_state(state["random"])
    slam.detector.losses, slam.radius = state["losses"].tolist(), float(state["radius"])
    slam.loops = [(int(a), int(b)) for a, b in state["loops"]]
    slam._origin = state.get("origin")
    slam.seen = bytes(state["seen"].tolist()) if "seen" in state else None
    slam.scans.restore({k.removeprefix("scans."): v for k, v in state.items() if k.startswith("scans.")})
    numbers = sorted({int(k.split(".")[1]) for k in state if k.startswith("keyframe.")})
    slam.keyframes = []
    for i in numbers:
        part = {k.rsplit(".", 1)[1]: v for k, v in state.items() if k.startswith(f"keyframe.{i}.")}
        frame = RGBDFrame(part["color"], part["depth"], part["K"], part.get("labels"), None, f"keyframe {i}")
        slam.keyframes.append(Keyframe(i, frame, part["view"]))


def export(slam: SlamState, path: str | os.PathLike[str]) -> Path:
    """The map as a splat file; .ply carries labels (the tree's ids)."""
    labels = slam.labels()
    model = slam.map.as_splats()
    if Path(path).suffix.lower() != ".ply" or labels is None or slam.tree is None:
        return save_splats(model, path)
    ids = torch.tensor(slam.tree.ids)
    return save_splats(model, path, labels=torch.where(labels >= 0, ids[labels.clamp_min(0)], -1).int().numpy())
