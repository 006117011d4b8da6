"""Clouds and meshes in, classes or parts out: `mmkit.pipeline("point-cloud-classification")` and `("point-cloud-segmentation")`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from mmkit.adapters import attached_adapters, load_adapter
from mmkit.backbones.bundled import load_weights
from mmkit.backbones.model import open_model
from mmkit.errors import InputError
from mmkit.ops.points import gather_points, knn_indices
from mmkit.pipelines import Pipeline, finite
from mmkit.pointcloud.io import PointCloud, columns, read_point_cloud, rounding_offset
from mmkit.pointcloud.point_peft.adapter import PointPEFT
from mmkit.pointcloud.point_peft.result import CloudClassification, CloudSegmentation
from mmkit.pointcloud.transforms import choose_points, unit_sphere
from mmkit.storage.files import expanded
from mmkit.weights import weight_entry

CloudLike: TypeAlias = "str | os.PathLike[str] | np.ndarray | PointCloud | Tensor"


def load_cloud(source: CloudLike) -> np.ndarray:
    """Points (N, 3) float32 of a file, an array (N, 3+), a tensor or a `PointCloud`; those of surveys are moved to the origin.

    Raises `InputError` for an unreadable file, another shape, an empty cloud, or coordinates that are not finite.
    """
    if isinstance(source, str | os.PathLike):
        return read_point_cloud(source).xyz
    xyz = columns(source.xyz if isinstance(source, PointCloud) else source)
    if xyz.ndim != 2 or xyz.shape[1] < 3 or not len(xyz):
        raise InputError(f"A cloud is an array (N, 3) with N >= 1, not {xyz.shape}.")
    xyz = xyz[:, :3]
    if not (np.abs(xyz) <= np.finfo(np.float32).max).all():
        raise InputError("The cloud has NaN or infinite coordinates; remove those points first.")
    return np.ascontiguousarray(xyz - (rounding_offset(xyz) or 0.0), np.float32)


class _CloudPipeline(Pipeline):
    """What both have in common: loading, choosing points.

    Args:
        model: a module of this room, a folder written by `save_pretrained`, or a bundled name.
        adapter: a folder written by `save_adapter`, for that model.
        num_points: points the model sees; default: that of the bundled weights, else 16 per group but at least 256.
        class_names: default from the model.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        adapter: str | os.PathLike[str] | None = None,
        num_points: int | None = None,
        class_names: Sequence[str] = (),
    ):
        self._trained_points: int | None = None
        super().__init__(model, device=device, dtype=dtype)
        if not hasattr(self.model, "group"):
            raise InputError(f"{self.task} needs a point cloud model of mmkit, not {type(self.model).__name__}.")
        if adapter is not None:
            load_adapter(self.model, adapter)
            self.model.eval()
        group: Any = self.model.group
        self.least = max(group.num_groups, group.group_size)
        self.num_points = num_points or self._trained_points or max(256, 16 * group.num_groups)
        if self.num_points < self.least:
            raise InputError(f"num_points={self.num_points} is too few; the model needs {self.least}.")
        count = int(getattr(self.model, "num_classes", 0) or getattr(self.model, "num_parts", 0))
        names = tuple(class_names) or getattr(self.model, "class_names", ())
        self.class_names = names or tuple(f"class {i}" for i in range(count))
        if len(self.class_names) != count or not count:
            raise InputError(f"The model has {count} classes; {len(self.class_names)} names were given.")

    def load(self, model: str | os.PathLike[str]) -> nn.Module:
        if expanded(model).is_dir():
            return open_model(model)
        self._trained_points = weight_entry(str(model)).extra.get("num_points")
        return load_weights(str(model))

    def prepare(self, source: CloudLike) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """All points of the source, the indices of those the model sees, and these in the unit sphere, (1, num_points, 3).

        Raises `InputError` when there are fewer points than groups.
        """
        xyz = load_cloud(source)
        if len(xyz) < self.least:
            raise InputError(f"The cloud has {len(xyz)} points; the model needs at least {self.least}.")
        index = choose_points(xyz, self.num_points)
        return xyz, index, torch.from_numpy(unit_sphere(xyz[index]))[None].to(self.device, self.dtype)


