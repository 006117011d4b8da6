"""What an `InteractiveSegmenter` drives: ClickNet, SqueezeSAM, HF SAM and SAM 2, or any function, behind one small protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmkit.errors import InputError
from mmkit.vision.clicks.clicknet import ClickNet
from mmkit.vision.clicks.model import MEAN, STD, SqueezeSAM
from mmkit.vision.clicks.prompts import BOX_A, BOX_B, NEGATIVE, PADDING, POSITIVE
from mmkit.vision.clicks.rating import Rating
from mmkit.vision.clicks.result import THRESHOLD

WINDOWS = 4
"""Views of a picture that are kept for the next click."""


class Engine(Protocol):
    """What `InteractiveSegmenter` drives. `encode` runs once per picture, `predict` at every click."""

    def encode(self, image: Image.Image) -> Any:
        """Whatever can be reused for all clicks on `image`."""

    def predict(
        self, state: Any, points: Tensor, labels: Tensor, previous: Tensor | None
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Masks of Q prompts.

        Args:
            state: of `encode`.
            points: float `(Q, P, 2)` x, y in pixels of the picture, -1 for padding.
            labels: long `(Q, P)` in -1..3.
            previous: low-resolution logits `(Q, h, w)` of the masks shown before, as returned earlier, or `None`.

        Returns:
            Low-resolution logits `(Q, M, h, w)`, predicted IoU `(Q, M)`, and a function that takes `(K, h, w)` to the
            picture's size.
        """


@dataclass(frozen=True)
class _View:
    """A picture as `SqueezeSAMEngine` keeps it: what the network saw of it by window, a copy to crop from, and the true size."""

    seen: dict[tuple[int, int, int, int], Any]
    canvas: Tensor
    size: tuple[int, int]


