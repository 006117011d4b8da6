"""A video classifier on an image backbone: frame-wise features, averaged over the clip, one linear layer.

Without `zeroi2v` it is the frame-averaging baseline, blind to the order of frames. With it, heads of the backbone look at
neighbouring frames and linear adapters are trained; `merge()` folds those, and the saved file holds everything that remains.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from mmkit.adapters import Adapter, apply_adapter, forward_context
from mmkit.backbones import create_backbone, image_info
from mmkit.backbones.model import Model
from mmkit.errors import CheckpointError, InputError
from mmkit.storage import load_state, read_tensors
from mmkit.video.transforms import CLIP_MEAN, CLIP_STD
from mmkit.video.zeroi2v.adapter import (
    PLACES,
    ZeroI2V,
    ZeroI2VConfig,
    head_offsets_from_div,
    warn_other_length,
)
from mmkit.video.zeroi2v.official import clip_vit, own_state, read_sizes, with_backbone_prefix
from mmkit.weights import weight_entry


class VideoClassifier(Model):
    """Clips `(B, T, C, H, W)` to logits `(B, num_classes)`.

    Args:
        backbone: a `create_backbone` name, such as "timm:vit_base_patch16_clip_quickgelu_224".
        num_classes: outputs.
        backbone_args: keywords for `create_backbone`.
        zeroi2v: fields of `ZeroI2VConfig`; `None` averages frames. With it the backbone is frozen.
        dropout: before the classifier, in training (0.5 in the official models).
        num_frames, stride: the clip a pipeline samples: `stride` 0 spreads the frames over the whole window.
        class_names: labels of the outputs.
        mean, std, img_size: preprocessing; `None` takes the backbone's.
        added_biases: layers of the backbone that got a bias by merging; `merge` writes it into the configuration.

    Attributes:
        adapter: the `ZeroI2V` adapter on `backbone`, or `None`.
    """

    adapter: Any

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        backbone_args: dict[str, Any] | None = None,
        zeroi2v: dict[str, Any] | None = None,
        dropout: float = 0.5,
        num_frames: int = 8,
        stride: int = 0,
        class_names: Sequence[str] = (),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        img_size: int | None = None,
        added_biases: Sequence[str] = (),
    ):
        super().__init__()
        if num_classes < 1 or (class_names and len(class_names) != num_classes):
            raise InputError(f"num_classes is {num_classes} and there are {len(class_names)} class names.")
        if num_frames < 1 or stride < 0:
            raise InputError(f"num_frames must be at least 1 and stride at least 0, not {num_frames} and {stride}.")
        self.backbone: Any = create_backbone(backbone, **{"num_classes": 0, **(backbone_args or {})})
        if isinstance(getattr(self.backbone, "proj", None), nn.Parameter):
            self.backbone.register_parameter("proj", None)  # CLIP's projection into the text space is not used
        for path in added_biases:
            layer: Any = self.backbone.get_submodule(path)
            layer.register_parameter("bias", nn.Parameter(torch.zeros(layer.out_features), requires_grad=False))
        info = image_info(self.backbone)
        self.head = nn.Linear(_feature_dim(self.backbone), num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.dropout = nn.Dropout(dropout)
        self.num_frames, self.stride = num_frames, stride
        self.class_names = tuple(class_names) or tuple(str(i) for i in range(num_classes))
        self.mean, self.std = tuple(mean or info.mean), tuple(std or info.std)
        self.img_size = img_size or info.input_size[-1]
        self.__dict__["adapter"] = None
        self.__dict__["_warned"] = False
        if zeroi2v is not None:
            settings = ZeroI2VConfig.from_dict({"num_frames": num_frames, **zeroi2v})
            self._attach(settings)

    def _attach(self, settings: ZeroI2VConfig) -> None:
        adapter = apply_adapter(self.backbone, settings)
        self.__dict__["adapter"] = adapter  # not a submodule: its parameters are registered as `zeroi2v`
        self.zeroi2v = _parameters_of(adapter)
        self.config["zeroi2v"] = _plain(settings)

    @classmethod
    def from_backbone(cls, backbone: nn.Module, num_classes: int, **options: Any) -> Self:
        """A classifier on a copy of `backbone` (from `create_backbone`) with its weights; `options` as in the constructor."""
        info = image_info(backbone)
        source, _, name = info.name.partition(":")
        overrides = {k: v for k, v in info.overrides.items() if k != "num_classes"}
        architecture = info.name
        if source == "mmkit":  # weights made in this repository: the architecture behind them
            entry = weight_entry(name)
            architecture, overrides = entry.model, {**entry.config, **overrides}
            overrides.pop("num_classes", None)
        if not re.match(r"(timm|open_clip):", architecture):
            raise InputError(f"The backbone must come from create_backbone (timm or open_clip), not {info.name!r}.")
        options = {"mean": info.mean, "std": info.std, **options}
        model = cls(architecture, num_classes, backbone_args=overrides, **options)
        heads = tuple(f"{head}." for head in info.heads)
        state = {k: v for k, v in backbone.state_dict().items() if k != "proj" and not k.startswith(heads)}
        load_state(model.backbone, state, source=info.name)
        if model.adapter is not None and model.adapter.config.train_norm:  # the trained copy of the norm starts equal
            for path in model.adapter.saved_paths:
                model.adapter.site(path).load_state_dict(model.backbone.get_submodule(path).state_dict())
        return model

    # -- computing

    def forward_features(self, video: Tensor) -> Tensor:
        """`(B, T, C, H, W)` -> one feature per frame `(B, T, D)`. Any T; another than in training is announced once."""
        if video.dim() != 5 or 0 in video.shape:
            raise InputError(f"A batch of clips must be (B, T, C, H, W), not {tuple(video.shape)}.")
        frames = video.shape[1]
        if self.adapter is not None and frames != self.adapter.config.num_frames and not self._warned:
            self.__dict__["_warned"] = True
            warn_other_length(self.adapter.config.num_frames, frames)
        with forward_context(num_frames=frames):
            features = self.backbone(video.flatten(0, 1))
        if not isinstance(features, Tensor) or features.dim() != 2:
            raise InputError(f"{image_info(self.backbone).name} does not give one feature vector per picture.")
        return features.unflatten(0, (-1, frames))

    def forward(self, video: Tensor) -> Tensor:
        """`(B, T, C, H, W)` normalised clips -> logits `(B, num_classes)`; `(B, V, T, C, H, W)` averages softmax over V views.

        With views the result is the logarithm of the mean probability (`average_clips="prob"` of the official tests).
        """
        if video.dim() == 6:
            views = self.forward(video.flatten(0, 1)).unflatten(0, video.shape[:2])
            return views.softmax(-1).mean(1).clamp_min(1e-12).log()
        return self.head(self.dropout(self.forward_features(video).mean(1)))

    # -- merging

    @property
    def merged(self) -> bool:
        """Whether no linear adapters are computed any more."""
        return self.adapter is None or self.adapter.merged or not self.adapter.has_linear_adapters

    def merge(self) -> Self:
        """Fold the linear adapters and the trained norm into the backbone; `save_pretrained` then writes the small file.

        Raises:
            InputError: the model averages frames.
            NotMergeableError: merged already.
        """
        adapter = self._need_adapter()
        adapter.merge()
        self.zeroi2v = nn.ModuleDict({k: v for k, v in adapter.sites.items() if hasattr(v, "temporal_embedding")})
        self.config["zeroi2v"] = _plain(replace(adapter.config, bottleneck_ratio=0.0, train_norm=False))
        self.config["added_biases"] = adapter.added_biases
        return self

    def unmerge(self) -> Self:
        """Undo `merge` bit-exactly; possible on the object that was merged, not on a reloaded file."""
        adapter = self._need_adapter()
        adapter.unmerge()
        self.zeroi2v = _parameters_of(adapter)
        self.config["zeroi2v"] = _plain(adapter.config)
        self.config["added_biases"] = []
        return self

    def _need_adapter(self) -> ZeroI2V:
        if self.adapter is None:
            raise InputError("This classifier averages frames; it was built without `zeroi2v`.")
        return self.adapter

    def official_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `mmkit.video.zeroi2v.official.own_state`."""
        return own_state(self, state)


