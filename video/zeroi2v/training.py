"""Adapt an image transformer to a folder of labelled videos: what `mmkit finetune --task video-classification` calls."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmkit.backbones import create_backbone
from mmkit.data import stratified_split
from mmkit.errors import InputError
from mmkit.storage.files import absolute
from mmkit.training.classifying import Classified, config_of, known_method, no_settings, train_classifier, without
from mmkit.training.digest import short_name
from mmkit.video.datasets import VideoClassificationDataset, check_videos
from mmkit.video.samplers import UniformSampler
from mmkit.video.transforms import ClipTransform
from mmkit.video.zeroi2v.model import VideoClassifier

METHODS = ("zeroi2v", "linear_probe", "full")
_RATES = {"zeroi2v": 2e-3, "linear_probe": 1e-2, "full": 3e-4}


@without("cutmix")
def finetune(
    data: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    adapter: str = "zeroi2v",
    *,
    output_dir: str | os.PathLike[str] | None = None,
    settings: dict[str, Any] | None = None,
    val: float = 0.2,
    seed: int = 0,
    resume: bool = True,
    dry_run: bool = False,
    num_frames: int = 8,
    flip: float = 0.0,
    **fit_options: Any,
) -> Classified:
    """Train a `VideoClassifier` on `data/<class>/<video>`, or `data/{train,val}/<class>/<video>`.

    Args:
        model: a `create_backbone` name of timm or open_clip, or a bundled one; default: `tiny_vit`, a starting point for trials.
        adapter: "zeroi2v", "linear_probe" (averaged frames, blind to their order) or "full".
        output_dir: gets `model/` (for `mmkit.pipeline("video-classification", ...)`), `run/`, and the report.
        settings: of ZeroI2V. val: share held back where the folder has no "val"; 0: none.
        flip: how often clips are mirrored in training; 0 where left and right differ.
        dry_run: read everything and say what would be trained (`plan`), no more.
        fit_options: fields of `FitConfig`, but `cutmix`.

    Raises:
        InputError: a folder or a video that cannot be read, another method, a backbone that does not fit.
    """
    known_method(adapter, METHODS, "video-classification")
    if adapter != "zeroi2v":
        no_settings(settings, adapter)
    source, name = Path(data), str(model or "tiny_vit")
    splits = (source / "train").is_dir()
    every = VideoClassificationDataset.from_folder(source, "train" if splits else None)
    if len(every.class_names) < 2:
        raise InputError(f"Training needs at least two classes; found {every.class_names}.")
    torch.manual_seed(seed)
    zero = None if adapter != "zeroi2v" else dict(settings or {})
    net = VideoClassifier.from_backbone(
        create_backbone(name),
        len(every.class_names),
        zeroi2v=zero,
        num_frames=num_frames,
        class_names=every.class_names,
    )
    if adapter == "linear_probe":
        net.backbone.requires_grad_(False)
    train, held = _parts(every, source if splits and (source / "val").is_dir() else None, net, val, seed, flip)
    config = config_of(
        fit_options,
        lr=_RATES[adapter],
        batch_size=8,
        epochs=10,
        warmup_epochs=1.0,
        seed=seed,
        resume=resume,
        label_smoothing=0.1,
    )
    folder = None if output_dir is None else absolute(output_dir)
    options = {k: v for k, v in vars(config).items() if k not in ("resume", "progress")}
    told = {
        "task": "video-classification",
        "data": str(absolute(source)),
        "backbone": name,
        "adapter": adapter,
        "val": val,
    }
    samples = held.samples if held is not None else []
    if broken := check_videos(s.path for s in (*train.samples, *samples)):  # rather than in the middle of training
        shown = " ".join(list(broken.values())[:5])
        raise InputError(
            f"{len(broken)} of {len(train) + len(samples)} videos cannot be used: {shown} Remove or mend them."
        )

    def save(place: Path) -> None:
        net.save_pretrained(place / "model")

    return train_classifier(
        net,
        train,
        held,
        title=f"{adapter} on {name}",
        class_names=every.class_names,
        names=[short_name(s.path) for s in samples],
        labels=[s.label for s in samples],
        config=config,
        output_dir=folder,
        settings={**told, "output": folder and str(folder), **options, "settings": settings or {}},
        use=f'mmkit.pipeline("video-classification", "{folder / "model" if folder else "MODEL"}")("clip.mp4").label',
        save=save,
        trained=[("method", adapter), ("backbone", name), ("frames of a clip", str(num_frames))],
        picture=lambda i: _frame(held, i, net),
        dry_run=dry_run,
        identity={"backbone": name, "method": adapter, "validation share": val},
    )


def _parts(
    every: VideoClassificationDataset, own: Path | None, net: VideoClassifier, val: float, seed: int, flip: float
) -> tuple[VideoClassificationDataset, VideoClassificationDataset | None]:
    """Clips to train on and clips held back, with the model's preprocessing."""

    sampler: Any = UniformSampler(net.num_frames)

    def one(samples: Any, train: bool) -> VideoClassificationDataset:
        return VideoClassificationDataset(
            samples, every.class_names, sampler=sampler, train=train, seed=seed,
            transform=ClipTransform(net.img_size, net.mean, net.std, train=train, flip=flip), short_side=net.img_size,
        )  # fmt: skip

    if own is not None:
        return one(every.samples, True), one(
            VideoClassificationDataset.from_folder(own.parent / own.name, "val").samples, False
        )
    if not val:
        return one(every.samples, True), None
    first, second = stratified_split([s.label for s in every.samples], val, seed)
    if not first or not second:
        raise InputError(f"{len(every)} videos of {len(every.class_names)} classes are too few to hold back {val:.0%}.")
    return one([every.samples[i] for i in first], True), one([every.samples[i] for i in second], False)


def _frame(held: Any, index: int, net: VideoClassifier) -> Image.Image:
    """The middle frame as the model sees it."""
    clip: Tensor = held[index][0]
    frame = clip[len(clip) // 2] * torch.tensor(net.std)[:, None, None] + torch.tensor(net.mean)[:, None, None]
    return Image.fromarray((frame.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())