class SqueezeSAMEngine:
    """Drives a `SqueezeSAM`: the resized picture is cached, the whole network runs at every click.

    Args:
        model: the network.
        zoom: look closer once there is a mask or a box: the network then sees a square `margin` times its size, so that small
            objects keep their detail (the ZoomIn of f-BRS, arXiv 2001.10331, and RITM). A first click takes two passes, the second
            with the mask of the first. Default: for models that keep the aspect. The published network sees the whole picture.
        rating: puts the network's own estimate of its IoU right. It holds for clicks that come one at a time; masks of a box, or of
            several clicks at once, then have no estimate (NaN). Without it the estimates are the network's.
    """

    margin = 1.8
    """Side of the close view over the larger side of the object."""

    def __init__(self, model: SqueezeSAM, zoom: bool | None = None, rating: Rating | None = None):
        self.model, self.rating = model, rating
        self.zoom = model.keep_aspect if zoom is None else zoom

    def encode(self, image: Image.Image) -> _View:
        """The network's view of the picture, and a copy of at most four times its side to look closer at."""
        reference = next(self.model.parameters())
        pixels = _pixels(image, reference.device)
        size = (image.height, image.width)
        scale = min(1.0, 4 * self.model.img_size / max(size))
        small = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        canvas = pixels if small == size else F.interpolate(pixels, small, mode="bilinear", antialias=True)
        return _View({(0, 0, small[1], small[0]): self._see(pixels)}, canvas, size)

    def _see(self, pixels: Tensor) -> Any:
        """What can be reused for every prompt of `(1, 3, h, w)` in 0..1."""
        return self.model.preprocess(pixels).to(next(self.model.parameters()).dtype)

    def predict(
        self, state: Any, points: Tensor, labels: Tensor, previous: Tensor | None
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """See `Engine.predict`."""
        model = self.model
        if (
            not getattr(model, "negative_clicks", True)
            and not model.strict_official_prompts
            and (labels == NEGATIVE).any()
        ):
            raise InputError(
                "This SqueezeSAM has no negative-click channel (the published encoding has none); "
                "use a model built with negative_clicks=True."
            )
        points, labels = points.to(state.canvas.device), labels.to(state.canvas.device)
        if not self.zoom:
            low, iou = self._run(next(iter(state.seen.values())), points, labels, state.size, previous)
            return low, self._rated(iou, labels, previous), lambda x: model.upscale(x[:, None], state.size)[:, 0]
        full = points.new_tensor(state.size).flip(0)
        grid = points.new_tensor(state.canvas.shape[2:]).flip(0)
        points = torch.where((labels == PADDING)[..., None], -1.0, points * grid / full)
        rows = []
        for i, (spots, kinds) in enumerate(zip(points, labels, strict=True)):
            found = self._closer(state, spots, kinds, None if previous is None else previous[i])
            if previous is None and not (kinds == BOX_A).any():
                found = self._closer(state, spots, kinds, self._glimpse(*found))
            rows.append(found)
        low, iou = (torch.cat(parts) for parts in zip(*rows, strict=True))
        rated = self._rated(iou, labels, previous)
        return low, rated, lambda x: F.interpolate(x[:, None], state.size, mode="bicubic")[:, 0]

    def _glimpse(self, low: Tensor, iou: Tensor) -> Tensor:
        """What the second look is told of the first: of masks `(1, M, h, w)` with estimates `(1, M)` the best, `(h, w)`."""
        return low[0, int(iou[0].argmax())]

    def _rated(self, iou: Tensor, labels: Tensor, previous: Tensor | None) -> Tensor:
        """The estimates `(Q, M)` put right, or NaN where nothing is known about them."""
        if self.rating is None:
            return iou
        clicks = ((labels == POSITIVE) | (labels == NEGATIVE)).sum(1)
        known = (labels != BOX_A).all(1) & (clicks > 0) & ((clicks == 1) | (previous is not None))
        return self.rating(iou, clicks.clamp(min=1)).where(known[:, None], torch.nan)

    def _closer(self, view: _View, points: Tensor, labels: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits `(1, M, h, w)` on the canvas and IoU `(1, M)` of one prompt `(P, 2)`, `(P,)`, given in canvas pixels."""
        h, w = view.canvas.shape[2:]
        x0, y0, x1, y1 = 0, 0, w, h
        if previous is not None or (labels == BOX_A).any():
            x0, y0, x1, y1 = self._window(points[labels != PADDING], previous, (h, w))
        size = (y1 - y0, x1 - x0)
        shifted = torch.where((labels == PADDING)[:, None], -1.0, points - points.new_tensor([x0, y0]))
        before = None if previous is None else self._framed(previous[y0:y1, x0:x1])
        window = (x0, y0, x1, y1)
        if window not in view.seen:
            for old in list(view.seen)[1 : 2 - WINDOWS]:  # the whole picture stays, and the newest
                del view.seen[old]
            view.seen[window] = self._see(view.canvas[..., y0:y1, x0:x1])
        near, iou = self._run(view.seen[window], shifted[None], labels[None], size, before)
        low = near.new_full((1, near.shape[1], h, w), -10.0)
        low[..., y0:y1, x0:x1] = self.model.upscale(near, size)
        return low, iou

    def _window(self, points: Tensor, mask: Tensor | None, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The square around the prompts and the mask `(h, w)`, with its margin, inside the canvas: x0, y0, x1, y1."""
        h, w = size
        inside = torch.empty(0, 2) if mask is None else (mask > THRESHOLD).nonzero().flip(1)
        spots = torch.cat([points, inside.to(points)])
        low, high = spots.amin(dim=0), spots.amax(dim=0)
        side = max(self.margin * float((high - low).max()), self.model.img_size / 2)
        window = []
        for a, b, limit in ((low[0], high[0], w), (low[1], high[1], h)):
            start = max(0, min(round(float(a + b) / 2 - side / 2), limit - round(side)))
            window.append((start, min(limit, start + round(side))))
        return window[0][0], window[1][0], window[0][1], window[1][1]

    def _framed(self, logits: Tensor) -> Tensor:
        """Logits of a crop `(h, w)` in the network's square, as the previous mask `(1, S, S)`."""
        h, w = self.model.scaled_size(*logits.shape)
        scaled = F.interpolate(logits[None, None], (h, w), mode="bilinear", antialias=True)[0]
        side = self.model.img_size
        return F.pad(scaled, (0, side - w, 0, side - h), value=-10.0)

    def _run(
        self, rgb: Tensor, points: Tensor, labels: Tensor, size: tuple[int, int], previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The network on one view `(1, 3, S, S)` of a picture of `size` for Q prompts: logits `(Q, M, s, s)`, IoU `(Q, M)`."""
        model = self.model
        before = None if previous is None else previous[None]
        token = None
        if model.prompt_token is not None:
            token = model.prompt_token(model.scale_points(points, *size) / model.img_size, labels)
        fused = model.fuse(rgb, points[None], labels[None], size, before)
        low, iou = (x.float() for x in model.forward_fused(fused, token))
        chosen = slice(0, 1) if model.single_mask else slice(1, None)
        return low[:, chosen], iou[:, chosen]


class ClickNetEngine(SqueezeSAMEngine):
    """Drives a `ClickNet` the same way: a view is encoded once, a click runs the decoder, and the encoder where the window is new."""

    model: ClickNet  # type: ignore[assignment]
    sharpness = 5.0
    """How much more a mask counts in the glimpse when its estimate is larger: exp(sharpness x estimate)."""

    def __init__(self, model: ClickNet, rating: Rating | None = None):
        self.model, self.rating, self.zoom = model, rating, True  # type: ignore[assignment]
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _glimpse(self, low: Tensor, iou: Tensor) -> Tensor:
        """The mean of all masks, by their estimates: what an ambiguous click can mean stays open until the second look."""
        weight = (self.sharpness * iou[0]).softmax(dim=0)[:, None, None]
        return (low[0].clamp(-12, 12) * weight).sum(dim=0)

    def _see(self, pixels: Tensor) -> Any:
        """The encoder's features, and the picture at the decoder's resolution."""
        return self.model.encode(self.model.preprocess(pixels).to(next(self.model.parameters()).dtype))

    def _run(
        self, seen: Any, points: Tensor, labels: Tensor, size: tuple[int, int], previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The decoder on one view for one prompt."""
        scaled = torch.where((labels == PADDING)[..., None], -1.0, points * (self.model.img_size / max(size)))
        low, iou = self.model.decode(seen, scaled, labels, None if previous is None else previous[None])
        return low.float(), iou.float()


class SamEngine:
    """Drives HF `SamModel` or `Sam2Model` (transformers): the image embedding is computed once per picture."""

    def __init__(self, model: Any):
        self.model = model
        self.stretch = type(model).__name__.startswith("Sam2")  # SAM 2 stretches to a square, SAM pads
        vision = self.model.config.vision_config
        size = getattr(vision, "image_size", None) or vision.backbone_config.image_size
        self.size = int(size[0] if isinstance(size, (list, tuple)) else size)

    def _scaled(self, image_size: tuple[int, int]) -> tuple[int, int]:
        if self.stretch:
            return self.size, self.size
        scale = self.size / max(image_size)
        return max(1, int(image_size[0] * scale + 0.5)), max(1, int(image_size[1] * scale + 0.5))

    def encode(self, image: Image.Image) -> tuple[Any, tuple[int, int]]:
        """The image embedding and the picture's height and width."""
        reference = next(self.model.parameters())
        size = (image.height, image.width)
        h, w = self._scaled(size)
        pixels = F.interpolate(_pixels(image, reference.device), (h, w), mode="bilinear", antialias=True)
        mean, std = (pixels.new_tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        pixels = F.pad((pixels - mean) / std, (0, self.size - w, 0, self.size - h))
        return self.model.get_image_embeddings(pixels.to(reference.dtype)), size

    def predict(
        self, state: Any, points: Tensor, labels: Tensor, previous: Tensor | None
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """See `Engine.predict`. Prompts go through the decoder one at a time, so that none sees the padding of another."""
        embedding, size = state
        rows = []
        for i, kinds in enumerate(labels):
            real = kinds != PADDING
            before = None if previous is None else previous[i : i + 1]
            rows.append(self._decode(embedding, size, points[i][real], kinds[real], before))
        low, iou = (torch.cat(parts) for parts in zip(*rows, strict=True))
        h, w = self._scaled(size)

        def upscale(x: Tensor) -> Tensor:
            x = x[:, None]
            if not self.stretch:
                x = F.interpolate(x, (self.size, self.size), mode="bilinear")[..., :h, :w]
            return F.interpolate(x, size, mode="bilinear")[:, 0]

        return low, iou, upscale

    def _decode(
        self, embedding: Any, size: tuple[int, int], points: Tensor, labels: Tensor, previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits `(1, M, h, w)` and IoU `(1, M)` of one prompt `(P, 2)`, `(P,)` without padding."""
        reference = next(self.model.parameters())
        h, w = self._scaled(size)
        scaled = (points * points.new_tensor([w / size[1], h / size[0]])).to(reference)
        corner = (labels == BOX_A) | (labels == BOX_B)
        prompt: dict[str, Any] = {}
        if corner.any():
            prompt["input_boxes"] = torch.cat([scaled[corner].amin(dim=0), scaled[corner].amax(dim=0)])[None, None]
        if not corner.all():
            prompt["input_points"] = scaled[~corner][None, None]
            prompt["input_labels"] = labels[~corner][None, None].to(reference.device)
        if previous is not None:
            prompt["input_masks"] = previous[None].to(reference)
        out = self.model(image_embeddings=embedding, multimask_output=True, **prompt)
        return out.pred_masks[0].float(), out.iou_scores[0].float()


class CallableEngine:
    """Drives any function `(image (H, W, 3) uint8, points (P, 2), labels (P,)) -> logits (H, W)` or `(M, H, W)`."""

    def __init__(self, function: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]):
        self.function = function

    def encode(self, image: Image.Image) -> np.ndarray:
        """The picture as an array."""
        return np.asarray(image)

    def predict(
        self, state: Any, points: Tensor, labels: Tensor, previous: Tensor | None
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """See `Engine.predict`; IoU is NaN, so the first mask is taken."""
        rows = []
        for p, l in zip(points, labels, strict=True):
            real = l != PADDING
            logits = np.asarray(self.function(state, p[real].numpy(), l[real].numpy()), np.float32)
            logits = logits[None] if logits.ndim == 2 else logits
            if logits.ndim != 3 or not len(logits) or logits.shape[1:] != state.shape[:2]:
                raise InputError(f"The function returned {logits.shape}; expected logits {state.shape[:2]}.")
            if np.isnan(logits).any():
                raise InputError("The function returned NaN among its logits; give numbers, above 0 inside the mask.")
            rows.append(torch.from_numpy(logits))
        masks = torch.stack(rows)
        return masks, torch.full(masks.shape[:2], torch.nan), lambda x: x


def _pixels(image: Image.Image, device: torch.device) -> Tensor:
    array = torch.from_numpy(np.array(image))  # a copy: torch must not see PIL's read-only memory
    return array.permute(2, 0, 1)[None].to(device).float() / 255
