"""Image classification: pictures in, labels with scores out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from mmkit.data.images import ImageLike, load_image
from mmkit.errors import InputError
from mmkit.pipelines import Pipeline
from mmkit.vision.classification.result import ImageClassification


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
        from mmkit.backbones import image_info, warn_if_random
        from mmkit.data import ImageTransform

        for adapter in attached_adapters(self.model).values():
            adapter.to(self.device)
        warn_if_random(self.model)
        self.info = image_info(self.model)
        self.transform = ImageTransform.of(self.info.preprocessing())

    def load(self, model: str | os.PathLike[str]) -> nn.Module:
        from mmkit.backbones import create_backbone

        if Path(model).is_dir():
            from mmkit.vision.classification.training import load_finetuned

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
