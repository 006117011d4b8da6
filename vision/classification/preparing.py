"""Before training: data opened and split, a backbone with a fresh classifier, an adapter attached and seen to act."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmkit.adapters import Adapter, apply_adapter, list_adapters
from mmkit.backbones import ImageBackboneInfo, create_backbone, image_info, warn_if_random
from mmkit.data import ImageDataset, ImageTransform, fold_dataset, open_dataset, split_dataset
from mmkit.errors import InputError, check_seed, nearest
from mmkit.storage.files import absolute, expanded
from mmkit.training.digest import tensors_digest


def finetune_methods() -> list[str]:
    """Names `finetune` takes as `adapter`: every method that suits pictures, and "full" for all weights."""
    return sorted({*list_adapters(task="image-classification"), "full"})


def check_method(name: str) -> None:
    """Raise `InputError` unless `name` is one of `finetune_methods()`."""
    if name not in finetune_methods():
        raise InputError(f"Unknown adapter {name!r}. {nearest(name, finetune_methods())}")


@dataclass
class Prepared:
    """A model with its adapter attached and its data split, before training; `describe()` says what will be trained.

    Attributes:
        model: the backbone with a classifier for `class_names`.
        adapter: attached, or `None` for full fine-tuning.
        train, val: data sets of (image tensor, label); `val` is empty when nothing is held back.
        method: as given. backbone: how to build the backbone again.
        keep_backbone: whether its weights must be saved beside the adapter, because that would not bring them back.
        test: the test split of a source that has one beside validation pictures, else `None`; it gives the final score.
        solve_heads: whether training starts from solved classifiers, see `mmkit.vision.classification.probe`.
        measured_on: which pictures `val` holds: "validation", "test" when the source splits off only such, or "no" pictures.
        options: what `prepare` was asked for, by the names of the command's options; `run.toml` is written from it.
        identity: what decides a run beside data, adapter and settings: see `mmkit.training.fit`.
    """

    model: nn.Module
    adapter: Adapter | None
    train: ImageDataset
    val: ImageDataset
    class_names: list[str]
    method: str
    backbone: dict[str, Any]
    keep_backbone: bool
    test: ImageDataset | None = None
    measured_on: str = "validation"
    solve_heads: bool = False
    identity: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained, the classifier included."""
        if self.adapter is not None:
            return self.adapter.num_parameters()
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def describe(self) -> dict[str, Any]:
        """Trainable and total parameters, and the module paths the adapter acts at."""
        return {
            "method": self.method,
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": sum(p.numel() for p in self.model.parameters()),
            "sites": self.adapter.site_paths if self.adapter is not None else ["(all weights)"],
            "class_names": self.class_names,
            "train_images": len(self.train),
            "val_images": len(self.val),
            "test_images": len(self.test) if self.test is not None else 0,
            "measured_on": self.measured_on,
            "train_counts": self.train.class_counts(),
            "backbone": self.backbone["name"],
        }


def default_backbone(dataset: ImageDataset) -> str:
    """The bundled backbone that suits the pictures: their first one says how large they are."""
    return "mobilenetv2" if _photographs(dataset) else "tiny_vit"


def _photographs(dataset: ImageDataset) -> bool:
    """Whether the first picture is larger than 64 pixels, so that these are no digits."""
    picture, _ = dataset.with_transform(None)[0]
    return max(picture.size) > 64


