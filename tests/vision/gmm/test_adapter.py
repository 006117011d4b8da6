"""The masks as an adapter on pretrained timm ViTs."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import set_fused_attn

from mmkit.adapters import apply_adapter, load_adapter, save_adapter
from mmkit.errors import InputError, NotMergeableError
from mmkit.vision.gmm.adapter import GMMConfig


def small_vit(**options):
    settings = {"depth": 2, "img_size": 64, "num_classes": 7, **options}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **settings).eval()


def randomise(adapter):
    for name, parameter in adapter.trainable_parameters():
        torch.nn.init.normal_(parameter, 0 if "alpha" in name else 2, 1)


@pytest.mark.parametrize("mode", ["multiply", "bias"])
def test_the_adapter_starts_as_the_identity(mode):
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = model(images)
        apply_adapter(model, "gmm", mode=mode)
        assert (model(images) - before).abs().max() < 1e-5


def test_the_identity_is_bit_exact_when_timm_runs_eagerly():
    set_fused_attn(False)
    try:
        model = small_vit()
    finally:
        set_fused_attn(True)
    images = torch.randn(2, 3, 64, 64)
    before = model(images)
    apply_adapter(model, "gmm")
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("name,heads,count", [("vit_small_patch16_224", 6, 720), ("vit_tiny_patch16_224", 3, 360)])
def test_adapter_parameter_counts(name, heads, count):
    adapter = apply_adapter(timm.create_model(name, pretrained=False), GMMConfig(num_kernels=5))
    assert adapter.num_parameters() == count


@pytest.mark.parametrize("mode", ["multiply", "bias"])
def test_adapter_changes_disables_detaches_saves(mode, tmp_path):
    model, images = small_vit(global_pool="avg", class_token=True, fc_norm=False), torch.randn(2, 3, 64, 64)
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, model(images)
    adapter = apply_adapter(model, "gmm", mode=mode, num_kernels=3)
    randomise(adapter)
    after = model(images)
    assert (after - before).abs().max() > 1e-4
    assert set(adapter.state_dict()) == {f"blocks.{i}.attn.{p}" for i in (0, 1) for p in ("alpha", "sigma")}
    with adapter.disabled():
        assert torch.equal(model(images), before)
    model(images).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(NotMergeableError, match="gmm"):
        adapter.merge()
    save_adapter(adapter, tmp_path)
    torch.testing.assert_close(copy.deepcopy(model)(images), after, atol=0, rtol=0)
    adapter.detach()
    assert torch.equal(model(images), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    load_adapter(model, tmp_path)
    assert torch.equal(model(images), after)


def test_baking_freezes_the_masks_and_unbaking_releases_them():
    model, images = small_vit(), torch.randn(1, 3, 64, 64)
    adapter = apply_adapter(model, "gmm")
    randomise(adapter)
    before = model(images)
    adapter.bake()
    assert adapter.num_parameters() == 0
    for path in adapter.mask_paths:
        adapter.mask(path).alpha.data.zero_()
    assert torch.equal(model(images), before)
    with pytest.raises(InputError, match="baked"):
        adapter.mask(adapter.mask_paths[0]).set_grid((2, 2))
    adapter.unbake()
    assert adapter.num_parameters() > 0
    assert not torch.equal(model(images), before)


def test_dynamic_image_sizes_and_register_tokens():
    model = small_vit(dynamic_img_size=True, reg_tokens=4)
    adapter = apply_adapter(model, "gmm")
    randomise(adapter)
    assert adapter.mask("blocks.0.attn").num_prefix_tokens == 5
    for height, width in ((64, 64), (96, 48), (64, 64)):
        assert model(torch.randn(1, 3, height, width)).shape == (1, 7)
        assert adapter.mask("blocks.1.attn").grid == (height // 16, width // 16)


def test_targets_stack_and_other_models_are_refused():
    model, images = small_vit(), torch.randn(1, 3, 64, 64)
    first = apply_adapter(model, "gmm", targets="blocks.0.attn", name="first")
    randomise(first)
    alone = model(images)
    second = apply_adapter(model, "gmm", name="second")
    torch.testing.assert_close(model(images), alone, atol=1e-5, rtol=1e-5)
    randomise(second)
    both = model(images)
    assert (both - alone).abs().max() > 1e-4
    first.detach()
    assert (model(images) - both).abs().max() > 1e-4
    with pytest.raises(InputError, match=r"blocks\.0\.attn"):
        apply_adapter(small_vit(), "gmm", targets="blocks.0.attention")
    with pytest.raises(InputError, match="patch grid"):
        apply_adapter(timm.create_model("resnet18", pretrained=False), "gmm")
    with pytest.raises(InputError, match="PoolingVisionTransformer"):  # its stages have grids of their own
        apply_adapter(timm.create_model("pit_ti_224"), "gmm")
    with pytest.raises(InputError, match="no timm ViT attention"):
        apply_adapter(timm.create_model("swin_tiny_patch4_window7_224", pretrained=False), "gmm")


@pytest.mark.slow
def test_half_precision_and_compiled_models():
    model, images = small_vit(), torch.randn(1, 3, 64, 64)
    adapter = apply_adapter(model, "gmm")
    randomise(adapter)
    expected = model(images)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), expected.detach(), atol=1e-5, rtol=1e-5)
    half = model.to(torch.bfloat16)
    assert half(images.to(torch.bfloat16)).dtype == torch.bfloat16


def test_an_empty_batch_passes_as_it_does_without_the_adapter():
    model = small_vit()
    empty = torch.zeros(0, 3, 64, 64)
    assert model(empty).shape == (0, 7)
    apply_adapter(model, "gmm")
    assert model(empty).shape == (0, 7)
