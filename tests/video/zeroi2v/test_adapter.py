"""ZeroI2V: attention across frames, linear adapters, exact merging, and files that need nothing but themselves."""

from __future__ import annotations

import copy
import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmkit.adapters import apply_adapter, load_adapter, save_adapter
from mmkit.backbones import create_backbone, save_backbone
from mmkit.backbones.model import create_model, load_official_checkpoint
from mmkit.errors import CheckpointError, InputError, NotMergeableError
from mmkit.storage import write_safetensors
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


def test_the_loader_of_golden_cases_knows_every_official_setting() -> None:
    spec = importlib.util.spec_from_file_location("loader", Path(__file__).parents[2] / "golden/loader_zeroi2v.py")
    assert spec is not None
    assert spec.loader is not None
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    assert loader.offsets_of({"shift_div": 4, "shift_stride": 2, "divide_head": False}, 4) == (-2, 2, 0, 0)
    assert loader.offsets_of({"shift_stride": 4, "long_shift_div": 12}, 12) == (-4, 4, -2, *[0] * 9)
    assert loader.offsets_of({"shift1_div": 8, "shift2_div": 16}, 16) == (-1, -1, 1, 1, -2, 2, *[0] * 10)


def test_the_stride_moves_the_first_groups_only() -> None:
    assert head_offsets_from_div(4, 4, shift_stride=2) == (-2, 2, 0, 0)
    assert head_offsets_from_div(12, 6, 12, True, shift_stride=3) == (-3, -3, 3, 3, -2, 2, *[0] * 6)
    for bad in (0, -1, 1.5, None):
        with pytest.raises(InputError, match="shift_stride"):
            head_offsets_from_div(4, 4, shift_stride=bad)  # type: ignore[arg-type]


LAYOUTS = [  # frames, heads, ((division, offset), ...) in the order of channels, adapters per block, scale
    (8, 12, ((12, -1), (12, 1)), 4, 0.5),
    (6, 12, ((12, -1), (12, 1), (12, -2), (12, 2)), 4, 1.0),
    (8, 16, ((8, -1), (8, 1)), 3, 0.5),
    (9, 16, ((8, -1), (8, 1), (8, -2)), 4, 1.7),
    (8, 16, ((8, -1), (8, 1), (16, -2), (16, 2), (16, -3), (16, 3), (16, -4), (16, 4)), 3, 1.0),
    (2, 4, ((4, -1), (4, 1), (4, -4)), 4, 0.5),
    (7, 8, ((4, -3), (4, 3), (8, -2), (8, 2)), 4, 0.5),  # shift_stride=3
]


