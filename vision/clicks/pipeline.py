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
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmkit.data.images import ImageLike, load_image
from mmkit.errors import InputError
from mmkit.lazy import library
from mmkit.pipelines import Pipeline
from mmkit.storage import read_json
from mmkit.storage.files import expanded
from mmkit.vision.clicks.clicknet import ClickNet
from mmkit.vision.clicks.engines import CallableEngine, ClickNetEngine, Engine, SamEngine, SqueezeSAMEngine
from mmkit.vision.clicks.model import SqueezeSAM
from mmkit.vision.clicks.predictor import Offer, Predictor
from mmkit.vision.clicks.prompts import NEGATIVE, POINTS, POSITIVE, Box, Prompt, numbers, read_box, read_prompt
from mmkit.vision.clicks.rating import Rating
from mmkit.vision.clicks.result import Mask
from mmkit.vision.clicks.saliency import InitialPrompt, initial_prompt, random_walker, saliency_map
from mmkit.vision.clicks.session import History, Step
from mmkit.weights import bundled_name, weight_entry

RANDOM_WALKER = "random-walker"
"""Name of the model that needs no network (`mmkit.vision.clicks.saliency.random_walker`)."""


class InteractiveSegmenter(Pipeline):
    """A session of clicks on one picture at a time.

    Args:
        model: `ClickNet`, `SqueezeSAM`, HF `SamModel` or `Sam2Model`, an `Engine`, a function (see `CallableEngine`), "random-walker" (no
            network), the name of bundled weights, a folder saved with `save_pretrained` (ClickNet, SqueezeSAM, SAM or
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
    default_weights = "clicknet-photo"

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
            engine = self._engine(None if isinstance(model, nn.Module) else self._rating(model))
        elif hasattr(model, "encode") and hasattr(model, "predict"):
            engine = model
        elif callable(model):
            engine = CallableEngine(model)
        else:
            raise InputError(f"model must be a module, an engine, a function, a name or a folder, not {type(model)}.")
        self.predictor = Predictor(engine)
        self.history = History()

    @property
    def image(self) -> Image.Image | None:
        """The present picture."""
        return self.predictor.picture

    @property
    def calibrated(self) -> bool:
        """Whether `Mask.iou` is the IoU to be expected, and not the model's own unchecked estimate."""
        return getattr(self.predictor.engine, "rating", None) is not None

    def _rating(self, model: str | os.PathLike[str] | None) -> Rating | None:
        """What was measured about the estimates of bundled weights."""
        name = bundled_name(str(model or self.default_weights))
        values = weight_entry(name).extra.get("rating") if name else None
        return Rating.from_dict(values) if values else None

    def _engine(self, rating: Rating | None) -> Engine:
        if isinstance(self.model, ClickNet):
            return ClickNetEngine(self.model, rating)
        if isinstance(self.model, SqueezeSAM):
            return SqueezeSAMEngine(self.model, rating=rating)
        if not hasattr(self.model, "get_image_embeddings"):
            raise InputError(
                f"{type(self.model).__name__} is not a promptable segmenter: give ClickNet, SqueezeSAM, SamModel or Sam2Model."
            )
        return SamEngine(self.model)

    def load(self, model: str | os.PathLike[str]) -> nn.Module:
        """Bundled weights by name, or a folder: of `save_pretrained` of one of our models, or of a transformers SAM or SAM 2."""
        from mmkit.backbones import load_weights

        folder = expanded(model)
        if not folder.is_dir():
            return load_weights(str(model))
        config = read_json(folder / "config.json")
        config = config if isinstance(config, dict) else {}
        kind = config.get("model_type")
        if kind is None:
            return (ClickNet if config.get("model") == "ClickNet" else SqueezeSAM).from_pretrained(folder)
        if kind not in ("sam", "sam2"):
            raise InputError(f"{folder} holds a {kind!r} model; a promptable one is SqueezeSAM, 'sam' or 'sam2'.")
        transformers = library("transformers")

        loader = transformers.SamModel if kind == "sam" else transformers.Sam2Model
        return loader.from_pretrained(folder, local_files_only=True, use_safetensors=True)

    def export(self, path: str | os.PathLike[str]) -> Path:
        """A `ClickNet` as a folder of two ONNX files, one that sees a picture and one that answers prompts: see `export_clicknet`."""
        from mmkit.vision.clicks.export import export_clicknet

        model = getattr(self, "model", None)
        if not isinstance(model, ClickNet):
            raise InputError(
                "Only ClickNet is exported with its prompts; SqueezeSAM by mmkit.vision.clicks.export_onnx, SAM by its own project."
            )
        if Path(path).suffix in (".onnx", ".pt2"):
            raise InputError(
                f"A click model becomes a folder of two ONNX files; give a folder, not {Path(path).name!r}."
            )
        return export_clicknet(model, path)

    def set_image(self, image: ImageLike) -> None:
        """Take a new picture (path, bytes, PIL, array): encodes it once and forgets all clicks."""
        self.predictor.set_picture(load_image(image))
        self.reset()

    def reset(self) -> None:
        """Forget clicks, box, mask and history; the picture stays."""
        self.history = History()

    @property
    def mask(self) -> Mask | None:
        """The current mask."""
        return self.history.now.mask

    @property
    def clicks(self) -> list[tuple[float, float, bool]]:
        """x, y, positive of each click so far."""
        prompt = self.history.now.prompt
        return [(x, y, label == POSITIVE) for (x, y), label in zip(prompt.points, prompt.labels, strict=True)]

    @property
    def box(self) -> Box | None:
        """x0, y0, x1, y1 of the box, if any."""
        return self.history.now.prompt.box

    def add_click(self, x: float, y: float, positive: bool = True) -> Mask:
        """Click at pixel (x, y). Raises `InputError` outside the picture or before `set_image`."""
        click = self._prompt([(x, y)], [POSITIVE if positive else NEGATIVE], None)
        step = self.history.now
        return self._run(step.with_click(click), step.low)

    def set_box(self, x0: float, y0: float, x1: float, y1: float) -> Mask:
        """Give (or replace) a box by two opposite corners in pixels."""
        box = read_box((x0, y0, x1, y1), self.predictor.require_picture().size)
        return self._run(replace(self.history.now.prompt, box=box), None)

    @property
    def masks(self) -> list[Mask]:
        """All masks on offer for what was asked, from small to large, the shown one among them; alike ones once."""
        offer = self.history.now.offer
        return [] if offer is None else [offer.mask(i) for i in range(len(offer.iou))]

    def smaller(self) -> Mask:
        """Show the next smaller mask for the same clicks (`undo` goes back). Raises `InputError` when there is none."""
        return self._other(-1)

    def larger(self) -> Mask:
        """Show the next larger mask for the same clicks (`undo` goes back). Raises `InputError` when there is none."""
        return self._other(1)

    def _other(self, step: int) -> Mask:
        now = self.history.now
        if now.offer is None:
            raise InputError("There is no mask yet: call add_click, set_box or propose first.")
        return self._show(now.prompt, now.offer.other(step))

    def propose(self) -> InitialPrompt:
        """First clicks from the saliency map, and their mask (`segmenter.mask`); starts a new history."""
        prompt = initial_prompt(np.asarray(self.saliency(self.predictor.require_picture())))
        checked = self._prompt(prompt.points, prompt.labels, prompt.box)
        self.reset()
        self._run(checked, None)
        return prompt

    def undo(self) -> Mask | None:
        """Take back the last click, box or proposal; returns the mask before it (`None` at the start)."""
        return self.history.undo().mask

    def redo(self) -> Mask | None:
        """Bring back what `undo` took away."""
        return self.history.redo().mask

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
        checked = [self._prompt(p.get("points", ()), p.get("labels"), p.get("box")) for p in prompts]
        return [offer.mask() for offer in self.predictor.predict(checked)]

    @overload
    def __call__(
        self, image: ImageLike, points: Sequence[tuple[float, float]] | None = ..., labels: Sequence[int] | None = ...,
        box: Box | None = ..., multimask_output: Literal[False] = ...,
    ) -> Mask: ...  # fmt: skip
    @overload
    def __call__(
        self, image: ImageLike, points: Sequence[tuple[float, float]] | None = ..., labels: Sequence[int] | None = ...,
        box: Box | None = ..., *, multimask_output: Literal[True],
    ) -> list[Mask]: ...  # fmt: skip
    def __call__(
        self,
        image: ImageLike,
        points: Sequence[tuple[float, float]] | None = (),
        labels: Sequence[int] | None = None,
        box: Box | None = None,
        multimask_output: bool = False,
    ) -> Mask | list[Mask]:
        """One mask in one call; without points and box the proposal's mask.

        Args:
            image: path, bytes, PIL image or array.
            points: (x, y) in pixels of the picture.
            labels: for each point 1 inside, 0 outside, 2 and 3 the corners of a box, -1 unused; default all 1.
            box: x0, y0, x1, y1 in pixels; the edges W and H count as the last pixel.
            multimask_output: return all masks on offer, from small to large, instead of the one with the largest estimated IoU.

        Raises:
            InputError: an unreadable picture, points outside it, or other labels.
        """
        self.set_image(image)
        spots = numbers(() if points is None else points, (2,), POINTS)
        if not len(spots) and box is None:
            self.propose()
        else:
            self._run(self._prompt(spots, labels, box), None)
        assert self.mask is not None
        return self.masks if multimask_output else self.mask

    def _prompt(self, points: Any, labels: Any, box: Any) -> Prompt:
        return read_prompt(points, labels, box, self.predictor.require_picture().size)

    def _run(self, prompt: Prompt, previous: Tensor | None) -> Mask:
        """Predict, and append the result to the history in place of what was undone."""
        return self._show(prompt, self.predictor.predict([prompt], previous)[0])

    def _show(self, prompt: Prompt, offer: Offer) -> Mask:
        mask = offer.mask()
        self.history.push(Step(prompt, mask, offer))
        return mask
