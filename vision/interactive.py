"""Interactive segmentation: click, see the mask, click again; one interface over SqueezeSAM, HF SAM and SAM 2, or any callable.

    segmenter = InteractiveSegmenter()              # the bundled photo model
    segmenter.set_image("photo.jpg")
    segmenter.propose()                             # a mask before the first click
    segmenter.add_click(320, 200)
    segmenter.add_click(40, 60, positive=False)
    segmenter.cutout().save("cutout.png")

The proposal follows the idea of the SqueezeSAM abstract (arXiv 2312.06736): a saliency map makes the first clicks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmkit.checkpoints import atomic_write, read_json, write_json
from mmkit.data.images import ImageLike, load_image
from mmkit.errors import InputError
from mmkit.pipelines import Pipeline
from mmkit.vision.saliency import InitialPrompt, initial_prompt, random_walker, saliency_map
from mmkit.vision.squeeze_sam import BOX_A, BOX_B, MEAN, NEGATIVE, PADDING, POSITIVE, STD, SqueezeSAM

RANDOM_WALKER = "random-walker"
"""Name of the model that needs no network (`mmkit.vision.saliency.random_walker`)."""

THRESHOLD = 0.0
"""Logits above this are inside."""


@dataclass
class Mask:
    """A predicted mask of one object.

    Attributes:
        logits: float32 `(H, W)`, positive inside.
        iou: the model's own estimate of its IoU (not bounded to 0..1), NaN if it makes none.
        image: the picture it belongs to.
    """

    logits: np.ndarray
    iou: float
    image: Image.Image = field(repr=False)

    @property
    def binary(self) -> np.ndarray:
        """bool `(H, W)`."""
        return self.logits > THRESHOLD

    def cutout(self, soft: bool = True) -> Image.Image:
        """The picture as RGBA, transparent outside the mask; `soft` smooths the edge."""
        alpha = self.binary.astype(np.float32)
        if soft:
            alpha = F.avg_pool2d(torch.from_numpy(alpha)[None], 3, 1, 1, count_include_pad=False)[0].numpy()
        rgba = self.image.convert("RGBA")
        rgba.putalpha(Image.fromarray((alpha * 255 + 0.5).astype(np.uint8)))
        return rgba

    def overlay(self, color: tuple[int, int, int] = (30, 144, 255), opacity: float = 0.5) -> Image.Image:
        """The picture with the mask tinted and outlined."""
        pixels = np.asarray(self.image, np.float32).copy()
        inside = self.binary
        pixels[inside] += (np.array(color, np.float32) - pixels[inside]) * opacity
        edge = inside ^ _shrink(inside, max(1, max(inside.shape) // 400))
        pixels[edge] = color
        return Image.fromarray(pixels.astype(np.uint8))

    def plot(self) -> Image.Image:
        """What a person wants to see: `overlay()`."""
        return self.overlay()

    def polygons(self, min_points: int = 3) -> list[list[tuple[float, float]]]:
        """Outlines of the mask as closed polygons of (x, y) in pixels, sub-pixel accurate; holes are separate outlines."""
        from contourpy import contour_generator

        padded = np.pad(self.logits - THRESHOLD, 1, constant_values=-1.0)
        lines: Any = contour_generator(z=padded).lines(0.0)
        return [[(float(x) - 1, float(y) - 1) for x, y in line] for line in lines if len(line) > min_points]

    def rle(self) -> dict[str, Any]:
        """COCO run-length encoding: {"size": [H, W], "counts": [...]}, column by column, starting with background."""
        return mask_to_rle(self.binary)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the mask; the suffix chooses: .png a cut-out (RGBA), .json the COCO RLE with polygons, .npy the bool array."""
        path = Path(path)
        if path.suffix == ".png":
            with atomic_write(path) as temporary:
                self.cutout().save(temporary, format="PNG")
        elif path.suffix == ".json":
            write_json(path, {"segmentation": self.rle(), "polygons": self.polygons(), "predicted_iou": self.iou})
        elif path.suffix == ".npy":
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                np.save(file, self.binary)
        else:
            raise InputError(
                f"{path.name}: the suffix must be .png (cut-out), .json (RLE and polygons) or .npy (mask)."
            )
        return path


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """A bool mask `(H, W)` as uncompressed COCO RLE."""
    flat = np.concatenate([[False], np.asarray(mask, bool).ravel(order="F")])
    edges = np.flatnonzero(np.diff(flat.astype(np.int8)))
    counts = np.diff(np.concatenate([[0], edges, [flat.size - 1]]))
    return {"size": [int(s) for s in mask.shape], "counts": [int(c) for c in counts]}


