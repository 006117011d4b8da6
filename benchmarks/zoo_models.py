"""Who lives in the zoo: small members of every family of timm, open_clip, diffusers and transformers, found by name.

A family of timm is what one of its modules calls by one leading word ("efficientnet/mixnet"), or a variant of it by the further
words of its name ("vision_transformer/vit_siglip_gap"), so that a new version of timm brings its new families along.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.backbones import create_backbone, example_input
from mmkit.errors import MMKitError

MAX_PARAMETERS = 90_000_000
_SIZES = (
    "test", "atto", "femto", "pico", "nano", "zepto", "xxt", "xxs", "xxtiny", "xtiny", "xx", "xs", "xt", "ti", "tiny", "t", "mini",
    "lite", "s", "small", "little", "m", "medium", "", "b", "base", "plus", "l", "large", "x", "xl", "xlarge",
    "xxlarge", "h", "huge", "g", "giant", "gigantic", "enormous", "so400m", "1b", "3b", "7b",
)  # fmt: skip


class Skipped(Exception):
    """Why a family has no member in the table."""


@dataclass
class Animal:
    """One model, ready to be adapted: in eval mode and float64 (float32 where it cannot), away from all-zero branches."""

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, model: nn.Module | None = None) -> Tensor:
        """All floating-point outputs of one call, as one vector."""
        out = flat((self.model if model is None else model)(*self.args, **self.kwargs))
        if not out:
            raise Skipped("returns no tensor")
        return torch.cat([t.flatten() for t in out])


Maker = Callable[[], Animal]


def flat(value: Any) -> list[Tensor]:
    """The floating-point tensors in an output of any kind."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [t for v in value.values() for t in flat(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in flat(v)]
    return flat(vars(value)) if hasattr(value, "__dataclass_fields__") else []


def zoo(library: str = "") -> Iterator[tuple[str, Maker]]:
    """("timm/beit/beit", maker) for every family; a maker raises `Skipped`."""
    for name, families in (
        ("open_clip", _open_clip), ("transformers", _transformers), ("diffusers", _diffusers), ("timm", _timm),
    ):  # fmt: skip
        if library in ("", name):
            yield from ((f"{name}/{key}", maker) for key, maker in families())


# --- one model ----------------------------------------------------------------------------------------------------------