def official_state(
    gen: torch.Generator, frames: int, width: int, adapters: int, depth: int = 2
) -> dict[str, torch.Tensor]:
    """A random file in the authors' layout: 16-pixel pictures, 8-pixel patches, 3 classes."""

    def draw(*shape: int, std: float = 0.1) -> torch.Tensor:
        return torch.randn(*shape, generator=gen) * std

    state = {
        "class_embedding": draw(width),
        "positional_embedding": draw(5, width),
        "temporal_embedding": draw(1, frames, width),
        "conv1.weight": draw(width, 3, 8, 8),
    }
    shapes = {"attn.out_proj": (width, width), "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
    norms = ["ln_pre", "ln_post"]
    for block in (f"transformer.resblocks.{i}." for i in range(depth)):
        norms += [block + "ln_1", block + "ln_2"]
        state |= {block + "attn.in_proj_weight": draw(3 * width, width), block + "attn.in_proj_bias": draw(3 * width)}
        for name, shape in shapes.items():
            state |= {f"{block}{name}.weight": draw(*shape), f"{block}{name}.bias": draw(shape[0])}
        for name in ADAPTERS[:adapters]:
            for layer, shape in (("D_fc1", (width // 4, width)), ("D_fc2", (width, width // 4))):
                state |= {f"{block}{name}.{layer}.weight": draw(*shape), f"{block}{name}.{layer}.bias": draw(shape[0])}
    state |= {f"{n}.weight": 1 + draw(width) for n in norms} | {f"{n}.bias": draw(width) for n in norms}
    head = {"cls_head.fc_cls.weight": draw(3, width), "cls_head.fc_cls.bias": draw(3)}
    return {f"backbone.{k}": v for k, v in state.items()} | head


ADAPTERS = ("T_Adapter_in", "S_Adapter", "MLP_Adapter", "MLP_Adapter_out")


def official_forward(
    state: dict[str, torch.Tensor], video: torch.Tensor, heads: int, channels: list[int], scale: float
) -> torch.Tensor:
    """The published network written out plainly: logits of (B, T, 3, 16, 16); `channels` holds each channel's offset."""
    batch, frames = video.shape[:2]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, state[f"backbone.{name}.weight"], state[f"backbone.{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"backbone.{name}.weight"], state[f"backbone.{name}.bias"], 1e-5)

    def adapt(x: torch.Tensor, name: str) -> torch.Tensor:
        there = f"backbone.{name}.D_fc1.weight" in state
        return x + scale * linear(linear(x, f"{name}.D_fc1"), f"{name}.D_fc2") if there else x

    def shift(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        for t in range(frames):
            for c, offset in enumerate(channels):
                if 0 <= t + offset < frames:
                    out[t::frames, :, c] = x[t + offset :: frames, :, c]
        return out

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    x = F.conv2d(video.flatten(0, 1), state["backbone.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state["backbone.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = x + state["backbone.positional_embedding"]
    x = norm(x + state["backbone.temporal_embedding"][0].repeat(batch, 1)[:, None], "ln_pre")
    for i in range(2):
        block = f"transformer.resblocks.{i}."
        y = adapt(norm(x, block + "ln_1"), block + "T_Adapter_in")
        packed = F.linear(y, state[f"backbone.{block}attn.in_proj_weight"], state[f"backbone.{block}attn.in_proj_bias"])
        q, k, v = packed.chunk(3, -1)
        q, k, v = split(q), split(shift(k)), split(shift(v))
        y = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + adapt(linear(y.transpose(1, 2).flatten(2), block + "attn.out_proj"), block + "S_Adapter")
        y = linear(adapt(norm(x, block + "ln_2"), block + "MLP_Adapter"), block + "mlp.c_fc")
        x = x + adapt(linear(y * torch.sigmoid(1.702 * y), block + "mlp.c_proj"), block + "MLP_Adapter_out")
    mean = norm(x[:, 0], "ln_post").unflatten(0, (batch, frames)).mean(1)
    return F.linear(mean, state["cls_head.fc_cls.weight"], state["cls_head.fc_cls.bias"])


@pytest.mark.parametrize("library", ["timm", "open_clip"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_published_layout_equals_the_network_written_out(library: str, layout: Any, tmp_path: Path) -> None:
    frames, heads, groups, adapters, scale = layout
    gen = torch.Generator().manual_seed(0)
    width = 4 * heads
    state = official_state(gen, frames, width, adapters)
    channels = [offset for div, offset in groups for _ in range(width // div)]
    channels += [0] * (width - len(channels))
    write_safetensors(tmp_path / "official.safetensors", state)
    model = zeroi2v_from_official(
        tmp_path / "official.safetensors",
        head_offsets=channels[::4],
        scale=scale,
        library=library,
        num_heads=heads,
    )
    x = torch.randn(2, frames, 3, 16, 16, generator=gen, dtype=torch.float64)
    want = official_forward({k: v.double() for k, v in state.items()}, x, heads, channels, scale)
    model.double()
    torch.testing.assert_close(model(x), want, atol=1e-9, rtol=0)
    torch.testing.assert_close(model.merge()(x), want, atol=1e-9, rtol=0)


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


@pytest.mark.parametrize("args", [{"qkv_bias": False}, {"proj_bias": False}, {"init_values": 0.1}, {"qk_norm": True}])
@torch.no_grad()
def test_a_merged_file_reloads_whatever_the_layers_had(args: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, **args}
    model = VideoClassifier("timm:vit_tiny_patch16_224", 3, backbone_args=sizes, zeroi2v={}, num_frames=4).eval()
    shake(model)
    x, keys = video(), set(model.backbone.state_dict())
    before = model(x)
    model.merge().save_pretrained(tmp_path)
    again = VideoClassifier.from_pretrained(tmp_path)
    assert torch.equal(again(x), model(x))
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    model.unmerge().save_pretrained(tmp_path)
    assert set(model.backbone.state_dict()) == keys
    assert torch.equal(VideoClassifier.from_pretrained(tmp_path)(x), before)


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
    for bad in (
        {"num_frames": 0},
        {"num_frames": 2.5},
        {"dropout": 1.0},
        {"placement": ("nowhere",)},
        {"placement": "attn_in"},
        {"bottleneck_ratio": -1},
        {"scale": float("nan")},
        {"head_offsets": 3},
    ):
        with pytest.raises(InputError):
            ZeroI2VConfig(**bad)
    with pytest.raises(InputError, match="one integer per head"):
        small(zeroi2v={"head_offsets": (1, 0)})
    for name in ("resnet18", "swin_tiny_patch4_window7_224", "samvit_base_patch16", "eva02_tiny_patch14_224"):
        with torch.device("meta"):  # windows, or a projection that is never called
            backbone = create_backbone(f"timm:{name}", num_classes=2)
        with pytest.raises(InputError, match="plain ViT"):
            apply_adapter(backbone, "zeroi2v")
    with pytest.raises(InputError, match="at least 1"):
        VideoClassifier("timm:vit_tiny_patch16_224", 2, num_frames=0)
    with pytest.raises(InputError, match="averages frames"):
        VideoClassifier("timm:vit_tiny_patch16_224", 2, backbone_args={"depth": 1}).merge()


def test_official_files_ask_for_what_they_do_not_hold() -> None:
    case = Path(__file__).parents[2] / "golden" / "zeroi2v" / "clip_tiny_div4"
    with pytest.raises(CheckpointError, match="scale"):
        zeroi2v_from_official(case / "weights.safetensors", head_offsets=BOTH, num_heads=4)
    with pytest.raises(CheckpointError, match="offsets"):
        zeroi2v_from_official(case / "weights_merged.safetensors", num_heads=4)
    merged = zeroi2v_from_official(case / "weights_merged.safetensors", head_offsets=BOTH, num_heads=4)
    assert merged.merged
    with pytest.raises(CheckpointError, match="not a ZeroI2V"):
        zeroi2v_from_official(case / "inputs.safetensors", head_offsets=BOTH, scale=1.0)
    with pytest.raises(InputError, match="num_heads"):
        zeroi2v_from_official(case / "weights.safetensors", head_offsets=BOTH, scale=0.5)
    with pytest.raises(CheckpointError, match="merged checkpoint"):
        load_official_checkpoint(small(), case / "weights_merged.safetensors")


@pytest.mark.parametrize(("old", "new"), [("", "module."), ("backbone.", ""), ("backbone.", "visual.")])
@torch.no_grad()
def test_official_files_under_other_prefixes(old: str, new: str, tmp_path: Path) -> None:
    state = official_state(torch.Generator().manual_seed(0), 4, 32, 4)
    options: Any = {"head_offsets": BOTH, "scale": 0.5, "num_heads": 4}
    write_safetensors(tmp_path / "a.safetensors", state)
    write_safetensors(tmp_path / "b.safetensors", {new + k.removeprefix(old): v for k, v in state.items()})
    a, b = (zeroi2v_from_official(tmp_path / f"{n}.safetensors", **options) for n in "ab")
    x = video()
    assert torch.equal(a.forward_features(x), b.forward_features(x))


@torch.no_grad()
def test_official_files_for_other_lengths_and_classes(tmp_path: Path) -> None:
    state = official_state(torch.Generator().manual_seed(0), 4, 32, 4)
    write_safetensors(tmp_path / "a.safetensors", state)
    options: Any = {"head_offsets": BOTH, "scale": 0.5, "num_heads": 4}
    with pytest.warns(UserWarning, match="4 frames and gets 8"):
        model = zeroi2v_from_official(tmp_path / "a.safetensors", num_frames=8, num_classes=7, **options)
    table = model.zeroi2v["norm_pre"].temporal_embedding
    assert (model.num_frames, table.shape, model.head.out_features) == (8, (1, 8, 32), 7)
    torch.testing.assert_close(table[0, 0], state["backbone.temporal_embedding"][0, 0])
    middle = 0.75 * state["backbone.temporal_embedding"][0, 1] + 0.25 * state["backbone.temporal_embedding"][0, 2]
    torch.testing.assert_close(table[0, 3], middle)


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