def _parameters_of(adapter: Adapter) -> nn.ModuleDict:
    """What the adapter trains, as one table: its own sites and the copy of the last norm."""
    return nn.ModuleDict({**adapter.sites, **adapter.saved})


def zeroi2v_from_official(
    path: str | os.PathLike[str],
    *,
    head_offsets: Sequence[int] | None = None,
    scale: float | None = None,
    library: str = "timm",
    num_heads: int | None = None,
    quick_gelu: bool = True,
    **options: Any,
) -> VideoClassifier:
    """Build the classifier an official file was trained as, and load it; sizes are read from the file.

    Args:
        path: an official checkpoint, merged or not; a file of the backbone alone gets a fresh head.
        head_offsets: per head; the file does not hold them. See `head_offsets_from_div`.
        scale: the `adapter_scale` of its configuration; the file does not hold it. Not needed for a merged file.
        library: "timm" or "open_clip".
        num_heads: default width / 64.
        quick_gelu: the activation of OpenAI's CLIP.
        options: further keywords of `VideoClassifier`: another `num_classes` gets a fresh head, another `num_frames` an
            interpolated temporal embedding.

    Raises:
        CheckpointError: `head_offsets` or `scale` is missing, or the file has another layout.
        InputError: `head_offsets` or `num_heads` does not fit the file.
    """
    state = with_backbone_prefix(read_tensors(path))
    sizes = read_sizes(state, path, num_heads)
    if head_offsets is None or (scale is None and not sizes.merged):
        raise CheckpointError(
            f"{path} holds neither the head offsets nor the adapter scale, and wrong ones lose accuracy silently: pass "
            "head_offsets= (head_offsets_from_div gives them) and scale= (0.5 for Kinetics, UCF101 and HMDB51, 1.0 for "
            "Something-Something), or use a named variant of create_model."
        )
    zeroi2v = {
        "head_offsets": tuple(head_offsets),
        "scale": 1.0 if scale is None else scale,
        "bottleneck_ratio": sizes.bottleneck_ratio,
        "placement": PLACES if sizes.mlp_out else PLACES[:3],
        "train_norm": not sizes.merged,
    }
    backbone, args = clip_vit(
        library,
        sizes.img_size,
        sizes.patch_size,
        sizes.embed_dim,
        sizes.depth,
        sizes.num_heads,
        sizes.mlp_ratio,
        quick_gelu,
    )
    defaults = {"num_frames": sizes.num_frames, "num_classes": sizes.num_classes or 400}
    options = {**defaults, "mean": CLIP_MEAN, "std": CLIP_STD, **options}
    model = VideoClassifier(backbone, backbone_args=args, zeroi2v=zeroi2v, **options)
    if sizes.num_classes not in (0, model.head.out_features):
        state = {k: v for k, v in state.items() if not k.startswith("cls_head.")}
    load_state(model, model.official_state(state), source=str(path))
    return model.eval()


