"""Adapt the point cloud encoder to a folder of labelled clouds: what `mmkit finetune --task point-cloud-classification` calls."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmkit.adapters import apply_adapter, save_adapter
from mmkit.backbones import load_weights
from mmkit.data import stratified_split
from mmkit.data.labels import class_order, from_folders
from mmkit.data.listing import list_folder
from mmkit.errors import InputError
from mmkit.pointcloud.io import SUFFIXES, read_point_cloud
from mmkit.pointcloud.point_peft.adapter import PointPEFT
from mmkit.pointcloud.point_peft.bank import FeatureMemoryBank
from mmkit.pointcloud.point_peft.model import PointMAE
from mmkit.pointcloud.point_peft.training import AugmentedLoss
from mmkit.pointcloud.transforms import Augment, choose_points, unit_sphere
from mmkit.storage.files import absolute, expanded
from mmkit.training.classifying import Classified, config_of, known_method, no_settings, train_classifier, without
from mmkit.training.digest import short_name
from mmkit.training.metrics import balanced_weights

METHODS = ("point_peft", "pointgst", "idpt", "ssf", "bitfit", "lora", "linear_probe", "full")
Example = tuple[Tensor, int]


@without("mixup", "cutmix", "mixup_prob")
def finetune(
    data: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    adapter: str = "point_peft",
    *,
    output_dir: str | os.PathLike[str] | None = None,
    settings: dict[str, Any] | None = None,
    val: float = 0.2,
    seed: int = 0,
    resume: bool = True,
    dry_run: bool = False,
    **fit_options: Any,
) -> Classified:
    """Train a classifier of clouds on `data/<class>/<cloud>`, or `data/{train,val}/<class>/<cloud>`; up is +y.

    Args:
        model: a folder written by `PointMAE.save_pretrained`, or a bundled name; default: `point_mae_nano`.
        adapter: one of `METHODS`. Point-PEFT gets a bank of the training clouds.
        output_dir: gets `model/`, `adapter/`, as `mmkit.pipeline("point-cloud-classification", model, adapter=...)` takes them, `run/`, and
            the report.
        settings: of the adapter. val: share held back where the folder has no "val"; 0: none.
        dry_run: read everything and say what would be trained (`plan`), no more.
        fit_options: fields of `FitConfig`, but `mixup`, `cutmix` and `mixup_prob`.

    Raises:
        InputError: a folder or file that cannot be read, another method, too few points.
    """
    known_method(adapter, METHODS, "point-cloud-classification")
    if adapter == "full":
        no_settings(settings, adapter)
    name = str(model or "point_mae_nano")
    encoder = _encoder(name)
    num_points = max(256, 16 * encoder.group.num_groups)  # as many as the pipeline shows a model of a folder
    first, second, names, paths = _read(Path(data), val, seed, num_points)
    torch.manual_seed(seed)
    net = _classifier(encoder, names)
    own = _attach(net, adapter, dict(settings or {}), torch.stack([x for x, _ in first]))
    config = config_of(
        fit_options, lr=5e-4 if adapter == "full" else 5e-3, batch_size=16, epochs=20, warmup_epochs=1.0, weight_decay=0.05, seed=seed,
        resume=resume, drop_last=len(first) % 16 == 1,
    )  # fmt: skip
    weights = balanced_weights([y for _, y in first]) if config.class_weights else None
    folder = None if output_dir is None else absolute(output_dir)
    options = {k: v for k, v in vars(config).items() if k not in ("resume", "progress")}
    told = {
        "task": "point-cloud-classification",
        "data": str(absolute(data)),
        "backbone": name,
        "adapter": adapter,
        "val": val,
    }
    where = folder or Path("RUN")
    with_adapter = f', adapter="{where / "adapter"}"' if own is not None else ""

    def save(place: Path) -> None:
        if own is None:
            net.save_pretrained(place / "model")
            return
        bare: Any = own.detach()
        bare.save_pretrained(place / "model")
        own.attach(net)
        save_adapter(own, place / "adapter")

    return train_classifier(
        net,
        first,
        second or None,
        title=f"{adapter} on {name}",
        class_names=names,
        names=paths,
        labels=[y for _, y in second],
        config=config,
        output_dir=folder,
        settings={**told, "output": folder and str(folder), **options, "settings": settings or {}},
        use=f'mmkit.pipeline("point-cloud-classification", "{where / "model"}"{with_adapter})("cloud.ply").label',
        save=save,
        adapter=own,
        trained=[("method", adapter), ("backbone", name), ("points of a cloud", str(num_points))],
        picture=lambda i: drawn(second[i][0].numpy()),
        loss_fn=AugmentedLoss(Augment("y", (0.8, 1.2), per_axis=False), config.label_smoothing, weights),
        dry_run=dry_run,
        identity={"backbone": name, "method": adapter, "validation share": val, "points": num_points},
    )


def _read(
    source: Path, val: float, seed: int, num_points: int
) -> tuple[list[Example], list[Example], list[str], list[str]]:
    """Clouds to train on, clouds held back, the classes, and the names of the latter."""
    if not source.is_dir():
        raise InputError(f"{source} is not a folder; give one with a sub-folder of clouds per class.")
    rows, _ = from_folders(list_folder(source, SUFFIXES), "clouds")
    names = class_order(label for _, label, _ in rows)
    if len(names) < 2:
        raise InputError(f"Training needs at least two classes; found {names}.")
    number = {label: i for i, label in enumerate(names)}
    labels = [number[label] for _, label, _ in rows]
    splits = {split for _, _, split in rows}
    if "train" in splits and splits & {"val", "test"}:
        held_split = "val" if "val" in splits else "test"
        first = [i for i, row in enumerate(rows) if row[2] == "train"]
        second = [i for i, row in enumerate(rows) if row[2] == held_split]
    else:
        first, second = stratified_split(labels, val, seed) if val else (list(range(len(rows))), [])
    if not first or (val and not second):
        raise InputError(f"{len(rows)} clouds of {len(names)} classes are too few to hold back {val:.0%}.")

    def load(i: int) -> Example:
        xyz = read_point_cloud(rows[i][0]).xyz
        if len(xyz) < 32:
            raise InputError(f"{rows[i][0]} has {len(xyz)} points, too few to tell what it is.")
        return torch.from_numpy(unit_sphere(xyz[choose_points(xyz, num_points)])), labels[i]

    return [load(i) for i in first], [load(i) for i in second], names, [short_name(rows[i][0]) for i in second]


def _encoder(name: str) -> Any:
    encoder: Any = PointMAE.from_pretrained(name) if expanded(name).is_dir() else load_weights(name)
    if not isinstance(encoder, PointMAE):
        raise InputError(f"{name} is a {type(encoder).__name__}; give a PointMAE, such as point_mae_nano.")
    return encoder


def _classifier(encoder: Any, class_names: list[str]) -> Any:
    """The encoder with a fresh head."""
    fresh = PointMAE(**{**encoder.config, "num_classes": len(class_names), "class_names": class_names})
    own = {k: v for k, v in encoder.state_dict().items() if not k.startswith("head.")}
    fresh.load_state_dict(own, strict=False)
    return fresh


def _attach(net: nn.Module, method: str, settings: dict[str, Any], clouds: Tensor) -> Any:
    """The adapter on `net`; None when all weights are trained."""
    if method == "full":
        return None
    if method == "point_peft":
        prompts = min(10, len(clouds) + 1)
        settings = {"bank_size": len(clouds), "num_prompts": prompts, "adapter_dim": 8, "init": "zero", **settings}
        bank = FeatureMemoryBank.build(net, clouds.split(64))
    elif method in ("ssf", "bitfit", "lora"):
        settings = {"modules_to_save": ("head",), **settings}
    adapter = apply_adapter(net, method, **settings)
    if isinstance(adapter, PointPEFT) and adapter.config.bank_size:
        adapter.set_bank(bank)
    return adapter


def drawn(points: np.ndarray[Any, Any], side: int = 112) -> Image.Image:
    """A cloud in the unit sphere from the front, nearer points darker; up is +y."""
    picture = np.full((side, side), 245, np.uint8)
    order = points[:, 2].argsort()
    x, y = ((points[order, :2] * (1, -1) * 0.46 + 0.5) * side).astype(int).clip(0, side - 2).T
    shade = (170 - 140 * (points[order, 2] * 0.5 + 0.5)).clip(0, 255).astype(np.uint8)
    for dx in (0, 1):
        for dy in (0, 1):
            picture[y + dy, x + dx] = shade
    return Image.fromarray(picture).convert("RGB")
