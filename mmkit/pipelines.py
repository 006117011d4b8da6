"""Pipelines: what a person has goes in, a small result that can be saved and looked at comes out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from mmkit.checkpoints import write_json
from mmkit.data.images import ImageLike, load_image
from mmkit.errors import BackendUnavailableError, InputError
from mmkit.registry import TASKS


def list_tasks(pattern: str = "") -> list[str]:
    """Names of the tasks `pipeline` knows; `pattern` is a substring or wildcard."""
    return TASKS.names(pattern)


def pipeline(
    task: str,
    model: nn.Module | str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    **options: Any,
) -> Any:
    """Build the pipeline of `task`.

    Args:
        task: a name of `list_tasks()`.
        model: a module, a folder or bundled name; `None` takes the small bundled default.
        device: "auto" (CUDA when present, else CPU) or a torch device.
        dtype: "auto" (float32) or a torch dtype or its name.
        options: the pipeline's own options.

    Raises:
        InputError: unknown task, device or dtype.

    Example:
        >>> import mmkit
        >>> mmkit.pipeline("image-classification").task
        'image-classification'
    """
    return TASKS.get(task)(model, device=device, dtype=dtype, **options)


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


def resolve_dtype(dtype: str | torch.dtype = "auto") -> torch.dtype:
    """`dtype` as a `torch.dtype`; "auto" is float32."""
    resolved = torch.float32 if dtype == "auto" else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise InputError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', not {dtype!r}.")
    return resolved


class Pipeline:
    """Base of all pipelines: resolves model, device and dtype once.

    Subclasses set `task` and `default_weights`, override `load(model)` when a string can mean more than bundled weights or a
    folder, and implement `__call__`.
    """

    task: ClassVar[str]
    default_weights: ClassVar[str]

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
    ):
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype)
        module = model if isinstance(model, nn.Module) else self.load(self.default_weights if model is None else model)
        self.model = module.to(self.device, self.dtype).eval()

    def load(self, model: str | os.PathLike[str]) -> nn.Module:
        """The module behind a bundled name or a folder."""
        raise InputError(f"{type(self).__name__} needs a module; {model!r} cannot be loaded.")


@dataclass
class ImageClassification:
    """Result of classifying one picture.

    Attributes:
        labels: class names, most probable first.
        scores: their probabilities, 0..1.
        image: the picture as it was read.
    """

    labels: list[str]
    scores: list[float]
    image: Image.Image

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.labels[0]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the labels and scores as JSON (`.json`), or the picture with its bars (any image suffix)."""
        path = Path(path)
        if path.suffix == ".json":
            write_json(path, {"labels": self.labels, "scores": self.scores})
        else:
            self.plot().save(path)
        return path

    def plot(self, height: int = 240) -> Image.Image:
        """The picture beside one bar per class."""
        picture = self.image.resize((max(1, round(self.image.width * height / self.image.height)), height))
        canvas = Image.new("RGB", (picture.width + 320, height), "white")
        canvas.paste(picture, (0, 0))
        pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
        step = height / max(len(self.labels), 1)
        for i, (label, score) in enumerate(zip(self.labels, self.scores, strict=True)):
            x, y = picture.width + 12, round(i * step + step / 2)
            pen.rectangle((x, y - 9, x + 296 * score, y + 9), fill="#c7d7f5")
            pen.text((x + 4, y), f"{label}  {100 * score:.1f} %", fill="#1b2a41", font=font, anchor="lm")
        return canvas


class ImageClassificationPipeline(Pipeline):
    """Pictures in, class names with probabilities out.

    `model` can be a module with `backbone_info`, a folder written by `mmkit finetune`, `save_backbone` or timm, a bundled name,
    or any `create_backbone` name.
    """

    task = "image-classification"
    default_weights = "tiny_vit"

    def __init__(self, model: Any = None, *, device: Any = "auto", dtype: Any = "auto"):
        super().__init__(model, device=device, dtype=dtype)
        from mmkit.adapters import attached_adapters
        from mmkit.backbones import backbone_info
        from mmkit.data import ImageTransform

        for adapter in attached_adapters(self.model).values():
            adapter.to(self.device)
        self.info = backbone_info(self.model)
        self.transform = ImageTransform.of(self.info.preprocessing())

    def load(self, model: str | os.PathLike[str]) -> nn.Module:
        from mmkit.backbones import create_backbone

        if Path(model).is_dir():
            from mmkit.finetune import load_finetuned

            return load_finetuned(model)
        return create_backbone(model)

    @torch.inference_mode()
    def __call__(self, images: ImageLike | Sequence[ImageLike], *, top_k: int = 5, batch_size: int = 32) -> Any:
        """Classify one picture, or a list of them.

        Args:
            images: anything `mmkit.data.load_image` reads.
            top_k: classes to report.
            batch_size: pictures per forward pass.

        Returns:
            One `ImageClassification`, or a list in the order of the input.

        Raises:
            InputError: an unreadable picture, or `top_k < 1`.
        """
        if top_k < 1:
            raise InputError(f"top_k must be at least 1, not {top_k}.")
        single = isinstance(images, (str, bytes, os.PathLike, Image.Image)) or hasattr(images, "__array__")
        batch: Any = [images] if single else images
        pictures = [load_image(i) for i in batch]
        results = []
        for start in range(0, len(pictures), batch_size):
            chunk = pictures[start : start + batch_size]
            tensors = torch.stack([self.transform(p) for p in chunk]).to(self.device, self.dtype)
            scores, order = self.model(tensors).float().softmax(-1).sort(-1, descending=True)
            for picture, s, o in zip(chunk, scores[:, :top_k].tolist(), order[:, :top_k].tolist(), strict=True):
                results.append(ImageClassification([self._name(k) for k in o], s, picture))
        return results[0] if single else results

    def _name(self, index: int) -> str:
        return self.info.class_names[index] if self.info.class_names else f"class {index}"
