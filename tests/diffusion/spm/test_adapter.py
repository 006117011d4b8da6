"""Membranes: where they go, the files they come in, several at once, wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmkit.adapters import apply_adapter, forward_context, load_adapter, save_adapter
from mmkit.diffusion.spm import (
    export_lora,
    gate,
    gaussian_anchors,
    load_lora,
    load_official_checkpoint,
    save_official_checkpoint,
)
from mmkit.errors import CheckpointError, InputError

UNETS = {
    "SD 1": {"cross_attention_dim": 768},
    "SD 2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "SDXL": {
        "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layers", "linear", "numbers"),
    [("SD 1", 192, 160, 423_936), ("SD 2", 192, 192, 432_128), ("SDXL", 722, 722, 2_659_840)],
)
def test_layers_of_the_published_models(name: str, layers: int, linear: int, numbers: int) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    adapter = apply_adapter(unet, "spm")
    kinds = [isinstance(site.lora_down, nn.Linear) for site in adapter.sites.values()]
    assert (len(kinds), sum(kinds), adapter.num_parameters()) == (layers, linear, numbers)


@pytest.mark.parametrize(
    ("family", "layers"),
    [("pixart", 20), ("sd3", 21), ("flux", 17), ("flux2", 14), ("qwenimage", 24), ("zimage", 21)],
)
def test_layers_of_transformers_are_attention_and_mlp(family: str, layers: int) -> None:
    import denoisers

    paths = apply_adapter(denoisers.denoiser(family), "spm").own_paths
    assert len(paths) == layers
    assert not [p for p in paths if "norm" in p or "mod" in p or "embed" in p]
    assert all(any(k in p for k in ("attn", "attention", "ff", "mlp", "feed_forward", "proj")) for p in paths)


def trained(unet: nn.Module, seed: int = 1, **settings: Any) -> Any:
    adapter = apply_adapter(unet, "spm", **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return adapter


def predict(unet: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 16, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([5, 600]), text).sample


def test_diffusers_reads_both_files_and_ours_come_back(sd: Any, tmp_path: Path) -> None:
    spm = trained(sd.unet, rank=2, alpha=3.0, concepts=("a cat", "van gogh, art"))
    want = predict(sd.unet)
    save_official_checkpoint(spm, tmp_path / "cat.safetensors")
    export_lora(spm, tmp_path / "lora.safetensors")
    spm.scale = 0.4
    weak = predict(sd.unet)
    spm.scale = 1.0
    save_adapter(spm, tmp_path / "folder")
    spm.detach()

    again = load_official_checkpoint(sd.unet, tmp_path / "cat.safetensors")
    assert again.config == spm.config
    assert torch.equal(predict(sd.unet), want)
    again.detach()
    folder = load_adapter(sd.unet, tmp_path / "folder")
    assert torch.equal(predict(sd.unet), want)
    folder.detach()
    as_lora = load_lora(sd.unet, tmp_path / "lora.safetensors", "a cat")
    torch.testing.assert_close(predict(sd.unet), want, atol=1e-6, rtol=0)
    as_lora.detach()
    for file in ("cat", "lora"):
        sd.load_lora_weights(tmp_path, weight_name=f"{file}.safetensors", adapter_name=file)
        torch.testing.assert_close(predict(sd.unet), want, atol=1e-6, rtol=0)
        sd.set_adapters([file], [0.4])
        torch.testing.assert_close(predict(sd.unet), weak, atol=1e-6, rtol=0)
        sd.unload_lora_weights()


def test_what_diffusers_saves_comes_in_at_its_own_alpha(sd: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    sd.unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["to_k", "to_v"], init_lora_weights=False))
    want = predict(sd.unet)
    sd.unet.save_lora_adapter(tmp_path, weight_name="l.safetensors")
    sd.unet.delete_adapters("default")
    adapter = load_lora(sd.unet, tmp_path / "l.safetensors", ["art"])
    torch.testing.assert_close(predict(sd.unet), want, atol=1e-6, rtol=0)
    assert {p.rpartition(".")[2] for p in adapter.own_paths} == {"to_k", "to_v"}


def test_gates_per_row_add_up_over_concepts(sd: Any) -> None:
    base = predict(sd.unet)
    a, b = trained(sd.unet, 1, name="a"), trained(sd.unet, 5, name="b")
    gates = {"a": torch.tensor([0.0, 0.7]), "b": torch.tensor([0.0, 0.2])}
    with forward_context(gates=gates):
        mixed = predict(sd.unet)
    assert torch.equal(mixed[0], base[0])
    a.scale, b.scale = 0.7, 0.2
    torch.testing.assert_close(mixed[1], predict(sd.unet)[1], atol=1e-6, rtol=1e-5)
    b.scale = 0.0
    alone = predict(sd.unet)
    b.detach()
    assert torch.equal(predict(sd.unet), alone)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_convolutions_fold_whatever_their_geometry(mode: str) -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, dilation=(1, 2), padding_mode=mode))
    adapter = trained(conv, rank=9, targets=("0",))
    assert adapter.site("0").rank == 3
    x = torch.randn(2, 3, 9, 8)
    want = conv(x)
    adapter.merge()
    torch.testing.assert_close(conv(x), want, atol=1e-5, rtol=1e-5)


def test_wrong_settings(sd: Any) -> None:
    for settings in ({"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}, {"concepts": ("",)}, {"concepts": (3,)}):
        with pytest.raises(InputError):
            apply_adapter(sd.unet, "spm", **settings)
    with pytest.raises(InputError, match="targets="):
        apply_adapter(nn.Sequential(nn.Linear(3, 3)), "spm")
    assert gate(torch.tensor([0.4, 0.9])) == pytest.approx(0.9)
    assert gate(torch.tensor([0.4]), zero=0.5, floor=0.1) == pytest.approx(0.1)
    assert gate(torch.tensor([0.75]), zero=0.5) == pytest.approx(0.5)


def test_wrong_files(sd: Any, tmp_path: Path) -> None:
    spm = trained(sd.unet, concepts=("cat",))
    save_official_checkpoint(spm, tmp_path / "good.safetensors")
    spm.detach()
    good = load_file(tmp_path / "good.safetensors")
    key = next(iter(good))
    down = next(k for k in good if k.endswith("attn2_to_k.lora_down.weight"))
    facts = {"prompts": "cat"}
    bad: dict[str, tuple[dict[str, torch.Tensor], dict[str, str], str]] = {
        "no concepts": (good, {}, "is a LoRA"),
        "a text encoder": (
            good | {"lora_te_text_model_fc1.lora_up.weight": torch.ones(2, 1)},
            facts,
            "without a place",
        ),
        "half a layer": ({k: v for k, v in good.items() if k != down}, facts, "no LoRA file"),
        "a layer less": ({k: v for k, v in good.items() if not k.startswith(key.split(".")[0])}, facts, "missing"),
        "another width": (good | {down: torch.ones(1, 5)}, facts, "another shape"),
        "NaN": (good | {down: torch.full_like(good[down], torch.nan)}, facts, "NaN"),
        "alpha 0": ({k: v * (not k.endswith("alpha")) for k, v in good.items()}, facts, "alpha"),
        "damaged metadata": (good, {"concepts": "["}, "damaged"),
    }
    before = predict(sd.unet)
    for name, (tensors, metadata, message) in bad.items():
        save_file(tensors, tmp_path / "bad.safetensors", metadata)
        with pytest.raises(CheckpointError, match=message):
            load_official_checkpoint(sd.unet, tmp_path / "bad.safetensors")
        assert torch.equal(predict(sd.unet), before), name
    data = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="readable"):
        load_official_checkpoint(sd.unet, tmp_path / "cut.safetensors")


def test_gaussian_anchors_have_the_length_of_the_target() -> None:
    target = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    anchors = gaussian_anchors(target, 64, torch.Generator().manual_seed(1))
    lengths = anchors.flatten(1).norm(dim=1) / target.norm()
    assert anchors.shape == (64, 5, 7)
    assert 0.8 <= lengths.min() < 0.9 < 1.1 < lengths.max() <= 1.2