class PointCloudClassificationPipeline(_CloudPipeline):
    """Says what a cloud or mesh is. Clouds are answered one by one, so that an answer never depends on the others.

    Example:
        >>> import mmkit, numpy as np
        >>> from mmkit.data.drawn.shapes import drawn_shape
        >>> points, _ = drawn_shape(np.random.default_rng(1), "chair", 2000)
        >>> result = mmkit.pipeline("point-cloud-classification")(points)
        >>> len(result.probabilities), result.groups.shape
        (16, (256,))
    """

    task: ClassVar[str] = "point-cloud-classification"
    default_weights: ClassVar[str] = "point_shapes"

    @torch.no_grad()
    def __call__(self, clouds: CloudLike | Sequence[CloudLike]) -> Any:
        """Classify a cloud, or a list of them.

        Args:
            clouds: paths, arrays (N, 3), or `PointCloud`s; up is +y.

        Returns:
            One `CloudClassification`, or a list in the order of the input.

        Raises `InputError` for what `load_cloud` and `prepare` refuse, and a model that answers with NaN or infinite values.
        """
        return [self._one(c) for c in clouds] if isinstance(clouds, list | tuple) else self._one(clouds)

    def _one(self, source: Any) -> CloudClassification:
        _, _, points = self.prepare(source)
        model: Any = self.model
        seen: list[Tensor] = []
        handle = model.blocks[-1].attn.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        try:
            probabilities = finite(model(points)).softmax(-1)[0]
        finally:
            handle.remove()
        center = model.group(points)[1]
        attention = _class_attention(model.blocks[-1].attn, seen[-1])[-center.shape[1] :]
        found: tuple[tuple[int, float], ...] = ()
        for adapter in attached_adapters(model).values():
            if isinstance(adapter, PointPEFT) and adapter.config.bank_size:
                got = adapter.retrieved(points)
                found = tuple(zip(got.index[0].tolist(), got.weight[0].tolist(), strict=True))
        return CloudClassification(
            self.class_names,
            probabilities.cpu().numpy(),
            points[0].float().cpu().numpy(),
            knn_indices(center, points, 1)[0, :, 0].cpu().numpy() + 1,
            (attention / attention.sum()).cpu().numpy(),
            found,
        )


def _class_attention(attn: Any, x: Tensor) -> Tensor:
    """(T,): how much the first token of `x` (1, T, D) looks at each, over all heads."""
    q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return ((q[:, :, :1] * attn.scale) @ k.transpose(-2, -1)).float().softmax(-1).mean((0, 1, 2))


class PointCloudSegmentationPipeline(_CloudPipeline):
    """Names the part of every point of a cloud or mesh.

    Example:
        >>> import mmkit, numpy as np
        >>> from mmkit.data.drawn.shapes import drawn_shape
        >>> points, _ = drawn_shape(np.random.default_rng(1), "chair", 2000)
        >>> mmkit.pipeline("point-cloud-segmentation")(points).labels.shape
        (2000,)
    """

    task: ClassVar[str] = "point-cloud-segmentation"
    default_weights: ClassVar[str] = "point_parts"

    @torch.no_grad()
    def __call__(self, cloud: CloudLike, *, object_class: int | None = None) -> CloudSegmentation:
        """Name the parts.

        Args:
            cloud: a path, an array (N, 3) or a `PointCloud`. The model sees `num_points` of them; the others take the answer of the
                nearest one.
            object_class: what the cloud is, for models that want to know.
        """
        xyz, index, points = self.prepare(cloud)
        kind = None if object_class is None else torch.tensor([object_class], device=self.device)
        probabilities = finite(self.model(points, kind)).softmax(1)[0].cpu()
        probability, labels = probabilities.max(0)
        near = knn_indices(torch.from_numpy(xyz[index])[None], torch.from_numpy(xyz)[None], 1)[..., 0]
        columns = torch.stack([labels.double(), probability.double()], -1)[None]
        spread = gather_points(columns, near)[0].numpy()
        return CloudSegmentation(self.class_names, xyz, spread[:, 0].astype(np.int64), spread[:, 1].astype(np.float32))
