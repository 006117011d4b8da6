"""What the contract suite runs over: backbone families and denoisers, and one row per adapter method. A new method adds one row."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import denoisers
import torch
from torch import Tensor, nn

from mmkit.adapters import Adapter, apply_adapter
from mmkit.backbones import create_backbone
from mmkit.backbones.model import create_model


def _vit() -> nn.Module:
    return create_backbone(
        "vit_tiny_patch16_224", num_classes=5, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4
    )


def _resnet() -> nn.Module:
    return create_backbone(
        "resnet10t", num_classes=5, stem_width=8, channels=(8, 16, 24, 32), zero_init_last=False
    )  # zero_init_last would block every gradient inside the branches


def _unet() -> nn.Module:
    return create_backbone(
        "diffusers:UNet2DConditionModel", sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def _clip() -> nn.Module:
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    return create_backbone("open_clip:ViT-B-32", num_classes=5, embed_dim=32, vision_cfg=vision)


def _point() -> nn.Module:
    return create_model(
        "point_mae", num_classes=5, embed_dim=24, depth=2, num_heads=2, num_groups=9, group_size=6, head="linear",
        tokenizer_widths=(8, 12, 16), drop_path_rate=0.0,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vit": _vit,
    "resnet": _resnet,
    "unet": _unet,
    "clip": _clip,
    "point": _point,
}
FAMILIES |= {family: functools.partial(denoisers.denoiser, family) for family in denoisers.NAMES}
HEADS = {"vit": "head", "resnet": "fc", "unet": "conv_out", "clip": "head", "point": "head"}
HEADS |= {"dit": "proj_out_2", "zimage": "all_final_layer.2-1.linear", "lumina2": "norm_out.linear_2"}
UNUSED = {  # what the last block computes for the text, and nobody reads
    "sd3": re.compile(r"^transformer_blocks\.1\.attn\.add_q_proj"),
    "qwenimage": re.compile(r"^transformer_blocks\.1\.(txt_m|attn\.(add_q_proj|to_add_out|norm_added_q))"),
}


@dataclass(frozen=True)
class Row:
    """One adapter method: its settings that start as an identity, where it applies, and what it cannot do.

    `random_scale` is the size of the noise that stands for training. `compile_breaks` names families where torch cannot compile the
    engine behind the method, so that it has to be merged first. `stackable=False`: two of the kind on one model make no sense.
    `depends_on_weights`: the change is a function of the weights below, so that an earlier adapter on the same module cannot be
    folded under a later one. `stays_after_merge`: part of the method has no parameters and keeps acting (heads that look at other
    frames).
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    per_family: dict[str, dict[str, Any]] = field(default_factory=dict)
    families: tuple[str, ...] = ("vit", "resnet", "unet", "clip")
    mergeable: bool = True
    random_scale: float = 0.1
    compile_breaks: tuple[str, ...] = ()
    stackable: bool = True
    stays_after_merge: bool = False
    depends_on_weights: bool = False


_ALL = ("vit", "resnet", "unet", "clip", "point")

ROWS = [
    Row("ssf", {"init_std": 0.0}, families=_ALL),
    Row("bitfit", families=_ALL),
    Row("linear_probe", stackable=False),  # two copies of one head replace each other by definition
    Row("lora", {"r": 2}, families=_ALL),
    Row("dora", {"r": 2}, depends_on_weights=True, compile_breaks=("vit", "unet", "clip")),  # torch cannot trace peft's
    Row("gmm", families=("vit",), mergeable=False, random_scale=0.5),
    Row(
        "point_peft",
        {"init": "zero", "num_prompts": 0, "adapter_dim": 4, "dropout": 0.0},
        families=("point",),
        mergeable=False,
        stackable=False,
    ),  # prompts are tokens of their own from the start
    Row("pointgst", {"rank": 4, "local": 4}, families=("point",), mergeable=False),
    Row(
        "zeroi2v",
        {
            "num_frames": 2,
            "dropout": 0.0,
            "temporal_embedding": False,
        },  # the embedding stays on the tokens after a merge
        {"vit": {"head_offsets": (0,) * 4}, "clip": {"head_offsets": (0,) * 2}},
        families=("vit", "clip"),
        stackable=False,
        stays_after_merge=True,
    ),
    Row(
        "difffit",
        {"scale_blocks": "all"},
        {"flux2": {"create_bias": True}, "unet": {"placement": "linear"}},
        families=("unet", *(name for name in denoisers.NAMES if name not in ("sana", "lumina2"))),
        random_scale=0.05,
    ),
    Row("spm", {"rank": 2}, families=("unet", "zimage")),
]
CASES = [(family, row) for row in ROWS for family in row.families]
IDS = [f"{family}-{row.method}" for family, row in CASES]


def build(family: str, seed: int = 1) -> nn.Module:
    """A small model with random but not degenerate weights, in eval mode."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_((0.15 if family == "vit" else 0.02) * torch.randn_like(p))  # attention of the ViT far from uniform
    return model


def inputs(family: str, seed: int = 2) -> tuple[Any, ...]:
    """What `build(family)` takes; one dictionary stands for keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    if family in denoisers.NAMES:
        return (denoisers.call_of(family, generator),)
    if family == "unet":
        sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 12, generator=generator)
        return sample, torch.tensor([3, 7]), text
    if family == "point":
        return (torch.rand(2, 64, 3, generator=generator) * 2 - 1,)
    side = 64 if family == "resnet" else 32
    return (torch.randn(2, 3, side, side, generator=generator),)


def run(model: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """The model's output as one tensor."""
    dtype = next(model.parameters()).dtype

    def cast(value: Any) -> Any:
        if isinstance(value, list):
            return [cast(v) for v in value]
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(args[0], dict):
        out = model(**{k: cast(v) for k, v in args[0].items()})
    else:
        out = model(*map(cast, args))
    out = out if isinstance(out, Tensor) else out.sample
    return torch.stack(out) if isinstance(out, list) else out


def attach(model: nn.Module, family: str, row: Row, *, name: str = "default", head: bool = False) -> Adapter:
    """Attach the row's adapter; `linear_probe` always trains the head."""
    settings = {**row.settings, **row.per_family.get(family, {})}
    if head or row.method == "linear_probe":
        settings["modules_to_save"] = (HEADS.get(family, "proj_out"),)
    return apply_adapter(model, row.method, name=name, **settings)


def randomise(adapter: Adapter, scale: float, seed: int = 3) -> None:
    """Stand in for training: move every adapter tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in adapter.trainable_parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
