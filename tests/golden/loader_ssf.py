"""SSF cases: a timm ViT, Swin or ConvNeXt with the official SSF checkpoint against the official outputs and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mmkit.adapters.ssf import _site_of, load_official_checkpoint
from mmkit.errors import NotMergeableError


def build(backbone: str, config: dict[str, Any]) -> torch.nn.Module:
    """The timm model of an official configuration."""
    import timm

    if backbone == "vit":
        return timm.models.VisionTransformer(**config)
    if backbone == "swin":
        return timm.models.SwinTransformer(**config)
    if not config.get("ls_init_value", 1.0):  # the official code builds no gamma for 0, timm only for None
        config = {**config, "ls_init_value": None}
    return timm.models.ConvNeXt(**config)


def run(case: Path, meta: dict[str, Any]) -> None:
    model = build(meta["backbone"], meta["config"]).eval()
    adapter = load_official_checkpoint(model, case / "weights.safetensors")
    adapter.requires_grad_(True)
    assert sum(p.numel() for p in adapter.parameters()) == meta["ssf_params"]
    assert len(list(adapter.parameters())) == meta["ssf_tensors"]

    inputs, expected = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    tolerance = {k: meta["tolerance"][k] for k in ("atol", "rtol")}
    logits = model(inputs["images"])
    features = model.forward_features(inputs["images"])
    if features.shape != expected["features"].shape:  # official Swin pools inside forward_features
        features = features.mean((1, 2))
    torch.testing.assert_close(features, expected["features"], **tolerance)
    torch.testing.assert_close(logits, expected["logits"], **tolerance)

    loss = F.cross_entropy(logits, inputs["targets"])
    assert loss.item() == pytest.approx(meta["train_loss"], abs=1e-5)
    model.zero_grad()
    loss.backward()
    tensors = dict(adapter.trainable_parameters())
    for key, value in expected.items():
        if key.startswith("grad::"):
            owner, kind = key.removeprefix("grad::").rsplit(".", 1)
            site = _site_of(owner, int(kind[-1]), model)
            got = tensors[f"{site}.{'scale' if 'scale' in kind else 'shift'}"].grad
            torch.testing.assert_close(got, value, atol=1e-5, rtol=1e-3)
    trained = list(adapter.parameters()) + [p for k, p in model.named_parameters() if k.startswith("head")]
    norm = torch.stack([p.grad.norm() for p in trained]).norm()
    assert norm.item() == pytest.approx(meta["train_grad_norm"], rel=1e-4)

    if meta.get("fully_mergeable"):
        adapter.merge()
        reference = expected.get("logits_merged_fp32", expected["logits"])
        torch.testing.assert_close(model(inputs["images"]), reference, atol=2e-5, rtol=1e-5)
    else:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(NotMergeableError) as error:
            adapter.merge()
        assert error.value.sites[-1] in ("norm", "norm_pre")
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
