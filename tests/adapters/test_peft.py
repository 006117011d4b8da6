"""peft's methods under the contract: attached without wrappers, in peft's own files, beside peft adapters of others."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import contract
import pytest
import torch
from torch import nn

from mmkit.adapters import apply_adapter, list_adapters, load_adapter, save_adapter
from mmkit.adapters.peft import METHODS
from mmkit.errors import CheckpointError, InputError, NotMergeableError
from mmkit.storage import read_tensors

SETTINGS: dict[str, dict[str, Any]] = {  # sizes that fit a width of 48
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 4},
    "fourierft": {"n_frequency": 20},
    "gralora": {"r": 4, "gralora_k": 2},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 4},
    "psoft": {"r": 4},
    "randlora": {"r": 4},
    "road": {"group_size": 8},
    "shira": {"r": 2},
    "waveft": {"n_frequency": 20},
}


def test_each_method_is_a_name_of_its_own() -> None:
    assert set(METHODS) <= set(list_adapters())
    with pytest.raises(InputError, match=r"no setting 'rank'.*'r'"):
        apply_adapter(contract.build("vit"), "lora", rank=4)
    adapter = apply_adapter(contract.build("vit"), "lora", r=3, alpha=6, dropout=0.1)
    assert adapter.peft_config.r == 3
    assert adapter.peft_config.lora_alpha == 6
    assert adapter.peft_config.lora_dropout == 0.1


@pytest.mark.parametrize("family", ["vit", "clip"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods_keep_the_contract(method: str, family: str, tmp_path: Path) -> None:
    model, x = contract.build(family).requires_grad_(False), contract.inputs(family)
    before, base = {k: v.clone() for k, v in model.state_dict().items()}, contract.run(model, x)
    adapter = apply_adapter(model, method, **SETTINGS.get(method, {}))
    assert list(model.state_dict()) == list(before)
    assert not [m for m in model.modules() if type(m).__module__.startswith("peft.")]
    torch.testing.assert_close(contract.run(model, x), base, atol=1e-5, rtol=1e-5)
    contract.randomise(adapter, 0.1)
    moved = contract.run(model, x)
    assert (moved - base).abs().max() > 1e-3
    moved.square().mean().backward()
    assert [k for k, p in adapter.trainable_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    other = contract.build(family).requires_grad_(False)
    load_adapter(other, save_adapter(adapter, tmp_path / "a")).load_state_dict(adapter.state_dict())
    assert torch.equal(contract.run(other, x), moved)
    adapter.merge()
    torch.testing.assert_close(contract.run(model, x), moved, atol=2e-5, rtol=1e-4)
    adapter.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(contract.run(model, x), base)


def test_plain_peft_reads_adapters_of_fused_attention(tmp_path: Path) -> None:
    from peft import PeftModel

    model, x = contract.build("clip"), contract.inputs("clip")
    adapter = apply_adapter(model, "lora", r=2, targets=("attn", "c_fc"), modules_to_save=("head",))
    assert adapter.own_paths[:2] == [f"tower.transformer.resblocks.0.attn.{p}" for p in ("out_proj", "in_proj")]
    contract.randomise(adapter, 0.1)
    expected = contract.run(model, x)
    folder = save_adapter(adapter, tmp_path / "a")
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == ["attn", "c_fc"]
    theirs = PeftModel.from_pretrained(contract.build("clip"), str(folder)).eval()
    torch.testing.assert_close(contract.run(theirs, x), expected, atol=1e-5, rtol=1e-4)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = contract.build("clip")
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(contract.run(again, x), expected, atol=1e-5, rtol=1e-4)


def test_oft_on_a_convolution_is_refused_because_a_fresh_one_changes_the_model() -> None:
    model = contract.build("vit")
    base = contract.run(model, contract.inputs("vit"))
    with pytest.raises(InputError, match=r"must leave the model as it is.*patch_embed\.proj"):
        apply_adapter(model, "oft", targets=("qkv", "proj"), oft_block_size=4)
    assert torch.equal(contract.run(model, contract.inputs("vit")), base)
    apply_adapter(model, "oft", targets=("qkv", "proj"), exclude=("patch_embed.proj",), oft_block_size=4)


def test_starts_that_rewrite_the_base_are_refused() -> None:
    for start in ("pissa", "pissa_niter_4", "olora"):
        with pytest.raises(InputError, match="would change the base weights"):
            apply_adapter(contract.build("vit"), "lora", init_lora_weights=start)
    with pytest.raises(InputError, match="bitfit"):
        apply_adapter(contract.build("vit"), "lora", bias="all")


@pytest.mark.parametrize("active", [True, False])
def test_adapters_that_others_put_on_the_model_stay_untouched(active: bool) -> None:
    from peft import LoraConfig

    unet, x = contract.build("unet"), contract.inputs("unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter_name="theirs")
    if not active:
        unet.disable_adapters()
    with torch.no_grad():
        before = contract.run(unet, x)
        keys = list(unet.state_dict())
        for method in ("lora", "ssf"):
            adapter = apply_adapter(
                unet, method, targets=("to_q", "to_out.0"), **({"init_std": 0.0} if method == "ssf" else {})
            )
            assert adapter.own_paths[0].endswith("attn1.to_q")
            torch.testing.assert_close(contract.run(unet, x), before, atol=1e-6, rtol=1e-6)
            contract.randomise(adapter, 0.1)
            moved = contract.run(unet, x)
            assert (moved - before).abs().max() > 1e-4
            if method == "lora":  # ssf would have to scale what the others add as well
                adapter.merge()
                torch.testing.assert_close(contract.run(unet, x), moved, atol=1e-5, rtol=1e-4)
            elif active:
                with pytest.raises(NotMergeableError, match="to_q"):
                    adapter.merge()
            adapter.detach()
            assert list(unet.state_dict()) == keys
            assert torch.equal(contract.run(unet, x), before)
        unet.enable_adapters()
        unet.set_adapter("theirs")
        assert unet.active_adapters() == ["theirs"]


def _hostile(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    (folder / "mmkit.json").unlink()
    return folder


def test_no_pattern_from_a_file_can_hang(tmp_path: Path) -> None:
    model = contract.build("vit")
    adapter = apply_adapter(model, "lora", r=2)
    evil = "(a|a?)+$" + "(.*a)*" * 10 + "b"
    started = time.process_time()
    _hostile(save_adapter(adapter, tmp_path / "a"), target_modules=evil, exclude_modules=evil)
    load_adapter(contract.build("vit"), tmp_path / "a")  # what is adapted is read from the tensors
    _hostile(save_adapter(adapter, tmp_path / "b"), rank_pattern={evil: 4})
    with pytest.raises(CheckpointError, match="not a plain module name"):
        load_adapter(contract.build("vit"), tmp_path / "b")
    assert time.process_time() - started < 20  # seconds where a backtracking match takes years


def test_files_of_another_model_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    adapter = apply_adapter(contract.build("vit"), "lora", r=2)
    folder = save_adapter(adapter, tmp_path / "a")
    resnet = contract.build("resnet")
    with pytest.raises(CheckpointError, match="another model"):
        load_adapter(resnet, folder)
    assert not [k for m in resnet.modules() for k in m.__dict__ if k.startswith(("forward", "_mmkit"))]
    assert set(read_tensors(folder / "adapter_model.safetensors")) >= {
        "base_model.model.blocks.0.attn.qkv.lora_A.weight"
    }


def test_projections_of_these_names_need_not_be_an_attentions(tmp_path: Path) -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"in_proj": nn.Linear(4, 4), "out_proj": nn.Linear(4, 4)})

    model, other = nn.ModuleDict({"block": block()}), nn.ModuleDict({"block": block()})
    adapter = apply_adapter(model, "lora", r=2)
    contract.randomise(adapter, 0.1)
    loaded = load_adapter(other, save_adapter(adapter, tmp_path / "a"))
    assert all(torch.equal(v, adapter.state_dict()[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("targets", [None, ("blocks.0.*.qkv",)])
def test_a_deeper_model_is_told_and_one_with_more_left_out_is_not(
    targets: tuple[str, ...] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same, deeper = contract.build("vit"), contract.build("vit")
    deeper.blocks.append(copy.deepcopy(deeper.blocks[0]))
    folder = save_adapter(apply_adapter(contract.build("vit"), "lora", r=2, targets=targets), tmp_path / "a")
    load_adapter(same, folder)
    if targets:
        load_adapter(deeper, folder)
    else:
        with pytest.raises(CheckpointError, match=r"name 2 more modules here.*blocks\.2\.attn\.qkv"):
            load_adapter(deeper, folder)
        load_adapter(deeper, folder, strict=False)
        assert "They are not adapted" in caplog.text


def test_dropout_follows_the_mode_of_the_model(tmp_path: Path) -> None:
    model, x = contract.build("vit"), contract.inputs("vit")
    adapter = apply_adapter(model, "lora", dropout=0.5)
    contract.randomise(adapter, 0.2)
    assert torch.equal(contract.run(model, x), contract.run(model, x))
    loaded = contract.build("vit")
    load_adapter(loaded, save_adapter(adapter, tmp_path / "a"))
    assert torch.equal(contract.run(loaded, x), contract.run(loaded, x))
    loaded.train()
    assert not torch.equal(contract.run(loaded, x), contract.run(loaded, x))


def test_attaching_does_not_touch_modules_it_does_not_adapt() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    adapter = apply_adapter(model, "lora", targets=("0",), r=2)
    assert adapter.own_paths == ["0"]
    assert "forward" not in model[2].__dict__


def test_a_peft_config_means_what_it_means_to_peft() -> None:
    from peft import LoraConfig

    def paths(**settings: Any) -> list[str]:
        return apply_adapter(contract.build("vit"), LoraConfig(r=2, **settings)).own_paths

    ours, projections = [f"blocks.{i}.attn.qkv" for i in range(2)], [f"blocks.{i}.attn.proj" for i in range(2)]
    assert paths(target_modules=["qkv"]) == ours
    assert paths(target_modules=["proj"], exclude_modules=["patch_embed.proj"]) == projections
    assert paths(target_modules=r"blocks\.1\.attn\.(qkv|proj)") == [ours[1], projections[1]]
    with pytest.raises(InputError, match="layers_to_transform"):
        paths(target_modules=["qkv"], layers_to_transform=[0])


@pytest.mark.parametrize("method", ["lora", "oft", "ia3"])
def test_one_projection_of_an_attention_is_adapted_saved_and_loaded_alone(method: str, tmp_path: Path) -> None:
    model, (x,) = contract.build("clip"), contract.inputs("clip")
    adapter = apply_adapter(model, method, exclude=("out_proj",))
    assert all(p.endswith("attn.in_proj") for p in adapter.own_paths)
    contract.randomise(adapter, 0.1)
    save_adapter(adapter, tmp_path / "a")
    other = contract.build("clip")
    loaded = load_adapter(other, tmp_path / "a")
    assert loaded.own_paths == adapter.own_paths
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("method", ["oft", "gralora", "lora"])
def test_layers_that_get_nothing_or_more_axes_than_peft_expects_answer(method: str) -> None:
    """SAM's prompt tokens can be none, and its windows have four axes."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(2, 3, 4, 64)
    adapter = apply_adapter(model, method, targets="*")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
        torch.testing.assert_close(model(x), model(x.flatten(1, 2)).unflatten(1, (3, 4)))
        assert model(x[:, :0]).shape == (2, 0, 4, 64)
