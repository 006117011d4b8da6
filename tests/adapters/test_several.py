"""Several adapters on one model: any order of merging, unmerging and detaching is exact or refused by name."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import contract
import pytest
import torch
from torch import Tensor, nn

from mmkit.adapters import (
    Adapter,
    apply_adapter,
    attached_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    set_active_adapters,
)
from mmkit.backbones import create_backbone
from mmkit.errors import CheckpointError, InputError, MMKitError, NotMergeableError

SETTINGS = {
    "ssf": {"init_std": 0.0, "targets": ("qkv", "fc1", "norm1")},
    "lora": {"r": 2, "targets": ("qkv", "fc1")},
    "dora": {"r": 2, "targets": ("qkv", "proj"), "exclude": ("patch_embed.proj",)},
    "bitfit": {"targets": ("qkv", "fc2")},
    "gmm": {},
    "linear_probe": {},
}
PAIRS = [p for p in itertools.combinations_with_replacement(SETTINGS, 2) if p != ("linear_probe", "linear_probe")]
MOVES = ("merge", "unmerge", "detach")


def _model() -> nn.Module:
    return contract.build("vit").requires_grad_(False)


def _attach(model: nn.Module, method: str, name: str, seed: int) -> Adapter:
    torch.manual_seed(seed)
    adapter = apply_adapter(model, method, name=name, **SETTINGS[method])
    contract.randomise(adapter, 0.1, seed=seed)
    return adapter


def _try(adapter: Adapter, move: str) -> str:
    try:
        getattr(adapter, move)()
    except MMKitError as error:
        return str(error)
    return ""


QUICK = {("ssf", "lora")}


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [pytest.param(*p, 2, id=f"{p[0]}+{p[1]}-2") for p in PAIRS if p in QUICK]
    + [pytest.param(*p, 3, id=f"{p[0]}+{p[1]}-3", marks=pytest.mark.slow) for p in PAIRS],
)
def test_every_order_of_two_adapters_is_exact_or_refused(first: str, second: str, length: int) -> None:
    (x,) = contract.inputs("vit")
    model = _model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = {frozenset(): model(x)}  # what the model computes with these adapters on it
    adapters = {"a": _attach(model, first, "a", 1)}
    expected[frozenset("a")] = model(x)
    adapters["b"] = _attach(model, second, "b", 2)
    expected[frozenset("ab")] = model(x)
    adapters["a"].detach()
    expected[frozenset("b")] = model(x)
    adapters["b"].detach()
    done = refused = 0
    ended: set[tuple[Any, ...]] = set()  # beginnings whose continuations equal shorter orders
    for order in itertools.product(itertools.product("ab", MOVES), repeat=length):
        if any(order[:k] in ended for k in range(1, length)):
            continue
        adapters["a"].attach(model)
        adapters["b"].attach(model)
        on = set("ab")
        for k, (who, what) in enumerate(order, 1):
            if who not in on:
                ended.add(order[:k])
            else:
                problem = _try(adapters[who], what)
                assert not problem or len(problem) > 20
                done, refused = done + (not problem), refused + bool(problem)
                ended |= {order[:k]} if problem and k > 1 else set()
                on -= {who} if what == "detach" and not problem else set()
                torch.testing.assert_close(model(x), expected[frozenset(on)], atol=3e-5, rtol=1e-3)
        for who in sorted(on, key=lambda w: -adapters[w]._merge_order):
            adapters[who].detach()
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(v, before[k]) for k, v in after.items())
        assert torch.equal(model(x), expected[frozenset()])
    assert done
    assert refused


def test_disabled_means_the_same_attached_merged_and_nested() -> None:
    model, (x,) = _model(), contract.inputs("vit")
    base = model(x)
    adapter = _attach(model, "lora", "a", 1)
    moved = model(x)
    with adapter.disabled():
        assert torch.equal(model(x), base)
        with adapter.disabled():
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base), "the inner block restores what it found"
    assert torch.equal(model(x), moved)
    adapter.merge()
    merged = model(x)
    with adapter.disabled():
        assert torch.equal(model(x), base)
        assert not adapter.merged
    assert adapter.merged
    assert torch.equal(model(x), merged)
    with pytest.raises(RuntimeError, match="inside"), adapter.disabled():
        raise RuntimeError("inside")
    assert torch.equal(model(x), merged)
    second = _attach(model, "lora", "b", 2)
    second.merge()
    with pytest.raises(InputError, match="'b' was merged after 'a'"), adapter.disabled():
        pass


@pytest.mark.parametrize("method", ["ssf", "lora", "dora", "bitfit"])
def test_scale_means_the_same_attached_and_merged(method: str) -> None:
    model, (x,) = _model(), contract.inputs("vit")
    base = model(x)
    adapter = _attach(model, method, "a", 1)
    full = model(x)
    for scale in (0.0, 0.4, 1.0, 1.6):
        adapter.scale = scale
        attached = model(x)
        adapter.merge()
        torch.testing.assert_close(model(x), attached, atol=3e-5, rtol=1e-3)
        adapter.unmerge()
        assert torch.equal(model(x), attached)
        adapter.merge(scale=scale)
        torch.testing.assert_close(model(x), attached, atol=3e-5, rtol=1e-3)
        adapter.scale = 1.0  # merged: folded anew
        torch.testing.assert_close(model(x), full, atol=3e-5, rtol=1e-3)
        adapter.unmerge()
        if scale == 0.0:
            torch.testing.assert_close(attached, base, atol=1e-6, rtol=1e-5)


def test_scale_moves_heads_as_well() -> None:
    model, (x,) = _model(), contract.inputs("vit")
    base = model(x)
    probe = _attach(model, "linear_probe", "a", 1)
    full = model(x)
    probe.scale = 0.25
    torch.testing.assert_close(model(x), base + 0.25 * (full - base), atol=1e-5, rtol=1e-4)
    probe.merge()
    torch.testing.assert_close(model(x), base + 0.25 * (full - base), atol=1e-5, rtol=1e-4)


def test_the_active_set_is_switched_without_attaching_anew() -> None:
    model, (x,) = _model(), contract.inputs("vit")
    base = model(x)
    a, _ = _attach(model, "lora", "a", 1), _attach(model, "lora", "b", 2)
    sites = [id(a.site(p)) for p in a.own_paths]
    both = model(x)
    set_active_adapters(model, "a")
    only_a = model(x)
    set_active_adapters(model, ["b"])
    only_b = model(x)
    set_active_adapters(model, [])
    assert torch.equal(model(x), base)
    set_active_adapters(model, ("a", "b"))
    assert torch.equal(model(x), both)
    assert len({float(o.sum()) for o in (base, both, only_a, only_b)}) == 4
    assert [id(a.site(p)) for p in a.own_paths] == sites
    a.merge()
    set_active_adapters(model, "b")
    assert torch.equal(model(x), only_b)
    with pytest.raises(InputError, match=r"no adapter 'c'.*'a'"):
        set_active_adapters(model, ["a", "c"])
    assert torch.equal(model(x), only_b)
    with pytest.raises(NotMergeableError, match="disabled"):
        a.merge()


def test_several_are_merged_with_weights_or_none_is() -> None:
    model, (x,) = _model(), contract.inputs("vit")
    base = model(x)
    a, b = _attach(model, "lora", "a", 1), _attach(model, "ssf", "b", 2)
    a.scale, b.scale = 0.7, 0.3
    want = model(x)
    a.scale = b.scale = 1.0
    merge_adapters(model, {"a": 0.7, "b": 0.3})
    torch.testing.assert_close(model(x), want, atol=3e-5, rtol=1e-3)
    a_still_there = list(attached_adapters(model).values())
    assert a_still_there == [a, b]
    b.detach()
    a.detach()
    assert torch.equal(model(x), base)
    a, g = _attach(model, "lora", "a", 1), _attach(model, "gmm", "g", 2)
    before = model(x)
    with pytest.raises(NotMergeableError):
        merge_adapters(model)
    assert not a.merged
    assert not g.merged
    assert torch.equal(model(x), before)


def test_sites_and_saved_modules_do_not_swallow_each_other() -> None:
    model = _model()
    adapter = apply_adapter(model, "ssf", targets=("*",), modules_to_save=("head", "blocks.1"))
    assert not [p for p in adapter.own_paths if p.startswith(("head", "blocks.1"))]
    assert {k for k in adapter.state_dict() if k.startswith("head.")} == {"head.weight", "head.bias"}
    contract.randomise(adapter, 0.1)
    adapted = model(contract.inputs("vit")[0])
    adapter.merge()
    torch.testing.assert_close(model(contract.inputs("vit")[0]), adapted, atol=2e-5, rtol=1e-3)
    adapter.detach()
    with pytest.raises(InputError, match=r"'blocks\.0\.attn' lies inside 'blocks\.0'"):
        apply_adapter(model, "ssf", modules_to_save=("blocks.0.attn", "blocks.0"))
    assert attached_adapters(model) == {}


def test_a_module_that_is_replaced_whole_and_one_inside_it_are_refused() -> None:
    model = _model()
    inner = apply_adapter(model, "lora", name="inner", r=2, targets=("blocks.1.attn.qkv",))
    with pytest.raises(InputError, match=r"would replace 'attn\.qkv' inside it"):
        apply_adapter(model, "linear_probe", name="whole", modules_to_save=("blocks.1",))
    inner.detach()
    apply_adapter(model, "linear_probe", name="whole", modules_to_save=("blocks.1",))
    with pytest.raises(InputError, match=r"lies inside 'blocks\.1', which adapter 'whole' answers"):
        apply_adapter(model, "lora", name="inner", r=2, targets=("blocks.1.attn.qkv",))
    assert list(attached_adapters(model)) == ["whole"]


def test_a_trained_copy_does_not_bring_another_adapter_along() -> None:
    model, (x,) = _model(), contract.inputs("vit")
    first = _attach(model, "linear_probe", "first", 1)
    alone = model(x)
    second = apply_adapter(model, "linear_probe", name="second")
    assert torch.equal(second.saved["head"].weight, model.head.weight), (
        "a copy of the base, not of what another made of it"
    )
    assert not any("forward" in m.__dict__ for m in second.saved.modules())
    contract.randomise(second, 0.3)
    set_active_adapters(model, "first")
    assert torch.equal(model(x), alone)
    second.detach()
    first.detach()


def test_a_failed_attach_leaves_adapter_and_model_as_they_were() -> None:
    from mmkit.adapters.ssf import SSF, SSFConfig

    class Breaks(SSF):
        broken = True

        def install(self, model: nn.Module) -> None:
            super().install(model)
            if self.broken:
                raise RuntimeError("half way")

    model = _model()
    keys, places = dict(model.state_dict()), {k: set(m.__dict__) for k, m in model.named_modules()}
    adapter = Breaks(SSFConfig(init_std=0.0, modules_to_save=("head",)))
    with pytest.raises(RuntimeError, match="half way"):
        adapter.attach(model)
    assert {k: set(m.__dict__) for k, m in model.named_modules()} == places
    assert all(model.state_dict()[k] is not None for k in keys)
    assert not len(adapter.sites)
    assert not len(adapter.saved)
    assert not adapter.attached
    small = create_backbone(
        "vit_tiny_patch16_224", num_classes=5, img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2
    )
    adapter.broken = False
    adapter.attach(small)  # a retry builds again, here for another model
    assert adapter.site("blocks.0.attn.qkv").scale.numel() == 96
    adapter.detach()
    with pytest.raises(InputError, match=r"made for another model.*blocks\.0\.attn\.qkv"):
        adapter.attach(model)
    adapter.attach(small)


def test_loading_while_merged_is_refused_and_misfits_load_nothing() -> None:
    model = _model()
    adapter = _attach(model, "ssf", "a", 1)
    state = {k: v.clone() for k, v in adapter.state_dict().items()}
    adapter.merge()
    with pytest.raises(InputError, match="unmerge"):
        adapter.load_state_dict(state)
    adapter.unmerge()
    for changed in (
        {**state, "extra": torch.zeros(1)},
        {k: v[:1] for k, v in state.items()},
        dict(list(state.items())[1:]),
    ):
        with pytest.raises(CheckpointError, match="do not fit"):
            adapter.load_state_dict({k: v * 2 for k, v in changed.items()})
        assert all(torch.equal(v, state[k]) for k, v in adapter.state_dict().items())


def test_loading_in_part_says_what_stays_as_it_was_initialised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = apply_adapter(_model(), "ssf", targets=("qkv",), init_std=0.1)
    folder = save_adapter(adapter, tmp_path / "a")
    deeper = create_backbone(
        "vit_tiny_patch16_224", num_classes=5, img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4
    )
    with pytest.raises(CheckpointError, match="does not fit"):
        load_adapter(deeper, folder)
    assert attached_adapters(deeper) == {}
    with caplog.at_level(logging.WARNING):
        loaded = load_adapter(deeper, folder, strict=False)
    assert "2 sites missing ['blocks.2.attn.qkv.scale', 'blocks.2.attn.qkv.shift']" in caplog.text
    assert torch.equal(loaded.site("blocks.0.attn.qkv").scale, adapter.site("blocks.0.attn.qkv").scale)
    with pytest.raises(CheckpointError, match="does not fit"):  # nothing at all fits
        load_adapter(contract.build("resnet"), folder, strict=False)


def test_frozen_statistics_stay_in_anybodys_training_loop(tmp_path: Path) -> None:
    model = contract.build("resnet")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    adapter = apply_adapter(model, "ssf", init_std=0.0, modules_to_save=("head",))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        model(torch.randn(4, 3, 64, 64) * 3 + 1).square().mean().backward()
        optimizer.step()
    model.eval()
    x = torch.randn(2, 3, 64, 64)
    want = model(x)
    fresh = contract.build("resnet")
    load_adapter(fresh, save_adapter(adapter, tmp_path / "a"))
    assert torch.equal(fresh(x), want)
    model.train()
    adapter.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules()), "modes are what they would have been"
    model(x)
    assert not torch.equal(model.state_dict()["bn1.running_mean"], before["bn1.running_mean"])


def test_other_buffers_that_training_moves_come_back() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x)

    model = Counts()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = apply_adapter(model, "bitfit")
    for _ in range(3):
        model(torch.randn(2, 4))
    adapter.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
