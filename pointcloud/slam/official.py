"""The authors' files: `params.npz` (SplaTAM's layout and a code) and `Semantic.pth` (the head)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkit.errors import CheckpointError, InputError
from mmkit.pointcloud.slam.config import HierSLAMConfig
from mmkit.pointcloud.slam.poses import inverse, matrix, split
from mmkit.pointcloud.slam.system import HierSLAM
from mmkit.pointcloud.slam.tree import SemanticTree
from mmkit.storage import atomic_write, read_tensors
from mmkit.storage.files import expanded

_SHAPES = {
    "means3D": 3,
    "rgb_colors": 3,
    "unnorm_rotations": 4,
    "logit_opacities": 1,
    "log_scales": None,
    "semantic": None,
}


@dataclass(frozen=True)
class OfficialMap:
    """What `params.npz` holds beside the map: K (3, 3), the first frame's world-to-camera (4, 4), size, and true poses if present."""

    K: Tensor
    first_view: Tensor
    width: int
    height: int
    truth: Tensor | None


def load_official(
    params: str | os.PathLike[str], head: str | os.PathLike[str] | None = None, tree: SemanticTree | None = None, *, backend: str = "auto"
) -> tuple[HierSLAM, OfficialMap]:  # fmt: skip
    """A system with the authors' map, poses and head; it renders, exports and can be evaluated.

    The files carry no tree, keyframes or settings, so tracking cannot go on from them. K is given half a pixel more than stored, as pixel
    centres lie at 0.5 here.

    Args:
        params: `params.npz`, of Hier-SLAM or (without codes) of SplaTAM.
        head: `Semantic.pth`.
        tree: whose code width must be the file's.

    Raises:
        CheckpointError: missing, damaged or pickled files, arrays that do not fit together, another code width.
    """
    path = expanded(params)
    arrays = _arrays(path)
    missing = [
        k
        for k in ("means3D", "rgb_colors", "logit_opacities", "log_scales", "cam_unnorm_rots", "cam_trans")
        if k not in arrays
    ]
    if missing:
        raise CheckpointError(f"{path} holds no {', '.join(missing)}; a map of Hier-SLAM or SplaTAM is expected.")
    n = len(arrays["means3D"])
    for name, width in _SHAPES.items():
        shape = arrays[name].shape if name in arrays else None
        if shape is not None and (len(shape) != 2 or shape[0] != n or (width is not None and shape[1] != width)):
            raise CheckpointError(f"{path}: {name} has shape {shape}, which does not fit {n} Gaussians.")
    if arrays["log_scales"].shape[1] not in (1, 3):
        raise CheckpointError(f"{path}: log_scales must have 1 or 3 columns; it has {arrays['log_scales'].shape[1]}.")
    codes = arrays.get("semantic", np.zeros((n, 0), np.float32))
    if tree is not None and codes.shape[1] not in (tree.code_dim, tree.num_classes):
        raise CheckpointError(
            f"{path} has codes of {codes.shape[1]} numbers; the tree's {tree.code_dim}, flat {tree.num_classes}."
        )
    flat = tree is not None and codes.shape[1] == tree.num_classes != tree.code_dim
    kind = "none" if tree is None else "flat" if flat else "tree"
    slam = HierSLAM(HierSLAMConfig(tracker="constant", semantics=kind), tree, backend=backend)
    slam.map.replace(
        {
            "means": _tensor(arrays["means3D"]), "rgb": _tensor(arrays["rgb_colors"]),
            "opacities": _tensor(arrays["logit_opacities"])[:, 0],
            "scales": _tensor(arrays["log_scales"]), "codes": _tensor(codes), "birth": _tensor(arrays.get("timestep", np.zeros(n))).long(),
            "quats": _tensor(arrays["unnorm_rotations"]) if "unnorm_rotations" in arrays else torch.tensor([1.0, 0, 0, 0]).repeat(n, 1),
        }
    )  # fmt: skip
    cameras = arrays["cam_unnorm_rots"].shape, arrays["cam_trans"].shape
    if (
        [len(c) for c in cameras] != [3, 3]
        or (cameras[0][1], cameras[1][1], cameras[0][2]) != (4, 3, cameras[1][2])
        or min(cameras)[0] < 1
    ):
        raise CheckpointError(
            f"{path}: cameras must be (1, 4, F) and (1, 3, F); they are {cameras[0]} and {cameras[1]}."
        )
    quats, shifts = _tensor(arrays["cam_unnorm_rots"])[0].T.double(), _tensor(arrays["cam_trans"])[0].T.double()
    slam.poses = [inverse(matrix(q, s)) for q, s in zip(quats, shifts, strict=True)]
    slam.tracked = [True] * len(slam.poses)
    if head is not None:
        _load_head(slam, expanded(head))
    return slam, _about(path, arrays)


