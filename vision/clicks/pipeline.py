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
from scipy import ndimage
from torch import Tensor, nn

from mmkit.data.images import ImageLike, load_image
from mmkit.errors import InputError
from mmkit.pipelines import Pipeline
from mmkit.storage import atomic_write, read_json, write_json
from mmkit.vision.clicks.engines import THRESHOLD, CallableEngine, Engine, SamEngine, SqueezeSAMEngine
from mmkit.vision.clicks.model import BOX_A, BOX_B, NEGATIVE, PADDING, POSITIVE, SqueezeSAM
from mmkit.vision.clicks.saliency import InitialPrompt, initial_prompt, random_walker, saliency_map

RANDOM_WALKER = "random-walker"
"""Name of the model that needs no network (`mmkit.vision.clicks.saliency.random_walker`)."""


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

    def resized(self, image: Image.Image) -> Mask:
        """The same mask for a larger or smaller copy of its picture."""
        size = (image.height, image.width)
        logits = F.interpolate(torch.from_numpy(self.logits)[None, None], size, mode="bilinear")[0, 0]
        return Mask(logits.numpy(), self.iou, image)

    def cutout(self, soft: bool = True) -> Image.Image:
        """The picture as RGBA, transparent and black outside the mask (nothing hidden is kept); `soft` smooths the edge."""
        alpha = self.binary.astype(np.float32)
        if soft:
            alpha = F.avg_pool2d(torch.from_numpy(alpha)[None], 3, 1, 1, count_include_pad=False)[0].numpy()
        opacity = (alpha * 255 + 0.5).astype(np.uint8)
        pixels = np.asarray(self.image.convert("RGB")) * (opacity > 0)[..., None]
        return Image.fromarray(np.dstack([pixels, opacity]))

    def overlay(self, color: tuple[int, int, int] = (30, 144, 255), opacity: float = 0.5) -> Image.Image:
        """The picture with the mask tinted and outlined."""
        inside = self.binary.astype(np.uint8)
        line = 2 * max(1, max(inside.shape) // 400) + 1
        edge = inside - ndimage.minimum_filter(inside, line, mode="nearest")
        solid = Image.new("RGB", self.image.size, color)
        tinted = Image.composite(Image.blend(self.image, solid, opacity), self.image, Image.fromarray(inside * 255))
        return Image.composite(solid, tinted, Image.fromarray(edge * 255))

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

    def record(self) -> dict[str, Any]:
        """What a JSON file holds: {"segmentation": COCO RLE, "polygons": [...], "predicted_iou": number or None}."""
        estimate = self.iou if np.isfinite(self.iou) else None
        return {"segmentation": self.rle(), "polygons": self.polygons(), "predicted_iou": estimate}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the mask; the suffix chooses: .png a cut-out (RGBA), .json the COCO RLE with polygons, .npy the bool array."""
        path = Path(path)
        if path.suffix == ".png":
            with atomic_write(path) as temporary:
                self.cutout().save(temporary, format="PNG")
        elif path.suffix == ".json":
            write_json(path, self.record())
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
    try:
        height, width = (int(v) for v in rle["size"])
        counts = _numbers(rle["counts"], (), "RLE counts must be numbers").astype(np.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            'An RLE must be {"size": [H, W], "counts": [...]}, uncompressed; pycocotools decodes compressed ones.'
        ) from error
    if (counts < 0).any() or counts.sum() != height * width:
        raise InputError(f"RLE counts sum to {counts.sum()}, expected {height}x{width} = {height * width}.")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(height, width, order="F")


def _numbers(values: Any, columns: tuple[int, ...], expected: str) -> np.ndarray:
    """`values` as a float array `(n, *columns)`."""
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        array = np.empty(())
    if array.ndim == 0 or (array.size and array.shape[1:] != columns):
        raise InputError(f"{expected}, not {values!r:.80}.")
    return array.reshape(-1, *columns)


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class _Prompt:
    """Clicks (labels 1 and 0) and a box, checked, in pixels of the picture."""

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box: Box | None = None

    def rows(self) -> tuple[list[tuple[float, float]], list[int]]:
        """Points and labels as engines take them: box corners first, then clicks."""
        if self.box is None:
            return list(self.points), list(self.labels)
        x0, y0, x1, y1 = self.box
        return [(x0, y0), (x1, y1), *self.points], [BOX_A, BOX_B, *self.labels]


@dataclass(frozen=True)
class _Step:
    """One state of the session: what was asked and what came out."""

    prompt: _Prompt = _Prompt()
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
        if isinstance(model, str) and model == RANDOM_WALKER:
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
        from mmkit.backbones import load_weights

        folder = Path(model).expanduser()
        if not folder.is_dir():
            return load_weights(str(model))
        config = read_json(folder / "config.json")
        kind = config.get("model_type") if isinstance(config, dict) else None
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
        prompt = self._steps[self._at].prompt
        return [(x, y, label == POSITIVE) for (x, y), label in zip(prompt.points, prompt.labels, strict=True)]

    @property
    def box(self) -> Box | None:
        """x0, y0, x1, y1 of the box, if any."""
        return self._steps[self._at].prompt.box

    def add_click(self, x: float, y: float, positive: bool = True) -> Mask:
        """Click at pixel (x, y). Raises `InputError` outside the picture or before `set_image`."""
        click = self._prompt([(x, y)], [POSITIVE if positive else NEGATIVE], None)
        step = self._steps[self._at]
        before = step.prompt
        return self._run(
            _Prompt((*before.points, *click.points), (*before.labels, *click.labels), before.box), step.low
        )

    def set_box(self, x0: float, y0: float, x1: float, y1: float) -> Mask:
        """Give (or replace) a box by two opposite corners in pixels."""
        before = self._steps[self._at].prompt
        return self._run(_Prompt(before.points, before.labels, self._box((x0, y0, x1, y1))), None)

    def propose(self) -> InitialPrompt:
        """First clicks from the saliency map, and their mask (`segmenter.mask`); starts a new history."""
        prompt = initial_prompt(np.asarray(self.saliency(self._picture())))
        checked = self._prompt(prompt.points, prompt.labels, prompt.box)
        self.reset()
        self._run(checked, None)
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

        Raises:
            InputError: no prompt, an unknown key, or a prompt that `__call__` would refuse too.
        """
        known = {"points", "labels", "box"}
        if not prompts or not all(isinstance(p, dict) and known.issuperset(p) for p in prompts):
            raise InputError(
                f"predict_many takes one or more dicts with the keys {sorted(known)}, not {prompts!r:.80}."
            )
        rows = [self._prompt(p.get("points", ()), p.get("labels"), p.get("box")).rows() for p in prompts]
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
        box: Box | None = None,
    ) -> Mask:
        """One mask in one call; without points and box the proposal's mask.

        Args:
            image: path, bytes, PIL image or array.
            points: (x, y) in pixels of the picture.
            labels: for each point 1 inside, 0 outside, 2 and 3 the corners of a box, -1 unused; default all 1.
            box: x0, y0, x1, y1 in pixels; the edges W and H count as the last pixel.

        Raises:
            InputError: an unreadable picture, points outside it, or other labels.
        """
        self.set_image(image)
        if not len(points) and box is None:
            self.propose()
        else:
            self._run(self._prompt(points, labels, box), None)
        assert self.mask is not None
        return self.mask

    def _prompt(self, points: Any, labels: Any, box: Any) -> _Prompt:
        """What a person gave as a checked prompt: points labelled 2 and 3 become the box, those labelled -1 are dropped."""
        xy = _numbers(points, (2,), "points must be pairs (x, y) in pixels")
        kinds = np.ones(len(xy)) if labels is None else _numbers(labels, (), "labels must be one number per point")
        if len(kinds) != len(xy):
            raise InputError(f"{len(xy)} points but {len(kinds)} labels; give one label per point.")
        if not np.isin(kinds, (PADDING, NEGATIVE, POSITIVE, BOX_A, BOX_B)).all():
            raise InputError(f"labels must lie in {{-1, 0, 1, 2, 3}}, found {sorted(set(kinds.tolist()))}.")
        corners, clicks = xy[kinds >= BOX_A], (kinds == POSITIVE) | (kinds == NEGATIVE)
        if len(corners):
            if box is not None or sorted(kinds[kinds >= BOX_A]) != [BOX_A, BOX_B]:
                raise InputError("A box is two points labelled 2 and 3, or `box`, and there can be one only.")
            box = corners.flatten()
        if box is None and not clicks.any():
            raise InputError("A prompt needs at least one point or a box.")
        size = np.array(self._picture().size)
        outside = ~((xy >= 0) & (xy < size)).all(axis=1) & clicks  # true for NaN, too
        if outside.any():
            x, y = xy[outside][0]
            raise InputError(f"({x:g}, {y:g}) lies outside the picture of {size[0]}x{size[1]} pixels.")
        return _Prompt(
            tuple((x, y) for x, y in xy[clicks].tolist()),
            tuple(int(k) for k in kinds[clicks]),
            None if box is None else self._box(box),
        )

    def _box(self, corners: Any) -> Box:
        """Two opposite corners as x0, y0, x1, y1, low before high; the picture's far edges count as its last pixels."""
        box = _numbers(corners, (), "A box must be x0, y0, x1, y1 in pixels")
        if len(box) != 4:
            raise InputError(f"A box must be x0, y0, x1, y1 in pixels, not {corners!r:.80}.")
        picture = self._picture()
        low, high = np.minimum(box[:2], box[2:]), np.maximum(box[:2], box[2:])
        if not ((low >= 0) & (high <= picture.size)).all():
            raise InputError(
                f"The box {box.tolist()} lies outside the picture of {picture.width}x{picture.height} pixels."
            )
        if (low == high).any():
            raise InputError(f"The box {box.tolist()} is empty; give two opposite corners.")
        last = np.array(picture.size) - 1
        x0, y0, x1, y1 = np.concatenate([np.minimum(low, last), np.minimum(high, last)]).tolist()
        return x0, y0, x1, y1

    def _run(self, prompt: _Prompt, previous: Tensor | None) -> Mask:
        """Predict, and append the result to the history in place of what was undone."""
        xy, kinds = prompt.rows()
        mask, low = self._predict(torch.tensor([xy]), torch.tensor([kinds]), previous)[0]
        self._steps = [*self._steps[: self._at + 1], _Step(prompt, mask, low)]
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