def rle_to_mask(rle: dict[str, Any]) -> np.ndarray:
    """The inverse of `mask_to_rle`. Raises `InputError` when the counts do not fill the picture."""
    height, width = rle["size"]
    counts = np.asarray(rle["counts"], dtype=np.int64)
    if (counts < 0).any() or counts.sum() != height * width:
        raise InputError(f"RLE counts sum to {counts.sum()}, expected {height}x{width} = {height * width}.")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(height, width, order="F")


def _shrink(mask: np.ndarray, steps: int) -> np.ndarray:
    inside = torch.from_numpy(mask)[None, None].float()
    return (F.max_pool2d(1 - inside, 2 * steps + 1, stride=1, padding=steps) == 0)[0, 0].numpy()


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
            previous: low-resolution logits `(Q, h, w)` of the mask shown before, as returned earlier, or `None`.

        Returns:
            Low-resolution logits `(Q, M, h, w)`, predicted IoU `(Q, M)`, and a function that takes `(K, h, w)` to the
            picture's size.
        """


@dataclass(frozen=True)
class _View:
    """A picture as `SqueezeSAMEngine` keeps it: the network's whole view, a copy to crop from, and the true size."""

    whole: Tensor
    canvas: Tensor
    size: tuple[int, int]


class SqueezeSAMEngine:
    """Drives a `SqueezeSAM`: the resized picture is cached, the whole network runs at every click.

    Args:
        model: the network.
        zoom: look closer once there is a mask or a box: the network then sees a square 1.4 times its size, so that small
            objects keep their detail (the ZoomIn of f-BRS, arXiv 2001.10331, and RITM); the first click on a small object
            costs two passes. Default: for models that keep the aspect. The published network sees the whole picture.
    """

    first = 2
    margin = 1.4
    """Side of the close view over the larger side of the object."""

    def __init__(self, model: SqueezeSAM, zoom: bool | None = None):
        self.model = model
        self.zoom = model.keep_aspect if zoom is None else zoom

    def encode(self, image: Image.Image) -> _View:
        """The network's view of the picture, and a copy of at most four times its side to look closer at."""
        reference = next(self.model.parameters())
        pixels = _pixels(image, reference.device)
        size = (image.height, image.width)
        scale = min(1.0, 4 * self.model.image_size / max(size))
        small = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        canvas = pixels if small == size else F.interpolate(pixels, small, mode="bilinear", antialias=True)
        return _View(self.model.preprocess(pixels).to(reference.dtype), canvas, size)

    def predict(
        self, state: Any, points: Tensor, labels: Tensor, previous: Tensor | None
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """See `Engine.predict`."""
        model = self.model
        if not model.negative_clicks and not model.strict_official_prompts and (labels == NEGATIVE).any():
            raise InputError(
                "This SqueezeSAM has no negative-click channel (the published encoding has none); "
                "use a model built with negative_clicks=True."
            )
        points, labels = points.to(state.whole.device), labels.to(state.whole.device)
        if not self.zoom:
            low, iou = self._run(state.whole, points, labels, state.size, previous)
            return low, iou, lambda x: model.upscale(x[:, None], state.size)[:, 0]
        full = points.new_tensor(state.size).flip(0)
        grid = points.new_tensor(state.canvas.shape[2:]).flip(0)
        points = torch.where((labels == PADDING)[..., None], -1.0, points * grid / full)
        rows = [
            self._closer(state, points[i], labels[i], None if previous is None else previous[i])
            for i in range(len(points))
        ]
        low, iou = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return low, iou, lambda x: F.interpolate(x[:, None], state.size, mode="bicubic")[:, 0]

    def _closer(self, view: _View, points: Tensor, labels: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits `(1, M, h, w)` on the canvas and IoU `(1, M)` of one prompt `(P, 2)`, `(P,)`, given in canvas pixels."""
        h, w = view.canvas.shape[2:]
        x0, y0, x1, y1 = 0, 0, w, h
        if (previous is not None and (labels != PADDING).sum() >= self.first) or (labels == BOX_A).any():
            x0, y0, x1, y1 = self._window(points[labels != PADDING], previous, (h, w))
        size = (y1 - y0, x1 - x0)
        shifted = torch.where((labels == PADDING)[:, None], -1.0, points - points.new_tensor([x0, y0]))
        before = None if previous is None else self._framed(previous[y0:y1, x0:x1])
        rgb = (
            view.whole if size == (h, w) else self.model.preprocess(view.canvas[..., y0:y1, x0:x1]).to(view.whole.dtype)
        )
        near, iou = self._run(rgb, shifted[None], labels[None], size, before)
        low = near.new_full((1, near.shape[1], h, w), -10.0)
        low[..., y0:y1, x0:x1] = self.model.upscale(near, size)
        return low, iou

    def _window(self, points: Tensor, mask: Tensor | None, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The square around the prompts and the mask `(h, w)`, with its margin, inside the canvas: x0, y0, x1, y1."""
        h, w = size
        inside = torch.empty(0, 2) if mask is None else (mask > THRESHOLD).nonzero().flip(1)
        spots = torch.cat([points, inside.to(points)])
        low, high = spots.amin(dim=0), spots.amax(dim=0)
        side = max(self.margin * float((high - low).max()), self.model.image_size / 2)
        window = []
        for a, b, limit in ((low[0], high[0], w), (low[1], high[1], h)):
            start = max(0, min(round(float(a + b) / 2 - side / 2), limit - round(side)))
            window.append((start, min(limit, start + round(side))))
        return window[0][0], window[1][0], window[0][1], window[1][1]

    def _framed(self, logits: Tensor) -> Tensor:
        """Logits of a crop `(h, w)` in the network's square, as the previous mask `(1, S, S)`."""
        h, w = self.model.scaled_size(*logits.shape)
        scaled = F.interpolate(logits[None, None], (h, w), mode="bilinear", antialias=True)[0]
        side = self.model.image_size
        return F.pad(scaled, (0, side - w, 0, side - h), value=-10.0)

    def _run(
        self, rgb: Tensor, points: Tensor, labels: Tensor, size: tuple[int, int], previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The network on one view `(1, 3, S, S)` of a picture of `size` for Q prompts: logits `(Q, M, s, s)`, IoU `(Q, M)`."""
        model = self.model
        before = None if previous is None else previous[None]
        prompts = model.encode_prompts(points[None], labels[None], size, before)[0]
        token = None
        if model.prompt_token is not None:
            token = model.prompt_token(model.scale_points(points, *size) / model.image_size, labels)
        fused = torch.cat([rgb.expand(len(prompts), -1, -1, -1), prompts.to(rgb.dtype)], dim=1)
        low, iou = (x.float() for x in model.forward_fused(fused, token))
        if not model.single_mask:
            return low[:, 1:], iou[:, 1:]
        first = torch.arange(iou.shape[1], device=iou.device) == 0
        several = (labels != PADDING).sum(dim=1, keepdim=True) > 1
        return low, iou.masked_fill(first != several, -torch.inf)


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
        return max(1, round(image_size[0] * scale)), max(1, round(image_size[1] * scale))

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
        """See `Engine.predict`."""
        embedding, size = state
        reference = next(self.model.parameters())
        h, w = self._scaled(size)
        factor = points.new_tensor([w / size[1], h / size[0]])
        corner = (labels == BOX_A) | (labels == BOX_B)
        keep = {"device": reference.device, "dtype": reference.dtype}
        arguments: dict[str, Any] = {"multimask_output": True}
        clicks = labels.masked_fill(corner, PADDING)
        if (clicks != PADDING).any() or not corner.any():
            scaled = torch.where((clicks != PADDING)[..., None], points * factor, 0.0)
            arguments["input_points"] = scaled[None].to(**keep)
            arguments["input_labels"] = torch.where(clicks == PADDING, -10, clicks)[None].to(reference.device)
        if corner.any():
            if not corner.any(dim=1).all():
                raise InputError("SAM takes boxes for all prompts of a batch or for none; split the batch.")
            low = torch.where(corner[..., None], points, torch.inf).amin(dim=1) * factor
            high = torch.where(corner[..., None], points, -torch.inf).amax(dim=1) * factor
            arguments["input_boxes"] = torch.cat([low, high], dim=-1)[None].to(**keep)
        if previous is not None and len(points) == 1:
            arguments["input_masks"] = previous[None].to(**keep)
        out = self.model(image_embeddings=embedding, **arguments)
        low_res, iou = out.pred_masks[0].float(), out.iou_scores[0].float()

        def upscale(x: Tensor) -> Tensor:
            x = F.interpolate(x[:, None], (self.size, self.size), mode="bilinear")[..., :h, :w]
            return F.interpolate(x, size, mode="bilinear")[:, 0]

        return low_res, iou, upscale


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
            if logits.ndim != 3 or logits.shape[1:] != state.shape[:2]:
                raise InputError(f"The function returned {logits.shape}; expected logits {state.shape[:2]}.")
            rows.append(torch.from_numpy(logits))
        masks = torch.stack(rows)
        return masks, torch.full(masks.shape[:2], torch.nan), lambda x: x


def _pixels(image: Image.Image, device: torch.device) -> Tensor:
    array = torch.from_numpy(np.array(image))  # a copy: torch must not see PIL's read-only memory
    return array.permute(2, 0, 1)[None].to(device).float() / 255


@dataclass(frozen=True)
class _Step:
    """One state of the session: what was asked and what came out."""

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None
    mask: Mask | None = None
    low: Tensor | None = None


class InteractiveSegmenter(Pipeline):
    """A session of clicks on one picture at a time.

    Args:
        model: `SqueezeSAM`, HF `SamModel` or `Sam2Model`, an `Engine`, a function (see `CallableEngine`), "random-walker" (no
            network), the name of bundled weights, a folder saved with `save_pretrained` (SqueezeSAM, SAM or
            SAM 2), or `None` for the bundled photo model.
        device, dtype: as in `mmkit.pipeline`.
        saliency: function from a PIL image to a map `(H, W)` in 0..1, used by `propose`.

    Example:
        >>> def disk(image, points, labels):
        ...     rows, cols = np.indices(image.shape[:2])
        ...     return 9.0 - np.hypot(cols - points[-1, 0], rows - points[-1, 1])
        >>> segmenter = InteractiveSegmenter(disk)
        >>> segmenter.set_image(np.zeros((40, 60, 3), np.uint8))
        >>> int(segmenter.add_click(30, 20).binary.sum())
        249
    """

    task = "interactive-segmentation"
    default_weights = "squeezesam-photo"

    def __init__(
        self,
        model: Any = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        saliency: Callable[[Image.Image], np.ndarray] = saliency_map,
    ):
        self.saliency = saliency
        if model == RANDOM_WALKER:
            model = random_walker
        if model is None or isinstance(model, (nn.Module, str, os.PathLike)):
            super().__init__(model, device=device, dtype=dtype)
            self.engine: Engine = SqueezeSAMEngine(self.model) if isinstance(self.model, SqueezeSAM) else self._sam()
        elif hasattr(model, "encode") and hasattr(model, "predict"):
            self.engine = model
        elif callable(model):
            self.engine = CallableEngine(model)
        else:
            raise InputError(f"model must be a module, an engine, a function, a name or a folder, not {type(model)}.")
        self.image: Image.Image | None = None
        self._state: Any = None
        self._steps: list[_Step] = [_Step()]
        self._at = 0

    def _sam(self) -> SamEngine:
        if not hasattr(self.model, "get_image_embeddings"):
            raise InputError(
                f"{type(self.model).__name__} is not a promptable segmenter: give SqueezeSAM, SamModel or Sam2Model."
            )
        return SamEngine(self.model)

    def load(self, model: str | os.PathLike[str]) -> nn.Module:
        """Bundled weights by name, or a folder: of `SqueezeSAM.save_pretrained`, or of a transformers SAM or SAM 2."""
        from mmkit.weights import load_weights

        folder = Path(model).expanduser()
        if not folder.is_dir():
            return load_weights(str(model))
        kind = read_json(folder / "config.json").get("model_type")
        if kind is None:
            return SqueezeSAM.from_pretrained(folder)
        if kind not in ("sam", "sam2"):
            raise InputError(f"{folder} holds a {kind!r} model; a promptable one is SqueezeSAM, 'sam' or 'sam2'.")
        import transformers

        loader = transformers.SamModel if kind == "sam" else transformers.Sam2Model
        return loader.from_pretrained(folder, local_files_only=True, use_safetensors=True)

    def set_image(self, image: ImageLike) -> None:
        """Take a new picture (path, bytes, PIL, array): encodes it once and forgets all clicks."""
        picture = load_image(image)
        with torch.inference_mode():
            self._state = self.engine.encode(picture)
        self.image = picture
        self.reset()

    def reset(self) -> None:
        """Forget clicks, box, mask and history; the picture stays."""
        self._steps, self._at = [_Step()], 0

    @property
    def mask(self) -> Mask | None:
        """The current mask."""
        return self._steps[self._at].mask

    @property
    def clicks(self) -> list[tuple[float, float, bool]]:
        """x, y, positive of each click so far."""
        step = self._steps[self._at]
        return [(x, y, label == POSITIVE) for (x, y), label in zip(step.points, step.labels, strict=True)]

    @property
    def box(self) -> tuple[float, float, float, float] | None:
        """x0, y0, x1, y1 of the box, if any."""
        return self._steps[self._at].box

    def add_click(self, x: float, y: float, positive: bool = True) -> Mask:
        """Click at pixel (x, y). Raises `InputError` outside the picture or before `set_image`."""
        self._check(x, y)
        step = self._steps[self._at]
        label = POSITIVE if positive else NEGATIVE
        return self._run((*step.points, (float(x), float(y))), (*step.labels, label), step.box, step.low)

    def set_box(self, x0: float, y0: float, x1: float, y1: float) -> Mask:
        """Give (or replace) a box by two opposite corners in pixels."""
        self._check(x0, y0)
        self._check(x1, y1)
        if x0 == x1 or y0 == y1:
            raise InputError(f"The box ({x0}, {y0}, {x1}, {y1}) is empty; give two opposite corners.")
        step = self._steps[self._at]
        box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        return self._run(step.points, step.labels, box, None)

    def propose(self) -> InitialPrompt:
        """First clicks from the saliency map, and their mask (`segmenter.mask`); starts a new history."""
        picture = self._picture()
        prompt = initial_prompt(np.asarray(self.saliency(picture)))
        self.reset()
        points = tuple((float(x), float(y)) for x, y in prompt.points)
        self._run(points, (POSITIVE,) * len(points), prompt.box, None)
        return prompt

    def undo(self) -> Mask | None:
        """Take back the last click, box or proposal; returns the mask before it (`None` at the start)."""
        self._at = max(0, self._at - 1)
        return self.mask

    def redo(self) -> Mask | None:
        """Bring back what `undo` took away."""
        self._at = min(len(self._steps) - 1, self._at + 1)
        return self.mask

    def cutout(self, soft: bool = True) -> Image.Image:
        """The current object as RGBA. Raises `InputError` without a mask."""
        if self.mask is None:
            raise InputError("There is no mask yet: call add_click, set_box or propose first.")
        return self.mask.cutout(soft)

    def predict_many(self, prompts: Sequence[dict[str, Any]]) -> list[Mask]:
        """Masks of several objects in one pass over the cached picture; the session's clicks are not touched.

        Args:
            prompts: each with "points" [(x, y), ...] and "labels" [1 or 0, ...], and / or "box" (x0, y0, x1, y1).
        """
        if not prompts:
            raise InputError("predict_many needs at least one prompt.")
        rows = [self._encode_prompt(p.get("points", ()), p.get("labels"), p.get("box")) for p in prompts]
        longest = max(len(labels) for _, labels in rows)
        points = torch.full((len(rows), longest, 2), -1.0)
        labels = torch.full((len(rows), longest), PADDING)
        for i, (xy, kind) in enumerate(rows):
            points[i, : len(kind)] = torch.tensor(xy, dtype=torch.float32)
            labels[i, : len(kind)] = torch.tensor(kind)
        return [mask for mask, _ in self._predict(points, labels, None)]

    def __call__(
        self,
        image: ImageLike,
        points: Sequence[tuple[float, float]] = (),
        labels: Sequence[int] | None = None,
        box: tuple[float, float, float, float] | None = None,
    ) -> Mask:
        """One mask in one call; without points and box the proposal's mask. `labels`: 1 or 0 per point (default all 1)."""
        self.set_image(image)
        if not len(points) and box is None:
            self.propose()
        else:
            xy, kind = self._encode_prompt(points, labels, box)
            clicks = len(kind) - 2 * (box is not None)
            self._run(tuple(xy[-clicks:]) if clicks else (), tuple(kind[-clicks:]) if clicks else (), box, None)
        assert self.mask is not None
        return self.mask

    def _encode_prompt(
        self, points: Sequence[tuple[float, float]], labels: Sequence[int] | None, box: Sequence[float] | None
    ) -> tuple[list[tuple[float, float]], list[int]]:
        """Box corners first, then clicks; checked."""
        kinds = [POSITIVE] * len(points) if labels is None else [int(v) for v in labels]
        if len(kinds) != len(points):
            raise InputError(f"{len(points)} points but {len(kinds)} labels.")
        if any(k not in (PADDING, NEGATIVE, POSITIVE, BOX_A, BOX_B) for k in kinds):
            raise InputError(f"labels must lie in {{-1, 0, 1, 2, 3}}, found {sorted(set(kinds))}.")
        xy = [(float(x), float(y)) for x, y in points]
        if box is not None:
            xy = [(float(box[0]), float(box[1])), (float(box[2]), float(box[3])), *xy]
            kinds = [BOX_A, BOX_B, *kinds]
        if all(k == PADDING for k in kinds):
            raise InputError("A prompt needs at least one point or a box.")
        for (x, y), kind in zip(xy, kinds, strict=True):
            if kind != PADDING:
                self._check(x, y)
        return xy, kinds

    def _run(
        self,
        points: tuple[tuple[float, float], ...],
        labels: tuple[int, ...],
        box: tuple[float, float, float, float] | None,
        previous: Tensor | None,
    ) -> Mask:
        xy, kinds = self._encode_prompt(points, labels, box)
        results = self._predict(torch.tensor([xy]), torch.tensor([kinds]), previous)
        mask, low = results[0]
        self._steps = [*self._steps[: self._at + 1], _Step(points, labels, box, mask, low)]
        self._at += 1
        return mask

    @torch.inference_mode()
    def _predict(self, points: Tensor, labels: Tensor, previous: Tensor | None) -> list[tuple[Mask, Tensor]]:
        picture = self._picture()
        low, iou, upscale = self.engine.predict(self._state, points, labels, previous)
        best = iou.nan_to_num(0).argmax(dim=1)
        rows = torch.arange(len(low), device=low.device)
        chosen = low[rows, best]
        full = upscale(chosen).cpu().numpy()
        estimates = iou[rows, best].tolist()
        return [
            (Mask(np.ascontiguousarray(full[i]), estimates[i], picture), chosen[i : i + 1]) for i in range(len(low))
        ]

    def _picture(self) -> Image.Image:
        if self.image is None:
            raise InputError("No picture yet: call set_image first.")
        return self.image

    def _check(self, x: float, y: float) -> None:
        picture = self._picture()
        if not (0 <= x < picture.width and 0 <= y < picture.height):  # also refuses NaN
            raise InputError(f"({x}, {y}) lies outside the picture of {picture.width}x{picture.height} pixels.")
