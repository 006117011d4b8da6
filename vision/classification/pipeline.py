"""Image classification: pictures in, labels with scores out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from PIL import Image
from torch import nn

from mmkit.data.images import ImageLike, load_image
from mmkit.errors import InputError
from mmkit.pipelines import Pipeline, finite
from mmkit.storage.files import expanded
from mmkit.vision.classification.result import ImageClassification


class ImageClassificationPipeline(Pipeline):
    """Pictures in, class names with probabilities out.

    `model` can be a module with `backbone_info`, a folder written by `mmkit finetune`, `save_backbone` or timm, a bundled name,
    or any `create_backbone` name. Without one: the bundled MobileNetV2, which names 1000 kinds of things on photographs.

    Args:
        model, device, dtype: as in `mmkit.pipeline`.
        backbone: of a folder that holds an adapter: where its backbone is now, if not where the folder says.
        checkpoint_path, pretrained: passed to `create_backbone` for a name, or for the backbone of a folder.
        allow_random: answer with random weights all the same, with a warning. Modules of yours always do.

    Raises:
        InputError: a name that gives random weights, or a model without a classifier.
    """

    task = "image-classification"
    default_weights = "mobilenetv2"

    def __init__(
        self,
        model: Any = None,
        *,
        device: Any = "auto",
        dtype: Any = "auto",
        backbone: str | os.PathLike[str] | None = None,
        checkpoint_path: str | os.PathLike[str] | None = None,
        pretrained: bool | str = False,
        allow_random: bool = False,
    ):
        self._backbone = backbone
        self._weights: dict[str, Any] = {"checkpoint_path": checkpoint_path, "pretrained": pretrained}
        if isinstance(model, nn.Module) and (backbone or checkpoint_path or pretrained):
            raise InputError(
                "backbone, checkpoint_path and pretrained say how a name or folder is loaded; a module is."
            )
        super().__init__(model, device=device, dtype=dtype)
        from mmkit.adapters import attached_adapters
        from mmkit.backbones import image_info, randomness
        from mmkit.data import ImageTransform

        if self.model is not model:
            for adapter in attached_adapters(self.model).values():
                adapter.to(self.device, self.dtype)
        self.info = image_info(self.model)
        if not self.info.num_classes:
            raise InputError(
                f"{self.info.name} has no classifier: it gives an embedding, which names no class. Give it one with "
                "num_classes= and train it (mmkit finetune), or load a folder that has one."
            )
        if told := randomness(self.model):
            if not allow_random and not isinstance(model, nn.Module):
                raise InputError(
                    f"{told} To see its random answers all the same, pass allow_random=True (--allow-random)."
                )
            warnings.warn(told, stacklevel=2)
        self.transform = ImageTransform.of(self.info.preprocessing())

    def load(self, model: str | os.PathLike[str]) -> nn.Module:
        from mmkit.backbones import create_backbone, image_info
        from mmkit.backbones.model import is_model_folder, open_model

        if expanded(model).is_dir():
            if is_model_folder(model):
                return open_model(model)
            from mmkit.vision.classification.saving import load_finetuned

            loaded = load_finetuned(model, backbone=self._backbone, **self._weights)
            return loaded.to(getattr(torch, image_info(loaded).dtype))
        if self._backbone is not None:
            raise InputError(
                f"{model!r} is no folder with an adapter, so backbone={self._backbone!r} means nothing to it."
            )
        return create_backbone(model, **self._weights)

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
            InputError: an unreadable picture, `top_k` or `batch_size` below 1, or a model that answers with NaN or infinite values.
        """
        for name, value in {"top_k": top_k, "batch_size": batch_size}.items():
            if not isinstance(value, Integral) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, not {value!r}.")
        one = isinstance(images, (str, bytes, os.PathLike, Image.Image, Mapping)) or hasattr(images, "__array__")
        single = one or not isinstance(images, Iterable)
        batch: Any = [images] if single else images
        pictures = [load_image(i) for i in batch]
        results = []
        for start in range(0, len(pictures), batch_size):
            chunk = pictures[start : start + batch_size]
            tensors = torch.stack([self.transform(p) for p in chunk]).to(self.device, self.dtype)
            scores, order = finite(self.model(tensors)).softmax(-1).sort(-1, descending=True)
            for picture, s, o in zip(chunk, scores[:, :top_k].tolist(), order[:, :top_k].tolist(), strict=True):
                results.append(ImageClassification([self._name(k) for k in o], s, picture))
        return results[0] if single else results

    def example(self) -> tuple[torch.Tensor, ...]:
        """A picture in numbers, (1, C, H, W)."""
        return (torch.zeros(1, *self.info.input_size),)

    def _name(self, index: int) -> str:
        return self.info.class_names[index] if self.info.class_names else f"class {index}"