def _load_head(slam: HierSLAM, path: Path) -> None:
    if slam.head is None:
        raise InputError(f"{path}: a head belongs to a tree's codes; give the tree.")
    state = {k.rsplit(".", 1)[-1]: v for k, v in read_tensors(path).items()}
    shape = tuple(slam.head.weight.shape)
    weight = state.get("weight", torch.zeros(0))
    if weight.dim() == 4 and tuple(weight.shape[2:]) == (1, 1):
        weight = weight[..., 0, 0]
    if tuple(weight.shape) != shape or tuple(state.get("bias", torch.zeros(0)).shape) != shape[:1]:
        raise CheckpointError(f"{path} holds a head of shape {tuple(weight.shape)}; this tree's is {shape}.")
    slam.head.load_state_dict({"weight": weight, "bias": state["bias"]})


def _about(path: Path, arrays: dict[str, np.ndarray]) -> OfficialMap:
    try:
        K = _tensor(arrays.get("intrinsics", np.eye(3)))[:3, :3].clone()
        K[:2, 2] += 0.5
        view = _tensor(arrays.get("w2c", np.eye(4))).double()
        size = int(arrays.get("org_width", np.array(0))), int(arrays.get("org_height", np.array(0)))
        truth = _tensor(arrays["gt_w2c_all_frames"]).double() if "gt_w2c_all_frames" in arrays else None
        if truth is not None:
            truth = inverse(truth)
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: {error}.") from error
    return OfficialMap(K, view, *size, truth)


def save_official(
    slam: HierSLAM, path: str | os.PathLike[str], K: Tensor, size: tuple[int, int], truth: Tensor | None = None
) -> Path:
    """Write a map as `params.npz` for the authors' viewers and scripts; `truth`: true camera-to-world poses (F, 4, 4)."""
    if not len(slam):
        raise InputError("There is nothing to write yet: no frame has been seen.")
    file = expanded(path)
    m, n = slam.map.tensors(), len(slam)
    parts = [split(inverse(p)) for p in slam.poses]
    stored = K.clone()
    stored[:2, 2] -= 0.5
    true = slam.trajectory() if truth is None else truth
    content: dict[str, Any] = {
        "means3D": m["means"], "rgb_colors": m["rgb"], "unnorm_rotations": m["quats"], "logit_opacities": m["opacities"][:, None],
        "log_scales": m["scales"], "semantic": m["codes"], "timestep": m["birth"].float(),
        "cam_unnorm_rots": torch.stack([q for q, _ in parts], -1)[None].float(),
        "cam_trans": torch.stack([t for _, t in parts], -1)[None].float(),
        "intrinsics": stored, "w2c": torch.eye(4), "org_width": torch.tensor(size[0]), "org_height": torch.tensor(size[1]),
        "gt_w2c_all_frames": inverse(true[:n]).float(), "keyframe_time_indices": torch.tensor([k.index for k in slam.keyframes]),
    }  # fmt: skip
    with atomic_write(file) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, **{k: v.numpy() for k, v in content.items()})
    return file


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except Exception as error:  # damaged archives make the reader fail in every way there is
        raise CheckpointError(f"{path} is not a readable .npz of plain arrays ({error}).") from error
    strange = [k for k, v in arrays.items() if v.dtype.kind not in "fiub"]
    if strange:
        raise CheckpointError(f"{path}: {', '.join(strange[:5])} do not hold numbers.")
    return arrays


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, np.float32))