def prepare(
    data: str | os.PathLike[str] | ImageDataset,
    backbone: str | os.PathLike[str] = "auto",
    adapter: str = "ssf",
    *,
    checkpoint_path: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    val: float = 0.2,
    seed: int = 0,
    fold: tuple[int, int] | None = None,
    augment: bool | None = None,
    auto_augment: str | None = None,
    color_jitter: float = 0.0,
    erase: float = 0.0,
    solve_heads: bool | None = None,
    on_error: str = "raise",
    settings: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
) -> Prepared:
    """Open and split the data, build the backbone with a fresh classifier, attach the adapter, and check that it acts.

    Args:
        data: a folder with one sub-folder per class, a CSV, a zip of either, or an opened `ImageDataset`.
        backbone: a `create_backbone` name or folder; "auto" is the bundled "mobilenetv2", which knows photographs, or "tiny_vit"
            for pictures of up to 64 pixels, such as digits.
        adapter: a name of `finetune_methods()`.
        checkpoint_path, pretrained, overrides: passed to `create_backbone`.
        val: share of the images kept for validation, unless the data brings a split. 0 trains on all but a "test" split, and
            nothing is measured in training.
        fold: (k, K): validate on the k-th of K parts (from 1) and train on the others, instead of `val`.
        seed: of the split and of the classifier's and adapter's start.
        augment: random crops and flips; `None`: for photographs, which are pictures of more than 64 pixels (leave off for digits, text
            and everything with a handedness).
        auto_augment, color_jitter, erase: further augmentation, see `mmkit.data.ImageTransform`; pictures that are not cropped and
            flipped stay so.
        solve_heads: start from classifiers that are solved on the features of the backbone as it is, and train gently from there
            (arXiv 2202.10054); `None`: for photographs, when the backbone's weights are not random.
        on_error: "raise" or "skip" unreadable images.
        settings: the adapter's own settings.

    Raises:
        InputError: unusable data (empty, one class, unreadable files), unknown names or settings.
    """
    check_method(adapter)
    check_seed(seed)
    dataset = data if isinstance(data, ImageDataset) else open_dataset(data, on_error=on_error)
    if len(dataset.class_names) < 2:
        raise InputError(f"Training needs at least two classes; found {dataset.class_names}.")
    if backbone == "auto":
        backbone = default_backbone(dataset)
    augment = _photographs(dataset) if augment is None else augment
    train, held, measured_on = _split(dataset, val, fold, seed)
    splits = set(dataset.splits or ())
    torch.manual_seed(seed)
    is_folder = expanded(backbone).is_dir()
    spec = {
        "name": str(expanded(backbone).resolve()) if is_folder else str(backbone),
        "overrides": overrides or {},
    }
    building = {"checkpoint_path": checkpoint_path, "pretrained": pretrained, **(overrides or {})}
    model, info = _classifier(backbone, building, dataset.class_names)
    if solve_heads is None:
        solve_heads = _photographs(dataset) and info.trained is not False
    attached = _attached(model, adapter, info.heads, settings or {})
    plain = info.preprocessing()
    more = {"auto_augment": auto_augment, "color_jitter": color_jitter, "erase": erase}
    return Prepared(
        model=model,
        adapter=attached,
        train=train.with_transform(_drawn(plain, augment, more)),
        val=held.with_transform(ImageTransform.of(plain)),
        class_names=list(dataset.class_names),
        method=adapter,
        backbone=spec,
        keep_backbone=bool(checkpoint_path) or not (is_folder or info.name.startswith("mmkit:")),
        test=dataset.split("test").with_transform(ImageTransform.of(plain))
        if "test" in splits and measured_on != "test" and ("train" in splits or not val or fold)
        else None,
        measured_on=measured_on,
        solve_heads=solve_heads,
        identity={
            "backbone": Path(backbone).name if is_folder else str(backbone),
            "overrides": overrides or None,
            "method": adapter,
            "validation share": None if fold or (val and {"train"} < splits) else val,
            "fold": f"{fold[0]} of {fold[1]}" if fold else None,
            "augment": augment,
            **{name: value or None for name, value in more.items()},
            "classifiers solved at the start": solve_heads or None,
            "weights at the start": _start(model, info.heads) if attached is None else None,
        },
        options={
            "data": None if isinstance(data, ImageDataset) else str(absolute(data)),
            "backbone": spec["name"],
            "adapter": adapter,
            "checkpoint": None if checkpoint_path is None else str(absolute(checkpoint_path)),
            "pretrained": pretrained,
            "val": None if fold else val,
            "seed": seed,
            "augment": augment,
            **more,
            "solve_heads": solve_heads,
            "skip_bad": on_error == "skip",
            "settings": settings or {},
        },
    )


def _classifier(
    backbone: str | os.PathLike[str], building: dict[str, Any], class_names: Sequence[str]
) -> tuple[nn.Module, ImageBackboneInfo]:
    """The backbone with a fresh classifier, and what is known of it."""
    model = create_backbone(backbone, num_classes=len(class_names), **building)
    warn_if_random(model)
    info = dataclasses.replace(image_info(model), class_names=tuple(class_names))
    if not info.heads:
        raise InputError(
            f"{backbone!r} has no classifier that could be trained; choose an image classification backbone."
        )
    model.__dict__["backbone_info"] = info
    return model, info


def _attached(model: nn.Module, method: str, heads: Sequence[str], settings: dict[str, Any]) -> Adapter | None:
    """The adapter, seen to act; `None` for all weights."""
    if method == "full":
        _keep_statistics(model)
        return None
    adapter = apply_adapter(model, method, **{"modules_to_save": heads, **settings})
    adapter.check()
    return adapter


def _drawn(plain: dict[str, Any], augment: bool, more: dict[str, Any]) -> ImageTransform:
    """How training pictures are drawn: cropped and flipped with `augment`, and changed as `more` says."""
    whole = {} if augment else {"scale": (1.0, 1.0), "hflip": 0.0}
    changed = any(more.values())
    return ImageTransform.of(plain, train=augment or changed, **(more | whole if changed else {}))


def _split(
    dataset: ImageDataset, val: float, fold: tuple[int, int] | None, seed: int
) -> tuple[ImageDataset, ImageDataset, str]:
    """Pictures to train on, pictures held back, and what these are: "validation", "test" or "no"."""
    if fold is not None:
        return *fold_dataset(dataset, *fold, seed), "validation"
    if val == 0:
        kept = [i for i in range(len(dataset)) if dataset.splits is None or dataset.splits[i] != "test"]
        return dataset.subset(kept), dataset.subset([]), "no"
    train, held = split_dataset(dataset, val, seed)
    splits = set(dataset.splits or ())
    return train, held, "test" if {"train", "test"} <= splits and "val" not in splits else "validation"


def _keep_statistics(model: nn.Module) -> None:
    """Batch normalisation of a network that knows something stays as it is: few pictures in small batches tell it worse."""
    if image_info(model).trained is not False:
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.requires_grad_(False)


def _start(model: nn.Module, heads: tuple[str, ...]) -> str:
    """The digest of what full fine-tuning starts from; the classifiers start at random, from the seed."""
    fresh = tuple(f"{head}." for head in heads)
    return tensors_digest((k, v) for k, v in model.state_dict().items() if not k.startswith(fresh))
