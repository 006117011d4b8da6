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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmkit.checkpoints import atomic_write, read_json, write_json
from mmkit.data.images import ImageLike, load_image
from mmkit.errors import InputError
from mmkit.pipelines import Pipeline
from mmkit.vision.click_engines import THRESHOLD, CallableEngine, Engine, SamEngine, SqueezeSAMEngine
from mmkit.vision.saliency import InitialPrompt, initial_prompt, random_walker, saliency_map
from mmkit.vision.squeeze_sam import BOX_A, BOX_B, NEGATIVE, PADDING, POSITIVE, SqueezeSAM

RANDOM_WALKER = "random-walker"
"""Name of the model that needs no network (`mmkit.vision.saliency.random_walker`)."""


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
