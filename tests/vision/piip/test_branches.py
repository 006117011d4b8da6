"""Backbones of several libraries as branches: run in groups of blocks they give what they give alone; adapters act on them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import pyramid, shaken

from mmkit import apply_adapter, create_backbone, load_adapter, save_adapter
from mmkit.errors import InputError
from mmkit.storage import write_safetensors
from mmkit.vision.piip import PIIP, BranchConfig, PIIPConfig, PIIPFeaturePyramid, build_branch, meta_model

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0}
HF = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
EVA = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
BACKBONES: dict[str, BranchConfig] = {
    "timm ViT with a class token": BranchConfig("timm:vit_tiny_patch16_224", 32, settings=VIT),
    "timm distilled": BranchConfig("timm:deit_tiny_distilled_patch16_224", 32, settings=VIT),
    "timm Beit": BranchConfig("timm:beit_base_patch16_224", 32, settings=VIT),
    "timm DINOv3": BranchConfig("timm:vit_small_patch16_dinov3", 32, settings=EVA),
    "timm EVA-02": BranchConfig("timm:eva02_tiny_patch14_224", 32, settings=EVA),
    "timm ConvNeXt": BranchConfig("timm:convnext_atto", 32, settings={"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}),
    "bundled": BranchConfig("tiny_vit", 32),
    "transformers DINOv2": BranchConfig("transformers:dinov2", 32, settings=HF),
    "transformers DINOv2 with registers": BranchConfig("transformers:dinov2_with_registers", 32, settings=HF),
    "transformers DINOv3": BranchConfig("transformers:dinov3_vit", 32, settings={**HF, "intermediate_size": 32}),
}


def alone(model: Any, x: torch.Tensor) -> torch.Tensor:
    """What the library itself says; the final norm is taken off already."""
    if hasattr(model, "forward_features"):
        return model.forward_features(x)
    return model(x).last_hidden_state


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_in_groups_as_in_one(name: str, size: tuple[int, int]) -> None:
    config = BACKBONES[name]
    torch.manual_seed(0)
    model, family, norm = build_branch(config)
    model.eval()
    x = torch.randn(2, 3, *size)
    if "Beit" in name and size != (32, 32):
        with pytest.raises(InputError, match="relative positions for 32x32"):
            family.embed(model, x, config)
        return
    depth = len(family.layers(model))
    with torch.no_grad():
        tokens = family.embed(model, x, config)
        for block in range(depth):
            tokens = family.run(model, tokens, block, block, config)
        want = alone(model, x)
    got = tokens.maps if "ConvNeXt" in name else tokens.joined()
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert tokens.x.shape[-1] == family.widths(model)[-1]
    assert tokens.grid == (size[0] // family.strides(model)[-1], size[1] // family.strides(model)[-1])
    assert family.prefix_tokens(model) == (0 if tokens.prefix is None else tokens.prefix.shape[1])
    assert isinstance(norm, torch.nn.LayerNorm)


@pytest.mark.parametrize("first", ["timm DINOv3", "transformers DINOv3", "timm ConvNeXt", "timm Beit", "bundled"])
def test_mixed_pyramids_train(first: str) -> None:
    large = BACKBONES[first]
    small = BranchConfig("timm:vit_tiny_patch16_224", 64, settings={**VIT, "embed_dim": 16})
    config = PIIPConfig((large, small), num_heads=4)
    model = PIIP(config, 3, norm_groups=8)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None for p in model.branch2.parameters())
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_convolutional_last_branch_feeds_taps() -> None:
    large = BranchConfig("timm:vit_tiny_patch16_224", 32, settings={**VIT, "embed_dim": 64, "depth": 4})
    cnn = BranchConfig(
        "timm:convnext_atto",
        64,
        ((0, 0), (1, 2), (3, 5), (6, 7)),
        settings={"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)},
    )
    model = PIIPFeaturePyramid(PIIPConfig((large, cnn), num_heads=4), taps=(0, 1, 2), norm_groups=8)
    maps = model(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [(64, 16, 16), (64, 8, 8), (64, 4, 4), (64, 2, 2)]
    assert model.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_dinov3_small_base_large_can_be_built(library: str) -> None:
    sizes = {
        "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    }
    if library == "timm":
        branches = [
            BranchConfig(f"timm:vit_{n}_patch16_dinov3", s) for n, s in zip(sizes, (128, 192, 384), strict=True)
        ]
    else:
        branches = [
            BranchConfig("transformers:dinov3_vit", s, settings={**v, "num_register_tokens": 4})
            for v, s in zip(sizes.values(), (128, 192, 384), strict=True)
        ]
    model = meta_model(PIIPConfig(tuple(branches)), num_classes=10).eval()
    assert list(model.widths()[-1]) == [1024, 768, 384]
    assert sum(p.numel() for p in model.interactions.parameters()) == 76_010_112
    del model.interactions[2:]  # two groups of blocks run as twelve do
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 384, 384, device="meta")).shape == (1, 10)


@pytest.mark.slow
def test_a_dinov3_pyramid_starts_as_its_timm_models() -> None:
    """Full widths and heads, two blocks each; `benchmarks/piip.py dinov3` runs all blocks."""
    branches = [
        BranchConfig(f"timm:vit_{n}_patch16_dinov3", s, settings={"depth": 2})
        for n, s in (("large", 32), ("base", 48), ("small", 64))
    ]
    model = PIIP(PIIPConfig(tuple(branches)), 3).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".blocks." in name and name.endswith(("gamma_1", "gamma_2")):
                parameter.fill_(1.0)  # their small start would hide what the blocks do
        found = model.forward_branches(x)
        for backbone, tokens, picture in zip(model.backbones, found, model.pictures(x), strict=True):
            torch.testing.assert_close(tokens.joined(), alone(backbone, picture), atol=1e-5, rtol=1e-4)
        assert model(x).isfinite().all()


def test_trained_weights_come_into_a_branch(tmp_path) -> None:
    config = dataclasses.replace(BACKBONES["timm ViT with a class token"], settings={**VIT, "embed_dim": 32})
    source = create_backbone("timm:vit_tiny_patch16_224", num_classes=7, img_size=64, **VIT)
    write_safetensors(tmp_path / "vit.safetensors", source.state_dict())
    other = dataclasses.replace(config, img_size=64)
    model = PIIP(PIIPConfig((config, other), num_heads=4), 3, separate_head=True)
    model.load_branch(2, tmp_path / "vit.safetensors")
    assert torch.equal(model.branch2.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert torch.equal(model.branch2.pos_embed, source.pos_embed)
    assert torch.equal(model.norms[1].weight, source.norm.weight)
    assert not torch.equal(model.branch1.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def made() -> PIIP:
    torch.manual_seed(0)
    return shaken(PIIP(pyramid(), 5))


def moved(adapter: Any) -> Any:
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return adapter


@pytest.mark.parametrize("method", ["lora", "bitfit", "oft"])
def test_adapters_on_some_branches_in_one_file(method: str, tmp_path) -> None:
    x = torch.randn(2, 3, 24, 24)
    model = made()
    base = model(x)
    adapter = apply_adapter({"large": model.branch1, "small": model.branch3}, method)
    torch.testing.assert_close(model(x), base, atol=1e-6, rtol=0)
    assert {p.split(".")[0].split("/")[0] for p in adapter.site_paths} == {"large", "small"}
    adapted = moved(adapter) and model(x)
    assert (adapted - base).abs().max() > 1e-4
    save_adapter(adapter, tmp_path / "a")
    again = made()
    load_adapter({"large": again.branch1, "small": again.branch3}, tmp_path / "a")
    torch.testing.assert_close(again(x), adapted, atol=1e-6, rtol=0)
    adapter.merge()
    torch.testing.assert_close(model(x), adapted, atol=1e-5, rtol=1e-4)
    adapter.detach()
    assert torch.equal(model(x), base)


def test_several_adapters_with_trained_interactions() -> None:
    model = made()
    x = torch.randn(2, 3, 24, 24)
    model.freeze_branches()
    first = apply_adapter(model.branch1, "ssf", freeze=False)
    second = apply_adapter({"middle": model.branch2, "small": model.branch3}, "lora", name="other", freeze=False)
    trained = [*first.parameters(), *second.parameters(), *(p for p in model.parameters() if p.requires_grad)]
    model(x).sum().backward()
    assert all(p.grad is None for b in model.backbones for p in b.parameters())
    assert sum(p.grad is not None for p in trained) == len(trained)
