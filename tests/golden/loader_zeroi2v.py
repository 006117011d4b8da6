"""Golden cases of ZeroI2V: the official network un-merged, merged and its gradients, and the attention alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import Attention

from mmkit.backbones.model import load_official_checkpoint
from mmkit.video.zeroi2v.adapter import head_offsets_from_div, shift_heads
from mmkit.video.zeroi2v.model import VideoClassifier, zeroi2v_from_official
from mmkit.video.zeroi2v.official import clip_vit, own_key


def run(case: Path, meta: dict[str, Any]) -> None:
    """Check one case folder; everything follows from `meta["config"]`."""
    if "layers" in meta["config"]:
        for library in ("timm", "open_clip"):
            _network(case, meta, library)
    else:
        _attention(case, meta)


def offsets_of(cfg: dict[str, Any], heads: int) -> tuple[int, ...]:
    """The official settings as one offset per head; what they leave out is as in the official classes."""
    if "shift1_div" in cfg:  # ViT_Zero_CLIP_long
        return head_offsets_from_div(
            heads,
            cfg["shift1_div"],
            cfg.get("shift2_div", -1),
            True,
            cfg.get("shift3_div", -1),
            cfg.get("shift3_right", False),
            cfg.get("shift4_div", -1),
            cfg.get("shift4_right", False),
        )
    return head_offsets_from_div(
        heads,
        cfg.get("shift_div", 12),
        cfg.get("long_shift_div", -1),
        cfg.get("long_shift_right", False),
        shift_stride=cfg.get("shift_stride", 1),
    )


def _network(case: Path, meta: dict[str, Any], library: str) -> None:
    cfg, tol = meta["config"], meta["tolerance"]
    heads = cfg["heads"]
    offsets = offsets_of(cfg["stdha_cfg"], heads)
    assert list(offsets) == list(meta["head_offsets"])
    inputs, want = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    video = inputs["video"].transpose(1, 2)  # (B, C, T, H, W) -> (B, T, C, H, W)
    close = {"atol": tol["eval_atol"], "rtol": tol["eval_rtol"]}

    model = _build(cfg, offsets, library)
    load_official_checkpoint(model, case / "weights.safetensors")
    tokens: list[torch.Tensor] = []
    blocks = model.backbone.blocks if library == "timm" else model.backbone.transformer.resblocks
    handles = [b.register_forward_hook(lambda _m, _a, out: tokens.append(out)) for b in blocks]
    with torch.no_grad():
        features, logits = model.forward_features(video), model(video)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(features.transpose(1, 2), want["features"], **close)
    torch.testing.assert_close(logits, want["logits"], **close)
    for i in range(cfg["layers"]):
        if f"block{i}_tokens" in want:
            torch.testing.assert_close(tokens[i], want[f"block{i}_tokens"], **close)
    _gradients(model, video, inputs["labels"], want, meta)

    model.merge()
    _merged(model, video, want, close)
    if (case / "weights_merged.safetensors").exists():  # the official merged file
        merged = _build(cfg, offsets, library, merged=True)
        load_official_checkpoint(merged, case / "weights_merged.safetensors")
        _merged(merged, video, want, close)
    auto = zeroi2v_from_official(
        case / "weights.safetensors",
        head_offsets=offsets,
        scale=cfg["adapter_scale"],
        library=library,
        num_heads=heads,
    )
    with torch.no_grad():
        torch.testing.assert_close(auto(video), want["logits"], **close)


def _build(cfg: dict[str, Any], offsets: tuple[int, ...], library: str, merged: bool = False) -> VideoClassifier:
    backbone, args = clip_vit(
        library, cfg["input_resolution"], cfg["patch_size"], cfg["width"], cfg["layers"], cfg["heads"]
    )
    places = ("attn_in", "attn_out", "mlp_in", "mlp_out")[: 4 if cfg["num_tadapter"] == 2 else 3]
    zeroi2v = {
        "head_offsets": offsets,
        "scale": cfg["adapter_scale"],
        "dropout": cfg["dropout_rate"],
        "bottleneck_ratio": 0.0 if merged else cfg["mlp_ratio"],
        "placement": places,
        "train_norm": not merged,
    }
    return VideoClassifier(
        backbone, cfg["num_classes"], backbone_args=args, zeroi2v=zeroi2v, num_frames=cfg["num_frames"], dropout=0.0
    )


def _merged(
    model: VideoClassifier, video: torch.Tensor, want: dict[str, torch.Tensor], close: dict[str, float]
) -> None:
    assert model.merged
    with torch.no_grad():
        features, logits = model.forward_features(video), model(video)
    torch.testing.assert_close(features.transpose(1, 2), want.get("merged_features", want["features"]), **close)
    torch.testing.assert_close(logits, want.get("merged_logits", want["logits"]), **close)


def _gradients(
    model: VideoClassifier,
    video: torch.Tensor,
    labels: torch.Tensor,
    want: dict[str, torch.Tensor],
    meta: dict[str, Any],
) -> None:
    model.train()
    loss = F.cross_entropy(model(video), labels, label_smoothing=0.1)
    loss.backward()
    model.eval()
    assert loss.item() == pytest.approx(want["train_loss"].item(), abs=meta["tolerance"]["loss_atol"])
    gradients = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    rtol = meta["tolerance"]["grad_rtol"]
    timm = hasattr(model.backbone, "cls_token")
    seen = set()
    for key, norm in meta["grad_norms"].items():
        ours = own_key(key, timm).replace("backbone.", "zeroi2v.") if "ln_post" in key else own_key(key, timm)
        seen.add(ours)
        gradient = gradients[ours]
        assert gradient is not None
        assert gradient.norm().item() == pytest.approx(norm, rel=rtol), key
        if f"grad.{key}" in want:
            torch.testing.assert_close(gradient, want[f"grad.{key}"], atol=1e-6, rtol=rtol)
    assert seen == set(gradients)  # exactly the official trainable set


def _attention(case: Path, meta: dict[str, Any]) -> None:
    tensors = {n: load_file(case / f"{n}.safetensors") for n in ("inputs", "weights", "outputs")}
    tol = {"atol": meta["tolerance"]["atol"], "rtol": meta["tolerance"]["rtol"]}
    for name, cfg in meta["config"].items():
        heads, dim, frames = cfg["num_heads"], cfg["embed_dim"], cfg["num_frames"]
        offsets = offsets_of(cfg, heads)
        assert list(offsets) == list(cfg["head_offsets"])
        x = tensors["inputs"][f"{name}.x"].transpose(0, 1)  # (tokens, B*T, D) -> (B*T, tokens, D)
        w = {k.removeprefix(f"{name}."): v for k, v in tensors["weights"].items() if k.startswith(f"{name}.")}
        attention = Attention(dim, heads, qkv_bias=True).eval()
        renamed = {k.replace("in_proj_", "qkv.").replace("out_proj", "proj"): v for k, v in w.items()}
        attention.load_state_dict(renamed)
        attention.qkv.register_forward_hook(lambda _m, _a, y, o=offsets, t=frames: shift_heads(y, o, t))
        with torch.no_grad():
            y = attention(x)
            packed = shift_heads(F.linear(x, w["in_proj_weight"], w["in_proj_bias"]), offsets, frames)
        torch.testing.assert_close(y.transpose(0, 1), tensors["outputs"][f"{name}.y"], **tol)
        q, k, _ = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in packed.chunk(3, -1))
        weights = (q @ k.transpose(-2, -1) / (dim // heads) ** 0.5).softmax(-1)
        torch.testing.assert_close(weights, tensors["outputs"][f"{name}.attn"], **tol)
        numbers = torch.arange(x.numel(), dtype=torch.float32).view(x.shape[1], x.shape[0], dim).transpose(0, 1)
        moved = shift_heads(numbers.repeat(1, 1, 3).contiguous(), offsets, frames)
        torch.testing.assert_close(moved[..., :dim], numbers)  # queries stay
        for part in moved.split(dim, -1)[1:]:
            torch.testing.assert_close(part.transpose(0, 1), tensors["outputs"][f"{name}.shifted_arange"])
