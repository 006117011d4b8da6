"""The published pyramids, with random weights: PIIP-TSB, -SBL, -TSBL, -H6B and -LH6B of plain vision transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mmkit.errors import InputError
from mmkit.vision.piip.config import BranchConfig, PIIPConfig
from mmkit.vision.piip.model import PIIP

_INTERN = {
    "embed_dim": 3200, "depth": 48, "num_heads": 25, "qkv_bias": False, "init_values": 0.1, "norm_layer": "rmsnorm", "no_embed_class": True,
}  # fmt: skip
_MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "t": ("vit_tiny_patch16_224", 12, {}),
    "s": ("vit_small_patch16_224", 12, {}),
    "b": ("vit_base_patch16_224", 12, {}),
    "l": ("vit_large_patch16_224", 24, {}),
    "h": ("vit_huge_patch14_224", 32, {"patch_size": 16, "init_values": 1.0, "no_embed_class": True}),  # MAE
    "6b": ("vit_large_patch16_224", 48, _INTERN),
}
"""Backbone, blocks and settings by the authors' letters; 6b is InternViT-6B."""


def published_pyramid(
    models: str,
    img_sizes: Sequence[int],
    *,
    layer_scale: bool,
    official: bool = False,
    window: int = 0,
    class_token: bool = True,
    interactions: int = 12,
    **settings: Any,
) -> PIIPConfig:
    """A pyramid of plain vision transformers.

    Args:
        models: small to large, as the authors name them: "tsb", "sbl", "tsbl", "h6b", "lh6b".
        img_sizes: large to small, as the authors list them: the first is for the smallest model.
        layer_scale: DeiT and DeiT-III have it (at 1 where the weights have none) and no position for the class token; "h" and "6b" always.
        official: positions as in the authors' code.
        window: of all blocks; 0 is global attention.
        class_token: the released detectors have none.
        interactions: how often the branches interact.
        settings: further ones of `PIIPConfig`.

    Raises `InputError` for an unknown letter, another number of sizes, or more interactions than blocks.
    """
    letters = re.findall("6b|.", models)
    unknown = [m for m in letters if m not in _MODELS]
    if unknown or len(letters) != len(img_sizes):
        raise InputError(
            f"One of {list(_MODELS)} and one size per branch, please: got {models!r} and {list(img_sizes)}."
        )
    rates = {"l": 0.4, "b": 0.2 if letters[-1] == "b" else 0.15, "s": 0.05, "t": 0.05, "h": 0.4, "6b": 0.4}
    branches = []
    for model, size in zip(reversed(letters), reversed(img_sizes), strict=True):
        name, depth, keywords = _MODELS[model]
        keywords = {**({"init_values": 1.0, "no_embed_class": True} if layer_scale else {}), **keywords}
        if not class_token:
            keywords |= {"class_token": False, "global_pool": "avg"}
        branches.append(
            BranchConfig(
                name, size, _groups(depth, interactions), keywords, class_token, window, official_positions=official,
                qk_norm="rms" if model == "6b" else "", drop_path_rate=rates[model],
            )
        )  # fmt: skip
    return PIIPConfig(tuple(branches), **{"drop_path_rate": 0.4, **settings})


def _groups(depth: int, count: int) -> tuple[tuple[int, int], ...]:
    """As even as it goes, the longer ones last, as the authors divide the 32 blocks of ViT-H."""
    if not 1 <= count <= depth:
        raise InputError(f"A branch of {depth} blocks can interact 1 to {depth} times, not {count!r}.")
    short = count - depth % count
    sizes = [depth // count + (k >= short) for k in range(count)]
    return tuple((sum(sizes[:k]), sum(sizes[: k + 1]) - 1) for k in range(count))


def _named(
    models: str, img_sizes: Sequence[int], layer_scale: bool, num_classes: int, official: bool, more: dict[str, Any]
) -> PIIP:
    heads = {k: more.pop(k) for k in ("separate_head", "pool", "norm_groups", "class_names") if k in more}
    heads = {"separate_head": True, "pool": "first_patch" if official else "token", **heads}
    pyramid = published_pyramid(models, img_sizes, layer_scale=layer_scale, official=official, **more)
    return PIIP(pyramid, num_classes, **heads)


def piip_tsb(
    img_sizes: Sequence[int] = (368, 192, 128), num_classes: int = 1000, *, official: bool = False, **settings: Any
) -> PIIP:
    """PIIP-TSB: DeiT tiny, small and base; 144,031,416 parameters with 1000 classes.

    Args:
        img_sizes: large to small.
        official: read the first patch and leave class tokens without positions, as the released weights need.
        settings: of `PIIP`, `published_pyramid` and `PIIPConfig`.
    """
    return _named("tsb", img_sizes, True, num_classes, official, settings)


def piip_sbl(
    img_sizes: Sequence[int] = (384, 192, 128), num_classes: int = 1000, *, official: bool = False, **settings: Any
) -> PIIP:
    """PIIP-SBL: AugReg small, base and large; 488,925,880 parameters at 384/192/128, 488,795,832 at 320/160/96. See `piip_tsb`."""
    return _named("sbl", img_sizes, False, num_classes, official, settings)


def piip_tsbl(
    img_sizes: Sequence[int] = (1568, 1120, 672, 448),
    num_classes: int = 1000,
    *,
    official: bool = False,
    **settings: Any,
) -> PIIP:
    """PIIP-TSBL: four branches, DeiT tiny to DeiT-III large; the authors use it for detection. See `piip_tsb`."""
    return _named("tsbl", img_sizes, True, num_classes, official, settings)


def piip_h6b(
    img_sizes: Sequence[int] = (1024, 512), num_classes: int = 1000, *, official: bool = False, **settings: Any
) -> PIIP:
    """PIIP-H6B: MAE's huge model and InternViT-6B; the authors use it for detection and segmentation. See `piip_tsb`.

    It has 6.9 thousand million parameters: count it with `torch.device("meta")`. No class tokens, merged branches.
    """
    merged = {"class_token": False, "separate_head": False, **settings}
    return _named("h6b", img_sizes, True, num_classes, official, merged)


def piip_lh6b(
    img_sizes: Sequence[int] = (1536, 1024, 512), num_classes: int = 1000, *, official: bool = False, **settings: Any
) -> PIIP:
    """PIIP-LH6B: DeiT-III large, MAE's huge model and InternViT-6B, four interactions without projections and norms. See `piip_h6b`."""
    bare = {"interactions": 4, "proj": False, "norm": False, "class_token": False, "separate_head": False}
    return _named("lh6b", img_sizes, True, num_classes, official, {**bare, **settings})
