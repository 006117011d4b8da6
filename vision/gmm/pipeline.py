"""Look at the Gaussian mixture masks of a trained model, bend them, and see attention and prediction change."""

from __future__ import annotations

import copy
import os
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmkit.backbones import load_weights
from mmkit.data.images import ImageLike, check_channels, load_image
from mmkit.errors import InputError
from mmkit.pipelines import Pipeline, finite
from mmkit.storage.files import expanded
from mmkit.vision.gmm.masks import GaussianMixtureMask
from mmkit.vision.gmm.models.layers import pair
from mmkit.vision.gmm.models.vit import GMMViT
from mmkit.vision.gmm.result import MaskView
from mmkit.weights import weight_entry

SCOPES = ("head", "layer", "model")
"""How much of the model an edit reaches: one head, all heads of the layer, or every layer."""


class MaskExplorer(Pipeline):
    """Pictures in, `MaskView` out: what the mask of a head does, and what an edit of it would change.

    Args:
        model: a `GMMViT` with `mask="gmm"` and mean pooling, bundled weights of one, or a folder written by
            `save_pretrained`. `None` is the bundled "gmm_vit_drawn", which knows drawn shapes and textures.
        class_names: names of the outputs; `None` takes those of the bundled weights, else numbers.
        mean, std: normalisation of the input; `None` takes those of the bundled weights, else 0.5.

    Example:
        >>> import mmkit
        >>> from mmkit.data.drawn.pictures import draw
        >>> explorer = mmkit.pipeline("mask-explorer")
        >>> view = explorer(draw("star", np.random.default_rng(0)), layer=1, head=2)
        >>> view.mask_image(size=256).size
        (256, 256)
    """

    task: ClassVar[str] = "mask-explorer"
    default_weights: ClassVar[str] = "gmm_vit_drawn"

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str] | None = None,
        *,
        class_names: list[str] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        **options: Any,
    ):
        self._extra: dict[str, Any] = {}
        super().__init__(model, **options)
        if not isinstance(self.model, GMMViT) or self.model.config["mask"] != "gmm" or self.model.cls_token is not None:
            raise InputError(
                f"mask-explorer needs a GMMViT with mask='gmm' and mean pooling, not a {type(self.model).__name__}."
            )
        config = self.model.config
        check_channels(config["in_chans"])
        self.size, self.grid = pair(config["img_size"]), self._mask(self.model, 0).grid
        self.class_names = (
            class_names or self._extra.get("class_names") or [str(i) for i in range(config["num_classes"])]
        )
        self.mean = mean or self._extra.get("mean") or [0.5] * config["in_chans"]
        self.std = std or self._extra.get("std") or [0.5] * config["in_chans"]
        if len(self.class_names) != config["num_classes"] or len(self.mean) != config["in_chans"]:
            raise InputError(
                "class_names, mean and std must have one entry per output and per input channel of the model."
            )
        plain = GMMViT(**{**config, "mask": "none", "class_token": False})
        plain.load_state_dict({k: v for k, v in self.model.state_dict().items() if ".mask." not in k})
        self.plain = plain.to(self.device, self.dtype).eval()

    def load(self, model: str | os.PathLike[str]) -> nn.Module:
        """The model behind a bundled name or a folder."""
        if expanded(model).is_dir():
            return GMMViT.from_pretrained(model)
        self._extra = weight_entry(str(model)).extra
        return load_weights(str(model))

    @staticmethod
    def _mask(model: nn.Module, layer: int) -> GaussianMixtureMask:
        return model.blocks[layer].attn.mask  # type: ignore[index,union-attr,return-value]

    def example(self) -> tuple[Tensor, ...]:
        """A picture in numbers, (1, C, H, W)."""
        return (torch.zeros(1, len(self.mean), *self.size),)

    def __call__(
        self,
        image: ImageLike,
        layer: int = 0,
        head: int = 0,
        patch: tuple[int, int] | None = None,
        *,
        alpha_scale: float = 1.0,
        sigma_scale: float = 1.0,
        scope: str = "head",
    ) -> MaskView:
        """Look at one head, and at what scaling its mask would change.

        Args:
            image: a picture; it is resized to the model's input.
            layer, head: which attention head, from 0.
            patch: (row, column) on the patch grid; `None` is the middle.
            alpha_scale: factor on the heights of the Gaussians, -8..8; 0 removes the head's logits, negative flips
            them. sigma_scale: factor on their widths, above 0 up to 100.
            scope: what the edit reaches: "head", "layer" or "model".

        Raises:
            InputError: unreadable picture, no such layer, head or patch, or factors out of range.
        """
        patch = (self.grid[0] // 2, self.grid[1] // 2) if patch is None else patch
        self._check(layer, head, patch, alpha_scale, sigma_scale, scope)
        edited = copy.deepcopy(self.model)
        for index in range(len(edited.blocks)) if scope == "model" else [layer]:  # type: ignore[arg-type]
            mask, heads = self._mask(edited, index), [head] if scope == "head" else slice(None)
            mask.alpha.data[:, heads] *= alpha_scale
            mask.sigma.data[:, heads] *= sigma_scale
        picture = load_image(image).resize(self.size[::-1], Image.Resampling.BICUBIC)
        pixels = self._pixels(picture)
        caught: list[Tensor] = []
        mask = self._mask(edited, layer)
        mask.register_forward_hook(lambda module, args, output: caught.extend((args[0], output)))
        index = patch[0] * self.grid[1] + patch[1]
        with torch.no_grad():
            logits = {"trained": self.model(pixels), "edited": edited(pixels), "no mask": self.plain(pixels)}
            rows = [m.matrix()[head, index] for m in (mask, self._mask(self.model, layer))]
            rows += [caught[1][0, head, index].float().softmax(-1), caught[0][0, head, index].float().softmax(-1)]
            distances, profile = mask.profile()
            trained_profile = self._mask(self.model, layer).profile()[1]
        grids: Any = [row.float().reshape(self.grid).cpu().numpy() for row in rows]
        return MaskView(
            picture,
            patch,
            *grids,  # type: ignore[call-arg]
            distances.cpu().numpy(),
            profile[head].float().cpu().numpy(),
            trained_profile[head].float().cpu().numpy(),
            {k: dict(zip(self.class_names, finite(v[0]).softmax(-1).tolist(), strict=True)) for k, v in logits.items()},
        )

    def _pixels(self, picture: Image.Image) -> Tensor:
        channels = len(self.mean)
        array: Any = np.asarray(picture if channels == 3 else picture.convert("L"), np.float32).reshape(
            *self.size, channels
        )
        array = (array / 255 - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(array).permute(2, 0, 1)[None].to(self.device, self.dtype)

    def _check(
        self, layer: int, head: int, patch: tuple[int, int], alpha_scale: float, sigma_scale: float, scope: str
    ) -> None:
        depth, heads = len(self.model.blocks), self._mask(self.model, 0).num_heads  # type: ignore[arg-type]
        if not 0 <= layer < depth or not 0 <= head < heads:
            raise InputError(
                f"The model has layers 0..{depth - 1} with heads 0..{heads - 1}, not layer {layer}, head {head}."
            )
        if len(patch) != 2 or not all(0 <= p < n for p, n in zip(patch, self.grid, strict=True)):
            raise InputError(f"patch must lie on the {self.grid[0]} x {self.grid[1]} grid, not {tuple(patch)}.")
        if not -8 <= alpha_scale <= 8 or not 0 < sigma_scale <= 100:
            raise InputError(
                f"alpha_scale {alpha_scale} must lie in -8..8 and sigma_scale {sigma_scale} in 0..100 (above 0)."
            )
        if scope not in SCOPES:
            raise InputError(f"scope must be one of {SCOPES}, not {scope!r}.")
