"""ZeroI2V: attention across frames, linear adapters, exact merging, and files that need nothing but themselves."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmkit.adapters import apply_adapter, load_adapter, save_adapter
from mmkit.backbones import create_backbone, save_backbone
from mmkit.errors import CheckpointError, InputError, NotMergeableError
from mmkit.modeling import create_model
from mmkit.video import (
    VideoClassifier,
    ZeroI2VConfig,
    clip_vit,
    default_head_offsets,
    head_offsets_from_div,
    zeroi2v_from_official,
)

OFF = (0, 0, 0, 0)
BOTH = (-1, 1, 0, 0)


def small(library: str = "timm", *, depth: int = 2, heads: int = 4, **options: Any) -> VideoClassifier:
    """A tiny CLIP tower with 16-pixel pictures."""
    name, args = clip_vit(library, 16, 8, 32, depth, heads)
    settings = {"head_offsets": BOTH, "num_frames": 4, **options.pop("zeroi2v", {})}
    return VideoClassifier(name, 3, backbone_args=args, zeroi2v=settings, num_frames=4, **options).eval()


def shake(model: VideoClassifier, std: float = 0.2) -> VideoClassifier:
    """Random adapters."""
    with torch.no_grad():
        for p in model.zeroi2v.parameters():
            p.add_(torch.randn_like(p) * std)
    return model


def video(batch: int = 2, frames: int = 4) -> torch.Tensor:
    return torch.randn(batch, frames, 3, 16, 16)


@torch.no_grad()
def test_identity_at_the_start() -> None:
    model, x = small(zeroi2v={"head_offsets": OFF}), video()
    per_frame = model.backbone(x.flatten(0, 1)).unflatten(0, (2, 4))
    with model.adapter.disabled():
        image = model.backbone(x.flatten(0, 1)).unflatten(0, (2, 4))
    torch.testing.assert_close(per_frame, image, atol=1e-6, rtol=0)
    single = small(zeroi2v={"num_frames": 1})
    with single.adapter.disabled():
        image = single.forward_features(x[:, :1])
    torch.testing.assert_close(single.forward_features(x[:, :1]), image, atol=1e-6, rtol=0)


@torch.no_grad()
def test_repeated_frames_and_frame_order() -> None:
    model = small()
    x = video(1).expand(-1, -1, -1, -1, -1).clone()
    still = x[:, :1].expand(-1, 4, -1, -1, -1)
    frames = model.forward_features(still)[0]
    torch.testing.assert_close(frames, frames[:1].expand(4, -1), atol=1e-5, rtol=0)
    assert (model(x) - model(x.flip(1))).abs().max() > 1e-5
    blind = small(zeroi2v={"head_offsets": OFF})
    torch.testing.assert_close(blind(x), blind(x.flip(1)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_receptive_field_grows_by_one_frame_per_block() -> None:
    model = small(depth=3, zeroi2v={"head_offsets": BOTH, "num_frames": 8})
    x = video(1, 8)
    changed = x.clone()
    changed[:, 0] += 1
    moved = (model.forward_features(x) - model.forward_features(changed))[0].abs().amax(-1)
    assert (moved[:4] > 0).all()
    assert (moved[4:] == 0).all()


def test_offsets_of_the_official_configurations() -> None:
    assert head_offsets_from_div(12, 12) == (-1, 1, *[0] * 10)
    assert head_offsets_from_div(12, 12, 12, True) == (-1, 1, -2, 2, *[0] * 8)
    assert head_offsets_from_div(16, 8) == (-1, -1, 1, 1, *[0] * 12)
    assert head_offsets_from_div(16, 8, 8, False) == (-1, -1, 1, 1, -2, -2, *[0] * 10)
    assert head_offsets_from_div(16, 8, 16, True, 16) == (-1, -1, 1, 1, -2, 2, -3, *[0] * 9)
    assert default_head_offsets(12) == head_offsets_from_div(12, 12)
    assert default_head_offsets(3) == (-1, 1, 0)
    for bad in ((12, 8), (4, 1, 1, True), (4, 0)):
        with pytest.raises(InputError):
            head_offsets_from_div(*bad)


@pytest.mark.parametrize("library", ["timm", "open_clip"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.filterwarnings("ignore:The model was made for clips")
@torch.no_grad()
def test_merging_is_exact_for_any_offsets_and_scale(library: str, seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    per_block = [tuple(draw.choice([-3, -2, -1, 0, 1, 2, 5]) for _ in range(4)) for _ in range(2)]
    places = tuple(draw.sample(["attn_in", "attn_out", "mlp_in", "mlp_out"], draw.randint(1, 4)))
    options = {"head_offsets": per_block, "scale": draw.uniform(0.1, 2), "placement": places}
    model = shake(small(library, zeroi2v={**options, "bottleneck_ratio": draw.choice([0.1, 0.25, 1.5])}), 0.1)
    x = video(2, draw.choice([2, 4, 6]))
    before, keys = model(x), set(model.backbone.state_dict())
    original = copy.deepcopy(model.backbone.state_dict())
    model.merge()
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    assert set(model.backbone.state_dict()) == keys
    assert [k for k in model.state_dict() if "down" in k or "up." in k] == []
    with pytest.raises(NotMergeableError):
        model.merge()
    model.save_pretrained(tmp_path)
    again = VideoClassifier.from_pretrained(tmp_path)
    assert torch.equal(again(x), model(x))
    assert again.adapter.offsets() == per_block
    assert again.merged
    model.unmerge()
    assert torch.equal(model(x), before)
    assert all(torch.equal(v, original[k]) for k, v in model.backbone.state_dict().items())


def test_an_unmerged_file_reloads_and_merges(tmp_path: Path) -> None:
    model = shake(small(zeroi2v={"scale": 1.7, "head_offsets": (2, -2, 0, 1)}))
    x = video()
    model.save_pretrained(tmp_path)
    again = VideoClassifier.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        assert again.adapter.config.scale == 1.7
        torch.testing.assert_close(again.merge()(x), model(x), atol=1e-5, rtol=1e-5)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        VideoClassifier.from_pretrained(tmp_path)


def test_counts_of_the_published_sizes() -> None:
    with torch.device("meta"):
        for name, adapters, trainable, training, merged in (
            ("zeroi2v_clip_b16_8f", 14_201_856, 14_209_536, 100_007_424, 85_805_568),
            ("zeroi2v_clip_l14_8f", 50_454_528, 50_464_768, 353_642_496, 303_187_968),
        ):
            model = create_model(name)
            own = dict(model.zeroi2v.named_parameters())
            linear = sum(p.numel() for k, p in own.items() if "down" in k or "up." in k)
            copies = sum(p.numel() for k, p in own.items() if k.startswith("norm."))
            image = sum(p.numel() for p in model.backbone.parameters())
            assert linear == adapters
            assert sum(p.numel() for p in own.values()) == trainable
            assert image + sum(p.numel() for p in own.values()) - copies == training
            assert image + model.adapter.config.num_frames * model.head.in_features == merged


def test_only_the_official_parts_are_trained() -> None:
    model = small()
    names = {k for k, p in model.named_parameters() if p.requires_grad}
    assert all(k.startswith(("zeroi2v.", "head.")) for k in names)
    assert {"zeroi2v.norm_pre.temporal_embedding", "zeroi2v.norm.weight", "head.bias"} <= names
    frozen = {k: p.detach().clone() for k, p in model.named_parameters() if not p.requires_grad}
    shake(model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(model(video()), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    optimizer.step()
    assert all(torch.equal(p, frozen[k]) for k, p in model.named_parameters() if k in frozen)


def test_other_clip_lengths_and_odd_batches() -> None:
    model = shake(small())
    with pytest.warns(UserWarning, match="interpolated"):
        assert model(video(2, 7)).shape == (2, 3)
    with pytest.raises(InputError, match=r"\(B, T, C, H, W\)"):
        model(torch.randn(2, 3, 16, 16))
    backbone = create_backbone("timm:vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    apply_adapter(backbone, ZeroI2VConfig(num_frames=4))
    with pytest.raises(InputError, match="whole clips"):
        backbone(torch.randn(6, 3, 32, 32))


@torch.no_grad()
def test_views_average_probabilities() -> None:
    model = small()
    views = torch.randn(2, 3, 4, 3, 16, 16)
    want = torch.stack([model(views[:, v]).softmax(-1) for v in range(3)]).mean(0)
    torch.testing.assert_close(model(views).exp(), want)


def test_as_an_adapter_of_the_core(tmp_path: Path) -> None:
    backbone = create_backbone("timm:vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    x = torch.randn(4, 3, 32, 32)
    plain = backbone(x)
    adapter = apply_adapter(backbone, ZeroI2VConfig(num_frames=4, modules_to_save=("head",)))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    with_it = backbone.eval()(x)
    assert (with_it - plain).abs().max() > 1e-3
    with adapter.disabled():
        torch.testing.assert_close(backbone(x), plain)
    save_adapter(adapter, tmp_path)
    other = create_backbone("timm:vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    adapter.detach()
    assert torch.equal(backbone(x), plain)
    other.load_state_dict(backbone.state_dict())
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other.eval()(x), with_it)
    other_adapter = load_adapter(backbone, tmp_path)
    other_adapter.merge()
    torch.testing.assert_close(backbone(x), with_it, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="attached"):
        save_backbone(backbone, tmp_path / "lost")  # the heads that look across frames would be lost


def test_bad_settings_are_refused() -> None:
    for bad in ({"num_frames": 0}, {"dropout": 1.0}, {"placement": ("nowhere",)}, {"bottleneck_ratio": -1}):
        with pytest.raises(InputError):
            ZeroI2VConfig(**bad)
    with pytest.raises(InputError, match="one integer per head"):
        small(zeroi2v={"head_offsets": (1, 0)})
    resnet = create_backbone("timm:resnet18", num_classes=2)
    with pytest.raises(InputError, match="plain ViT"):
        apply_adapter(resnet, "zeroi2v")
    with pytest.raises(InputError, match="averages frames"):
        VideoClassifier("timm:vit_tiny_patch16_224", 2, backbone_args={"depth": 1}).merge()


def test_official_files_ask_for_what_they_do_not_hold() -> None:
    case = Path(__file__).parents[1] / "golden" / "zeroi2v" / "clip_tiny_div4"
    with pytest.raises(CheckpointError, match="scale"):
        zeroi2v_from_official(case / "weights.safetensors", head_offsets=BOTH, num_heads=4)
    with pytest.raises(CheckpointError, match="offsets"):
        zeroi2v_from_official(case / "weights_merged.safetensors", num_heads=4)
    merged = zeroi2v_from_official(case / "weights_merged.safetensors", head_offsets=BOTH, num_heads=4)
    assert merged.merged
    with pytest.raises(CheckpointError, match="not a ZeroI2V"):
        zeroi2v_from_official(case / "inputs.safetensors", head_offsets=BOTH, scale=1.0)


@torch.no_grad()
def test_bfloat16_and_copies() -> None:
    model, x = shake(small(), 0.05), video()
    want = model.forward_features(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.forward_features(x), want)
    twin.merge()
    assert torch.equal(model.forward_features(x), want)  # the copy has its own weights
    half = copy.deepcopy(model).to(torch.bfloat16)
    got = half.forward_features(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() / want.norm() < 3e-2


@pytest.mark.slow
@torch.no_grad()
def test_merged_model_exports_and_costs_as_much_as_the_image_model() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, x = shake(small(), 0.05), video(1)
    model.merge()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    with FlopCounterMode(display=False) as ours:
        model.backbone(x.flatten(0, 1))
    with model.adapter.disabled(), FlopCounterMode(display=False) as image:
        model.backbone(x.flatten(0, 1))
    assert ours.get_total_flops() == image.get_total_flops() > 0