def _feature_dim(backbone: Any) -> int:
    if hasattr(backbone, "num_features"):
        return int(backbone.num_features)
    if hasattr(backbone, "ln_post"):
        return int(backbone.ln_post.weight.shape[0])
    raise InputError(f"{type(backbone).__name__} is not an image backbone with one feature per picture.")


def _plain(config: ZeroI2VConfig) -> dict[str, Any]:
    return json.loads(json.dumps({k: v for k, v in config.to_dict().items() if k != "method"}))


def _official(
    size: str, frames: int, offsets: tuple[int, ...], scale: float, dropout: float, classes: int, **options: Any
) -> VideoClassifier:
    name = f"timm:vit_{size}_clip_quickgelu_224"
    zeroi2v = {"head_offsets": offsets, "scale": scale, "dropout": dropout}
    defaults = {"num_classes": classes, "num_frames": frames, "zeroi2v": zeroi2v, "mean": CLIP_MEAN, "std": CLIP_STD}
    return VideoClassifier(options.pop("backbone", name), **{**defaults, **options})


def zeroi2v_clip_b16_8f(**options: Any) -> VideoClassifier:
    """CLIP-B/16, 8 frames (Kinetics-400 with stride 16; UCF101 and HMDB51 with `num_classes=101` or `51`), scale 0.5."""
    return _official("base_patch16", 8, head_offsets_from_div(12, 12), 0.5, 0.1, 400, **options)


def zeroi2v_clip_b16_16f_ssv2(**options: Any) -> VideoClassifier:
    """CLIP-B/16, 16 frames spread over the video, Something-Something v2, scale 1."""
    return _official("base_patch16", 16, head_offsets_from_div(12, 12, 12, True), 1.0, 0.0, 174, **options)


def zeroi2v_clip_b16_32f(**options: Any) -> VideoClassifier:
    """CLIP-B/16, 32 frames spread over the video, UCF101 (or HMDB51 with `num_classes=51`), scale 0.5."""
    return _official("base_patch16", 32, head_offsets_from_div(12, 12, 12, True), 0.5, 0.1, 101, **options)


def zeroi2v_clip_l14_8f(**options: Any) -> VideoClassifier:
    """CLIP-L/14, 8 frames with stride 16, Kinetics-400, scale 0.5."""
    return _official("large_patch14", 8, head_offsets_from_div(16, 8), 0.5, 0.1, 400, **options)


def zeroi2v_clip_l14_32f(**options: Any) -> VideoClassifier:
    """CLIP-L/14, 32 frames with stride 4, Kinetics-400, scale 0.5; two heads look back twice as far, none ahead."""
    return _official("large_patch14", 32, head_offsets_from_div(16, 8, 8, False), 0.5, 0.1, 400, **options)


def zeroi2v_clip_l14_32f_ssv2(**options: Any) -> VideoClassifier:
    """CLIP-L/14, 32 frames spread over the video, Something-Something v2, scale 1; offsets up to three frames back."""
    return _official("large_patch14", 32, head_offsets_from_div(16, 8, 16, True, 16), 1.0, 0.0, 174, **options)