def settle(name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Animal:
    """Random but not degenerate: every parameter is moved, running statistics fit, and the model has answered once.

    Raises `Skipped` when the model is too large or its answer is not finite.
    """
    size = sum(p.numel() for p in model.parameters())
    if size > MAX_PARAMETERS:
        raise Skipped(f"{name} has {size / 1e6:.0f}M parameters")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                if p.dim() == 1 and 0 < p.abs().max() < 1e-2 and p.min() == p.max():
                    p.fill_(0.5)  # a layer scale, behind which nothing could be seen
                p.add_(0.02 * torch.randn_like(p))
        args = tuple(_random(a) for a in args)
        kwargs = {k: _random(v) for k, v in kwargs.items()}
        _fit_statistics(model, args, kwargs)
        for dtype in (torch.float64, torch.float32):
            animal = Animal(name, model.eval().to(dtype), *_cast((args, kwargs), dtype))
            try:
                if bool(torch.isfinite(animal.run()).all()):
                    return animal
            except (RuntimeError, TypeError, ValueError):
                if dtype == torch.float32:
                    raise
    raise Skipped(f"{name} answers with NaN")


def _random(value: Any) -> Any:
    return torch.randn_like(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return tuple(_cast(v, dtype) for v in value) if isinstance(value, tuple) else value


def _fit_statistics(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    try:
        model.train()(*args, **kwargs)
    except ValueError:  # a norm over a single value
        for m in norms:
            m.reset_running_stats()
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum


def _first(name: str, attempts: list[tuple[str, dict[str, Any]]]) -> Animal:
    """The first of several builds that runs on its example input."""
    reason: Exception | str = "no member"
    hopeless: set[str] = set()
    for model_name, settings in attempts:
        torch.manual_seed(0)
        small = f"{model_name} { ({k: v for k, v in settings.items() if k != 'img_size'}) }"
        if small in hopeless:
            continue
        try:
            model = create_backbone(model_name, **settings)
            if min(getattr(getattr(model, "patch_embed", None), "grid_size", None) or (2,)) < 2:
                raise Skipped(f"{model_name} sees a single patch")
            args, kwargs = example_input(model, 2) or _more_input(model)
            return settle(model_name, model, args, kwargs)
        except Skipped as skip:
            reason = skip
            if "parameters" in str(skip):
                hopeless.add(small)  # at no size of the picture
        except (MMKitError, RuntimeError, ValueError, TypeError, AssertionError, IndexError, AttributeError) as error:
            reason = error
            if "unexpected keyword" in str(error) or "multiple values" in str(error):
                hopeless.add(small)
    raise Skipped(f"{name}: {str(reason).splitlines()[0][:160]}")


# --- timm -----------------------------------------------------------------------------------------------------------------


def _timm() -> Iterator[tuple[str, Maker]]:
    families = timm_families()
    turns: dict[str, int] = {}
    order = []
    for key in families:  # one family of every module before the second of any
        module = key.partition("/")[0]
        turns[module] = turns.get(module, -1) + 1
        order.append((turns[module], key))
    for _, key in sorted(order, key=lambda item: item[0]):
        yield key, lambda names=families[key]: _first(f"timm:{names[0]}", list(_timm_attempts(names[:2])))


def timm_families() -> dict[str, list[str]]:
    """Architectures by "module/leading word", those whose names sound smallest first, and variants by "module/leading word_kind"."""
    import timm
    from timm.models import _registry

    families: dict[str, list[str]] = {}
    variants: dict[str, list[str]] = {}
    for name in timm.list_models():
        found = re.match(r"[a-z]+", name)
        word = found[0] if found else name
        family = f"{_registry._model_to_module[name]}/{word}"
        families.setdefault(family, []).append(name)
        if kinds := [
            k for k in re.findall(r"(?<![a-z0-9])[a-z]{3,}", name[len(word) :]) if k not in (*_SIZES, "patch", "window")
        ]:
            variants.setdefault("_".join([family, *dict.fromkeys(kinds)]), []).append(name)
    families = {key: sorted(names, key=_sounds) for key, names in families.items()}
    variants = {key: sorted(names, key=_sounds) for key, names in variants.items()}
    known = {names[0] for names in families.values()}
    return families | {key: names for key, names in variants.items() if names[0] not in known}


def _sounds(name: str) -> tuple[Any, ...]:
    """Sorts names by the size they speak of: words, then numbers, then length."""
    words = [w for w in re.split(r"[_\d]+", name)[1:] if w in _SIZES and w]
    rank = _SIZES.index(words[0]) if words else _SIZES.index("")
    rank = len(_SIZES) if re.search(r"_\d+b(_|$)", name) else rank  # billions of parameters
    return rank, [int(n) for n in re.findall(r"\d+", name)][:3], len(name)


_ONES = (1, 1, 1, 1)
_SMALL: tuple[
    dict[str, Any], ...
] = (  # what constructors call their width and depth; the first set that timm builds is taken
    {"depth": 2, "embed_dim": 64, "num_heads": 2},
    {"depth": 2, "embed_dim": 64},
    {"depth": 2, "dim": 32},
    {"num_blocks": 2, "embed_dim": 32},
    {"depths": _ONES, "dims": (16, 16, 32, 32)},
    {"depths": _ONES, "embed_dims": (16, 32, 32, 64), "num_heads": (1, 1, 2, 2)},
    {"depths": _ONES, "embed_dims": (16, 32, 32, 64)},
    {"depths": _ONES, "embed_dim": 48},
    {"depths": _ONES, "embed_dim": 32, "num_heads": (1, 1, 2, 2)},
    {"layers": _ONES, "channels": (16, 16, 32, 32)},
    {"layers": _ONES, "embed_dims": (16, 32, 32, 64)},
    {"depths": _ONES},
    {"depths": (1, 1, 1)},
    {"layers": _ONES},
    {"depth": 2},
    {},
)


def _timm_attempts(names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Narrow and shallow before wide and deep, small pictures before large."""
    for name, size, small in itertools.product(names, (32, 64, 128, 224, None), _SMALL):
        yield f"timm:{name}", {"num_classes": 5, **({"img_size": size} if size else {}), **small}


# --- open_clip --------------------------------------------------------------------------------------------------------------

_TOWER = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
_CLIP_KINDS: dict[
    str, dict[str, Any]
] = {  # kinds of towers by open_clip's names, those built from timm with its smallest models
    "ViT-B-32": _TOWER,
    "ViT-B-32-quickgelu": _TOWER,
    "ViT-S-16-alt": _TOWER,
    "EVA02-B-16": {"timm_model_name": "eva02_tiny_patch14_224"},
    "ViT-B-16-SigLIP": {"image_size": 160, "timm_model_name": "test_vit"},
    "coca_ViT-B-32": _TOWER,
    "RN50": {"image_size": 32, "width": 8, "layers": [1, 1, 1, 1]},
    "convnext_base": {"image_size": 64, "timm_model_name": "test_convnext"},
    "vit_relpos_medium_patch16_cls_224": {"image_size": 160, "timm_model_name": "test_vit_relpos"},
    "vit_medium_patch16_gap_256": {"image_size": 160, "timm_model_name": "test_vit3"},
}


def _open_clip() -> Iterator[tuple[str, Maker]]:
    for kind, vision in _CLIP_KINDS.items():
        settings = {"num_classes": 5, "embed_dim": 64, "vision_cfg": vision}
        yield kind, lambda kind=kind, settings=settings: _first(kind, [(f"open_clip:{kind}", settings)])


# --- diffusers ----------------------------------------------------------------------------------------------------------------

_ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
_DENOISER = {"sample_size": 8, "patch_size": 2, "in_channels": 4, **_ATTENTION}
_UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
}  # fmt: skip
_CODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (8, 16),
    "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16,
}  # fmt: skip
_DIFFUSERS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {**_UNET, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    "UNet2DConditionModel": {
        **_UNET, "cross_attention_dim": 12, "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "DiTTransformer2DModel": {**_DENOISER, "num_embeds_ada_norm": 10},
    "PixArtTransformer2DModel": {**_DENOISER, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 12},
    "SD3Transformer2DModel": {
        **_DENOISER, "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 8,
    },
    "FluxTransformer2DModel": {
        **_ATTENTION, "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8),
    },
    "SanaTransformer2DModel": {
        "sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, **_ATTENTION, "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12,
    },
    "HunyuanDiT2DModel": {
        **_DENOISER, "hidden_size": 16, "activation_fn": "gelu-approximate", "cross_attention_dim": 16, "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 16, "text_len": 4, "text_len_t5": 4,
    },
    "AutoencoderKL": _CODER,
    "VQModel": {**_CODER, "num_vq_embeddings": 16},
    "AutoencoderTiny": {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
                        "num_decoder_blocks": (1, 1)},
    "ControlNetModel": {
        "in_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 12,
        "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "conditioning_embedding_out_channels": (8, 16),
    },
}  # fmt: skip


def _diffusers() -> Iterator[tuple[str, Maker]]:
    for name, settings in _DIFFUSERS.items():
        yield name, lambda name=name, settings=settings: _first(name, [(f"diffusers:{name}", settings)])


def _more_input(model: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for models whose library cannot tell them."""
    text, steps = torch.zeros(2, 4, 16), torch.zeros(2, dtype=torch.long)
    known: dict[str, Callable[[], dict[str, Any]]] = {
        "FluxTransformer2DModel": lambda: {
            "hidden_states": torch.zeros(2, 4, 16), "encoder_hidden_states": text, "pooled_projections": torch.zeros(2, 16),
            "timestep": torch.zeros(2), "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(4, 3),
        },
        "SanaTransformer2DModel": lambda: {
            "hidden_states": torch.zeros(2, 4, 8, 8), "encoder_hidden_states": torch.zeros(2, 4, 12), "timestep": steps,
        },
        "HunyuanDiT2DModel": lambda: {
            "hidden_states": torch.zeros(2, 4, 8, 8), "timestep": torch.zeros(2), "encoder_hidden_states": text,
            "text_embedding_mask": torch.ones(2, 4), "encoder_hidden_states_t5": text, "text_embedding_mask_t5": torch.ones(2, 4),
            "image_meta_size": torch.zeros(12), "style": steps,
            "image_rotary_emb": (torch.zeros(16, 8), torch.zeros(16, 8)),
        },
        "AutoencoderTiny": lambda: {"sample": torch.zeros(2, 3, 16, 16)},
        "ControlNetModel": lambda: {
            "sample": torch.zeros(2, 4, 8, 8), "timestep": steps, "encoder_hidden_states": torch.zeros(2, 4, 12),
            "controlnet_cond": torch.zeros(2, 3, 16, 16),
        },
    }  # fmt: skip
    name = type(model).__name__
    if name not in known:
        raise Skipped(
            f"no example input is known; it takes {list(inspect.signature(type(model).forward).parameters)[1:5]}"
        )
    return (), known[name]()


# --- transformers -------------------------------------------------------------------------------------------------------------

_HF = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "vit": _HF,
    "deit": _HF,
    "dinov2": {**{k: v for k, v in _HF.items() if k != "intermediate_size"}, "mlp_ratio": 2},
    "dinov2_with_registers": {**{k: v for k, v in _HF.items() if k != "intermediate_size"}, "mlp_ratio": 2},
    "dinov3_vit": _HF,
    "siglip": _HF,
    "clip": _HF,
    "beit": _HF,
    "swin": {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 2, "image_size": 32, "patch_size": 4},
    "swinv2": {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 2, "image_size": 32, "patch_size": 4},
    "convnext": {"hidden_sizes": (8, 16), "depths": (1, 1), "num_stages": 2, "image_size": 32},
    "convnextv2": {"hidden_sizes": (8, 16), "depths": (1, 1), "num_stages": 2, "image_size": 32},
    "resnet": {"hidden_sizes": (8, 16), "depths": (1, 1), "embedding_size": 8},
    "hiera": {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "image_size": (32, 32), "query_stride": (2, 2), "num_query_pool": 1},
    "videomae": {**_HF, "num_frames": 4, "tubelet_size": 2},
    "sam": {
        **{k: v for k, v in _HF.items() if k != "intermediate_size"}, "output_channels": 16, "mlp_dim": 64, "window_size": 2,
        "global_attn_indexes": (1,), "num_pos_feats": 8,
    },
    "ijepa": _HF,
    "vit_msn": _HF,
    "mobilevit": {"hidden_sizes": (16, 24, 32), "neck_hidden_sizes": (8, 8, 8, 16, 16, 16, 32), "image_size": 64},
    "pvt_v2": {"image_size": 32, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 20, 32]},
    "dinov3_convnext": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "image_size": 64},
}  # fmt: skip


def _transformers() -> Iterator[tuple[str, Maker]]:
    for name, settings in _TRANSFORMERS.items():
        attempts = [(f"transformers:{name}", {"num_classes": 5, **settings})]
        yield name, lambda name=name, attempts=attempts: _first(name, attempts)
