"""Adapter files and arguments that do not fit: a clear error, and a model that is as before."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import contract
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmkit.adapters import AdapterConfig, apply_adapter, attached_adapters, load_adapter, register_adapter, save_adapter
from mmkit.adapters.bitfit import BitFit
from mmkit.adapters.ssf import SSFConfig
from mmkit.errors import CheckpointError, InputError
from mmkit.registry import ADAPTERS


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_adapter(apply_adapter(contract.build("vit"), "ssf", modules_to_save=("head",)), tmp_path / "ssf")


def _untouched(model: nn.Module) -> None:
    assert attached_adapters(model) == {}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_unknown_adapter_offers_the_nearest_names() -> None:
    with pytest.raises(InputError, match="'ssf'"):
        apply_adapter(contract.build("vit"), "sfs")


def test_unknown_setting_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="init_std"):
        apply_adapter(contract.build("vit"), "ssf", init_sd=0)


@pytest.mark.parametrize("method", ["ssf", "bitfit", "lora"])
def test_targets_that_match_nothing_name_the_nearest(method: str) -> None:
    model = contract.build("vit")
    with pytest.raises(InputError, match="qkv"):
        apply_adapter(model, method, targets=("qvk",))
    _untouched(model)


def test_targets_choose_sites() -> None:
    adapter = apply_adapter(contract.build("vit"), "ssf", targets=("blocks.0.*qkv", "mlp.fc1"))
    assert adapter.site_paths == ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]


@pytest.mark.parametrize("method", ["ssf", "lora"])
@pytest.mark.parametrize("training", [False, True])
def test_attention_that_reads_its_weights_directly_is_named_in_the_first_call(method: str, training: bool) -> None:
    import timm

    model = timm.create_model("beit_base_patch16_224", img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2)
    model.train(training)
    adapter = apply_adapter(model, method, targets=("qkv", "fc1"))
    with pytest.raises(InputError, match=r"no effect at 1 of its modules, such as .*attn\.qkv"):
        model(torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match="no effect"):
        adapter.merge()
    adapter.detach()
    apply_adapter(model, method, targets=("qkv", "fc1"), exclude=("qkv",))
    model(torch.zeros(1, 3, 32, 32))


def test_check_finds_modules_that_are_never_called() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) @ self.bypassed.weight

    adapter = apply_adapter(Direct(), "ssf")
    with pytest.raises(InputError, match="bypassed"):
        adapter.check(torch.zeros(1, 4))


def test_transformer_encoder_fast_path_does_not_skip_the_adapter() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        base = model(x)
        adapter = apply_adapter(model, SSFConfig(init_std=0.0))
        assert {"layers.0.self_attn.in_proj", "layers.0.self_attn.out_proj"} <= set(adapter.site_paths)
        torch.testing.assert_close(model(x), base, atol=1e-5, rtol=1e-5)
        for path in adapter.site_paths:
            scale = adapter.site(path).scale
            scale.mul_(1.5)
            assert (model(x) - base).abs().max() > 1e-4, path
            scale.div_(1.5)
        contract.randomise(adapter, 0.2)
        expected = model(x)
        adapter.merge()
        torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_explicit_attention_equals_torch(masked: bool, batch_first: bool) -> None:
    from mmkit.adapters import hooks
    from mmkit.adapters.attention import make_explicit

    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
    q, k = torch.randn(3, 3, 16), torch.randn(3, 3, 16)
    options = {}
    if masked:
        options = {"attn_mask": torch.triu(torch.ones(3, 3, dtype=torch.bool), 1),
                   "key_padding_mask": torch.tensor([[False, False, True]] * 3)}  # fmt: skip
    for weights in (True, False):
        for args in ((q, q, q), (q, k, k), (q, k, q)):
            expected = attention(*args, need_weights=weights, **options)
            make_explicit(attention, self := object())
            got = attention(*args, need_weights=weights, **options)
            hooks.remove(attention, self)
            torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-4)
            if weights:
                torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=1e-4)
    assert "in_proj" not in attention._modules


def test_shared_weights_are_not_merged() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    adapter = apply_adapter(model, "ssf")
    with pytest.raises(ValueError, match="shared"):
        adapter.merge()


def test_adapter_for_another_model(saved: Path) -> None:
    for other in ("resnet", "clip"):
        model = contract.build(other)
        with pytest.raises(CheckpointError, match="does not fit"):
            load_adapter(model, saved)
        _untouched(model)


@pytest.mark.parametrize(
    "damage", ["truncated", "pickle", "missing", "swapped", "nan", "newer", "unknown", "not_json", "no_method"]
)
def test_damaged_folder(saved: Path, damage: str) -> None:
    tensors, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    values = json.loads(config.read_text())
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:500])
    elif damage == "pickle":
        tensors.write_bytes(pickle.dumps({"head.weight": [1.0]}))
    elif damage == "missing":
        tensors.unlink()
    elif damage == "swapped":
        other = apply_adapter(contract.build("vit"), "ssf", modules_to_save=("head",))
        contract.randomise(other, 0.1)
        tensors.write_bytes((save_adapter(other, saved.parent / "other") / tensors.name).read_bytes())
    elif damage == "nan":
        adapter = apply_adapter(contract.build("vit"), "ssf")
        with torch.no_grad():
            adapter.site("blocks.0.attn.qkv").scale[0] = float("nan")
        save_adapter(adapter, saved)
    elif damage == "newer":
        config.write_text(json.dumps(values | {"format_version": 99}))
    elif damage == "unknown":
        config.write_text(json.dumps(values | {"method": "no_such_method"}))
    elif damage == "not_json":
        config.write_text("{")
    else:
        config.write_text("{}")
    model = contract.build("vit")
    with pytest.raises(CheckpointError):
        load_adapter(model, saved)
    _untouched(model)


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        save_adapter(apply_adapter(contract.build("vit"), "ssf"), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "x"


def test_a_failed_save_leaves_the_old_adapter(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    adapter = apply_adapter(contract.build("vit"), "ssf", modules_to_save=("head",))
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_adapter(adapter, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_names_are_unique_on_a_model() -> None:
    model = contract.build("vit")
    apply_adapter(model, "ssf")
    for method in ("bitfit", "lora"):
        with pytest.raises(InputError, match="already has an adapter"):
            apply_adapter(model, method)


def test_unknown_settings_in_a_file_are_dropped_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="from_the_future"):
        config = SSFConfig.from_dict({"method": "ssf", "init_std": 0.5, "targets": ["qkv"], "from_the_future": 1})
    assert config == SSFConfig(init_std=0.5, targets=("qkv",))


def test_methods_from_outside_the_package() -> None:
    @dataclass(frozen=True)
    class OutsideConfig(AdapterConfig):
        pass

    @register_adapter("outside_test")
    class Outside(BitFit):
        config_class = OutsideConfig

    try:
        adapter = apply_adapter(contract.build("vit"), "outside_test")
        assert isinstance(adapter, Outside)
        with pytest.raises(InputError, match="already registered"):
            register_adapter("outside_test")(type("Other", (BitFit,), {"config_class": OutsideConfig}))
    finally:
        ADAPTERS._known.pop("outside_test")


def test_official_parameter_counts_of_ssf() -> None:
    import timm

    for name, kwargs, count in (
        ("vit_base_patch16_224", {}, 205_824), ("vit_tiny_patch16_224", {}, 51_456), ("swin_base_patch4_window7_224", {}, 267_264),
        ("convnext_base", {}, 255_232),
    ):  # fmt: skip
        with torch.device("meta"):
            model = timm.create_model(name, **kwargs)
            adapter = apply_adapter(model, "ssf")
        assert adapter.num_parameters() == count, name


@pytest.mark.parametrize("method", ["ssf", "lora"])
def test_half_files_are_half_as_large_and_nearly_exact(method: str, tmp_path: Path) -> None:
    adapter = apply_adapter(contract.build("vit"), method)
    for p in adapter.parameters():
        nn.init.normal_(p)
    sizes = [
        sum(v.nbytes for v in load_file(save_adapter(adapter, tmp_path / str(half), half=half) / "adapter_model.safetensors").values())
        for half in (False, True)
    ]  # fmt: skip
    assert sizes[0] == 2 * sizes[1]
    exact, near = (load_adapter(contract.build("vit"), tmp_path / str(half)).state_dict() for half in (False, True))
    assert all(torch.equal(v, exact[k]) for k, v in adapter.state_dict().items())
    for k, v in adapter.state_dict().items():
        torch.testing.assert_close(near[k], v, rtol=2**-11, atol=1e-7)
    next(iter(adapter.parameters())).data.fill_(1e6)
    with pytest.raises(InputError, match="65504"):
        save_adapter(adapter, tmp_path / "large", half=True)
    assert not (tmp_path / "large").exists()
