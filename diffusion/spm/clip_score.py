"""CLIPScore (arXiv 2104.08718): how well pictures fit texts, by an open_clip model whose weights lie on this machine.

scorer = ClipScorer("ViT-B-32", "open_clip_model.safetensors")
scorer(pictures, ["snoopy"] * len(pictures)).mean()   # falls when a concept is erased, and stays for others
scorer.error_rate(pictures, "snoopy")                 # share of pictures that fit the empty text at least as well
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmkit.errors import CheckpointError, InputError, nearest
from mmkit.storage import read_tensors


class ClipScorer:
    """Scores pictures against texts.

    Args:
        name: of a model of open_clip, "ViT-B-32".
        weights: its whole state dict, `.safetensors` or `.pt` (read without running code).

    Raises:
        InputError: an unknown name, or a model whose tokenizer is not bundled with open_clip.
        CheckpointError: weights that are not this model's.
    """

    def __init__(self, name: str, weights: str | os.PathLike[str]):
        import open_clip

        if name not in open_clip.list_models():
            raise InputError(f"open_clip has no model {name!r}. {nearest(name, open_clip.list_models())}")
        state = read_tensors(weights)
        try:
            self.tokenizer: Any = open_clip.get_tokenizer(name)
            self.model: Any = open_clip.create_model(name, load_weights=False, pretrained_text=False).eval()
        except Exception as error:
            raise InputError(f"{name} needs files of another library that are not here ({error}).") from error
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{weights} does not hold the weights of {name}: {str(error)[:300]}") from error
        self.prepare: Any = open_clip.image_transform(self.model.visual.image_size, is_train=False)

    @torch.no_grad()
    def cosines(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Cosine of every picture (N) with every text (M): (N, M), -1..1."""
        if not pictures or not texts:
            raise InputError("CLIPScore needs pictures and texts.")
        rows = torch.cat([self.model.encode_image(self.prepare(p.convert("RGB"))[None]) for p in pictures])
        told = self.model.encode_text(self.tokenizer(list(texts)))
        return F.normalize(rows, dim=-1) @ F.normalize(told, dim=-1).T

    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """`2.5 max(cosine, 0)` of each picture with its own text: (N,). Raises `InputError` unless there is one text per picture."""
        if len(pictures) != len(texts):
            raise InputError(f"There are {len(pictures)} pictures and {len(texts)} texts.")
        return 2.5 * self.cosines(pictures, texts).diagonal().clamp(min=0)

    def error_rate(self, pictures: Sequence[Image.Image], concept: str) -> float:
        """Share of the pictures that are not nearer to `concept` than to the empty text, 0..1: high when it is erased."""
        near, empty = self.cosines(pictures, [concept, ""]).T
        return float((near <= empty).float().mean())
