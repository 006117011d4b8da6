"""The judge of drawn scenes: a small classifier that reads shape, color, texture, size, count, position and background off a
picture of 32 x 32 pixels. It measures whether a text-to-image model of that world draws what a caption asks for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.backbones.model import Model
from mmkit.data.drawn.scenes import ATTRIBUTES, read_caption
from mmkit.errors import InputError

NONE = "none"
"""What the judge says of shape and color when it sees no clear shape."""

HEADS = {name: (*words, NONE) if name in ("shape", "color") else words for name, words in ATTRIBUTES.items()}
"""The words the judge chooses from, per attribute."""


class SceneJudge(Model):
    """Four convolutions and one linear layer per attribute of a scene.

    Args:
        width: channels of the first layer.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        channels = [3, width, 2 * width, 3 * width, 3 * width]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise(channels)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if i < 3 else []
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1] * 16, sum(map(len, HEADS.values())))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits `(B, words)` by attribute for pictures `(B, 3, 32, 32)` in 0..1; other sizes are resized."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise InputError(f"The judge reads pictures (B, 3, H, W), not {tuple(images.shape)}.")
        if images.shape[-2:] != (32, 32):
            images = F.interpolate(images, (32, 32), mode="bilinear", antialias=True)
        logits = self.head(self.features(images * 4 - 2).flatten(1))
        return dict(zip(HEADS, logits.split([len(words) for words in HEADS.values()], 1), strict=True))

    @torch.no_grad()
    def read(self, images: Tensor) -> list[dict[str, str]]:
        """The most likely word per attribute for each picture `(B, 3, H, W)` in 0..1."""
        training = self.training
        answers = {name: logits.argmax(1).tolist() for name, logits in self.eval()(images).items()}
        self.train(training)
        return [{name: HEADS[name][answers[name][i]] for name in HEADS} for i in range(len(images))]

    def obedience(self, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """Share of pictures `(B, 3, H, W)` that show what their caption names, per attribute that any caption names."""
        right: dict[str, list[bool]] = {}
        for seen, text in zip(self.read(images), captions, strict=True):
            for name, word in read_caption(text).items():
                right.setdefault(name, []).append(seen[name] == word)
        return {name: sum(hits) / len(hits) for name, hits in right.items()}


def scene_judge(width: int = 24) -> SceneJudge:
    """The judge of drawn scenes."""
    return SceneJudge(width)


def judge_loss(judge: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """`loss_fn` for `mmkit.fit` on `(pictures, labels (B, 7))`, with -1 where an attribute has no answer."""
    logits = judge(batch[0])
    losses = [F.cross_entropy(logits[name], batch[1][:, i], ignore_index=-1) for i, name in enumerate(HEADS)]
    return torch.stack(losses).sum()
