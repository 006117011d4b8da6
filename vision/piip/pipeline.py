"""Pyramids asked about a picture of any size: features at every place, or a class for every pixel."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmkit.backbones.model import open_model
from mmkit.data.images import ImageLike, check_channels, check_mask_classes, load_image
from mmkit.errors import InputError
from mmkit.ops.deformable_attention import located
from mmkit.pipelines import Pipeline, finite
from mmkit.storage.files import expanded
from mmkit.vision.piip.branches import Tokens
from mmkit.vision.piip.cost import compare
from mmkit.vision.piip.interaction import DeformableAttention
from mmkit.vision.piip.model import PIIP, Pyramid
from mmkit.vision.piip.result import DenseFeatures, PyramidView, Reads, SegmentedPicture


class _PyramidPipeline(Pipeline):
    """Loads a pyramid and brings a picture to a size that it takes."""

    default_weights: ClassVar[str] = "piip_nuclei"

    def load(self, model: str | os.PathLike[str]) -> nn.Module:
        """A folder written by `save_pretrained`, or a bundled name."""
        from mmkit.backbones import load_weights

        return open_model(model) if expanded(model).is_dir() else load_weights(str(model))

    def example(self) -> tuple[Tensor, ...]:
        """A picture in numbers, (1, C, H, W)."""
        info: Any = self.model.backbone_info
        return (torch.zeros(1, *info.input_size),)

    def _require(self, fits: bool, wanted: str) -> None:
        if not fits:
            raise InputError(f"{type(self).__name__} takes {wanted}, not a {type(self.model).__name__}.")
        info: Any = self.model.backbone_info
        check_channels(info.input_size[0])

    def _prepare(
        self, image: ImageLike, size: int | None, model: Any = None
    ) -> tuple[Image.Image, Tensor, tuple[int, int]]:
        """The picture, the tensor (1, C, H, W), and its height and width before it was filled up to whole patches."""
        model = model or self.model
        info = model.backbone_info
        picture = load_image(image)
        wanted = max(info.input_size[-2:]) if size is None else size
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
            raise InputError(f"size must be a positive whole number of pixels, not {size!r}.")
        scale = wanted / max(picture.size)
        width, height = (max(round(side * scale), 1) for side in picture.size)
        small = picture.resize((width, height), Image.Resampling.BICUBIC)
        small = small if info.input_size[0] == 3 else small.convert("L")
        x = torch.from_numpy(np.array(small)).float().reshape(height, width, -1).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (info.mean, info.std))
        x = ((x - mean) / std)[None].to(self.device, self.dtype)
        fill = (0, -width % model.multiple, 0, -height % model.multiple)
        return picture, F.pad(x, fill, mode="replicate"), (height, width)


class PyramidExplorer(_PyramidPipeline):
    """What happens in a pyramid that looks at one picture: features before and after an interaction, places that are read, cost.

    `model` as for `DenseFeaturesPipeline`.
    """

    task: ClassVar[str] = "pyramid-explorer"

    def __init__(self, model: Any = None, *, device: Any = "auto", dtype: Any = "auto"):
        super().__init__(model, device=device, dtype=dtype)
        self._require(isinstance(self.model, Pyramid), "a PIIP model")

    @torch.inference_mode()
    def __call__(
        self, image: ImageLike, *, img_sizes: Sequence[int] | None = None, interaction: int = 0, pair: int = 1
    ) -> PyramidView:
        """Look at one picture.

        Args:
            image: anything `mmkit.data.load_image` reads.
            img_sizes: longer side in pixels for each branch, largest model first; default: the pyramid's own.
            interaction: which one, from 0.
            pair: whose places are kept: 1 for branches 1 and 2, ...

        Raises `InputError` for an unreadable picture, sizes that do not fit, or an interaction or pair that does not exist.
        """
        own: Any = self.model
        model = own.at(img_sizes or [b.img_size for b in own.pyramid.branches])
        if not 0 <= interaction < len(model.interactions):
            raise InputError(f"There are interactions 0 to {len(model.interactions) - 1}, no {interaction}.")
        if not 1 <= pair < len(model.families):
            raise InputError(f"There are pairs 1 to {len(model.families) - 1}, no {pair}.")
        picture, x, seen = self._prepare(image, None, model)
        unit = model.interactions[interaction].get_submodule(f"interaction_units_{pair}{pair + 1}")
        found: dict[str, list[np.ndarray]] = {"before": [], "after": []}
        reads: dict[str, Reads] = {}

        def note(name: str, attn: Any, args: tuple[Any, ...]) -> None:
            grids = args[2], args[3]
            offsets, logits = (t[0].float() for t in attn.sampling(args[0]))
            reads[name] = Reads(*grids, located(offsets, *grids).cpu().numpy(), logits.softmax(-1).cpu().numpy())

        def watch(k: int, before: list[Tokens], after: list[Tokens]) -> None:
            if k == interaction:
                for name, tokens in (("before", before), ("after", after)):
                    found[name] = [t.maps[0].permute(1, 2, 0).float().cpu().numpy() for t in tokens]

        hooks = [
            module.attn.register_forward_pre_hook(functools.partial(note, name))
            for name, module in (
                ("larger reads smaller", getattr(unit, "branch2to1_injector", None)),
                ("smaller reads larger", getattr(unit, "branch1to2_injector", None)),
            )
            if module is not None and isinstance(module.attn, DeformableAttention)
        ]
        try:
            model.forward_branches(x, watch)
        finally:
            for hook in hooks:
                hook.remove()
        filled = (x.shape[-2] / seen[0], x.shape[-1] / seen[1])
        return PyramidView(picture, seen, filled, found["before"], found["after"], reads, compare(model))


class DenseFeaturesPipeline(_PyramidPipeline):
    """Features at every place of a picture, of every branch and merged; see `DenseFeatures`.

    `model` can be a `PIIP`, `PIIPFeaturePyramid` or `PIIPSegmenter`, a folder written by `save_pretrained`, or a bundled name.
    """

    task: ClassVar[str] = "dense-features"

    def __init__(self, model: Any = None, *, device: Any = "auto", dtype: Any = "auto"):
        super().__init__(model, device=device, dtype=dtype)
        self._require(isinstance(self.model, Pyramid), "a PIIP model")

    @torch.inference_mode()
    def __call__(self, image: ImageLike, *, size: int | None = None) -> DenseFeatures:
        """Features of one picture.

        Args:
            image: anything `mmkit.data.load_image` reads, of any size and shape.
            size: pixels that its longer side has for the last branch; default: what the model was made for. The cost grows
                with the square, and more where attention is global.

        Raises `InputError` for an unreadable picture or size, or a model that answers with NaN or infinite values.
        """
        model: Any = self.model
        picture, x, (height, width) = self._prepare(image, size)
        branches = model.forward_branches(x)
        maps = {f"branch{i}": tokens.maps for i, tokens in enumerate(branches, 1)}
        if not (isinstance(model, PIIP) and model.separate_head):
            maps["merged"] = model.merge(branches)
        features = {}
        for name, found in maps.items():
            rows, columns = (
                max(-(-n * s // t), 1) for n, s, t in zip((height, width), found.shape[-2:], x.shape[-2:], strict=True)
            )
            features[name] = finite(found[0, :, :rows, :columns], name).permute(1, 2, 0).cpu().numpy()
        return DenseFeatures(features, picture, (height, width))


class SemanticSegmentationPipeline(_PyramidPipeline):
    """A class for every pixel of a picture; see `SegmentedPicture`. Without a model: nuclei in microscopy pictures.

    `model` can be a `PIIPSegmenter`, a folder written by its `save_pretrained`, a bundled name, or any module from
    (B, C, H, W) to (B, num_classes, H, W) with `num_classes`, `multiple` and a `backbone_info` that says its preprocessing.

    Args:
        class_names: background first; default: those of the model.
    """

    task: ClassVar[str] = "semantic-segmentation"

    def __init__(
        self, model: Any = None, *, device: Any = "auto", dtype: Any = "auto", class_names: Sequence[str] | None = None
    ):
        super().__init__(model, device=device, dtype=dtype)
        loaded: Any = self.model
        fits = all(hasattr(loaded, k) for k in ("num_classes", "multiple", "backbone_info"))
        self._require(fits and not isinstance(loaded, PIIP), "a model that gives every pixel a class")
        check_mask_classes(loaded.num_classes)
        names = (
            class_names
            or getattr(loaded, "class_names", ())
            or ("background", *(f"class {i}" for i in range(1, loaded.num_classes)))
        )
        if len(names) != loaded.num_classes:
            raise InputError(f"The model has {loaded.num_classes} classes, but {len(names)} names were given.")
        self.class_names = tuple(names)

    @torch.inference_mode()
    def __call__(self, image: ImageLike, *, size: int | None = None) -> SegmentedPicture:
        """Segment one picture.

        Args:
            image, size: as in `DenseFeaturesPipeline`; the answer has the picture's own size.

        Raises `InputError` for an unreadable picture or size, or a model that answers with NaN or infinite values.
        """
        picture, x, (height, width) = self._prepare(image, size)
        logits = finite(self.model(x)[..., :height, :width])
        logits = F.interpolate(logits, size=picture.size[::-1], mode="bilinear", antialias=True)
        best, number = logits.softmax(1)[0].max(0)
        return SegmentedPicture(number.to(torch.uint8).cpu().numpy(), best.cpu().numpy(), picture, self.class_names)
