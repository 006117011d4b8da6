"""The adapter contract, checked for every registered method on every backbone family it supports."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import contract
import pytest
import torch
from contract import CASES, IDS, ROWS, Row
from torch import nn

from mmkit.adapters import apply_adapter, attached_adapters, list_adapters, load_adapter, save_adapter
from mmkit.adapters.peft import METHODS as PEFT_METHODS
from mmkit.errors import NotMergeableError

cases = pytest.mark.parametrize(("family", "row"), CASES, ids=IDS)


def count_hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + any(k.startswith("forward") for k in m.__dict__)
        for m in model.modules()
    )


def frozen(model: nn.Module) -> nn.Module:
    """Frozen as under an adapter: torch may take another kernel when weights need gradients."""
    return model.requires_grad_(False)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_every_registered_method_has_a_row() -> None:
    builtin = {r.method for r in ROWS} | set(PEFT_METHODS)  # they share one class: tests/adapters/test_peft.py
    builtin |= {"idpt"}  # never an identity, its head is a new one: tests/pointcloud/test_point_peft.py
    assert builtin >= set(list_adapters()), "add a row for the new method in contract.py"


@cases
def test_identity_start_disabled_and_detach(family: str, row: Row) -> None:
    model, x = frozen(contract.build(family)), contract.inputs(family)
    before, types = snapshot(model), [type(m) for m in model.modules()]
    base = contract.run(model, x)
    adapter = contract.attach(model, family, row)
    torch.testing.assert_close(contract.run(model, x), base, atol=1e-6, rtol=1e-6)
    contract.randomise(adapter, row.random_scale)
    assert (contract.run(model, x) - base).abs().max() > 1e-4, "a silent no-op"
    with adapter.disabled():
        torch.testing.assert_close(contract.run(model, x), base, atol=1e-6, rtol=1e-6)
    assert list(model.state_dict()) == list(before), "base keys must not change while attached"
    moved = contract.run(model, x)
    adapter.detach()
    assert torch.equal(contract.run(model, x), base)
    assert count_hooks(model) == 0
    assert [type(m) for m in model.modules()] == types
    assert attached_adapters(model) == {}
    assert_unchanged(model, before)
    adapter.attach(model)
    assert torch.equal(contract.run(model, x), moved), "a detached adapter can be attached again"


@cases
def test_only_the_adapter_is_trained(family: str, row: Row) -> None:
    model, x = contract.build(family), contract.inputs(family)
    before = snapshot(model)
    adapter = contract.attach(model, family, row, head=True)
    contract.randomise(adapter, row.random_scale)
    own = {id(p) for p in adapter.parameters()}
    contract.run(model, x).square().mean().backward()
    named = adapter.trainable_parameters()
    assert named
    skip = {k for k, _ in named if row.method == "gmm" and k.startswith("blocks.1.")}  # last layer, class-token pooling
    unused = contract.UNUSED.get(family)
    skip |= {k for k, _ in named if unused and unused.search(k)}
    dead = [k for k, p in named if (p.grad is None or p.grad.abs().max() == 0) and k not in skip]
    assert not dead
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)
    torch.optim.SGD(adapter.parameters(), lr=0.1).step()
    assert_unchanged(model, before)
    adapter.detach()
    assert_unchanged(model, before)
    assert all(p.requires_grad for p in model.parameters())


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_merge_and_unmerge(family: str, row: Row, dtype: torch.dtype, tolerance: float) -> None:
    model, x = frozen(contract.build(family).to(dtype)), contract.inputs(family)
    before, base = snapshot(model), contract.run(model, x)
    adapter = contract.attach(model, family, row, head=True)
    if dtype == torch.float64:
        adapter.to(dtype)
        model.to(dtype)
    contract.randomise(adapter, row.random_scale)
    expected = contract.run(model, x)
    if not row.mergeable:
        assert not adapter.mergeable
        with pytest.raises(NotMergeableError):
            adapter.merge()
        assert torch.equal(contract.run(model, x), expected)
        return
    assert adapter.mergeable
    adapter.merge()
    assert count_hooks(model) == 0 or row.stays_after_merge
    scale = max(1.0, float(expected.abs().max()))
    assert (contract.run(model, x) - expected).abs().max() <= tolerance * scale
    assert [k for k in model.state_dict() if k in before] == list(before), "no key of the base may be lost or renamed"
    adapter.unmerge()
    assert torch.equal(contract.run(model, x), expected), "unmerge restores bit-exactly"
    adapter.merge()
    adapter.detach()
    assert_unchanged(model, before)
    assert torch.equal(contract.run(model, x), base)


@cases
def test_copies_and_half_precision(family: str, row: Row) -> None:
    model, x = contract.build(family), contract.inputs(family)
    adapter = contract.attach(model, family, row, head=True)
    contract.randomise(adapter, row.random_scale)
    expected = contract.run(model, x)
    copied = copy.deepcopy(model)
    pickled = pickle.load(io.BytesIO(pickle.dumps(model)))
    for other in (copied, pickled):
        torch.testing.assert_close(contract.run(other, x), expected, atol=1e-6, rtol=1e-6)
        (twin,) = attached_adapters(other).values()
        assert twin is not adapter
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.5)
        torch.testing.assert_close(contract.run(model, x), expected, atol=1e-6, rtol=1e-6)  # nothing is shared
        twin.detach()
        assert count_hooks(other) == 0
    adapter.detach()
    model.to(torch.bfloat16)
    half = contract.attach(model, family, row, name="half", head=True)
    assert contract.run(model, x).dtype == torch.bfloat16
    assert {p.dtype for _, p in half.trainable_parameters()} == {torch.float32}  # as gradient scalers want them


@cases
def test_two_adapters_act_in_the_order_of_attachment(family: str, row: Row) -> None:
    if not row.stackable:
        pytest.skip("two of this kind on one model make no sense")
    x = contract.inputs(family)
    model = frozen(contract.build(family))
    before = snapshot(model)
    first = contract.attach(model, family, row, name="first")
    contract.randomise(first, row.random_scale, seed=5)
    alone = contract.run(model, x)
    second = contract.attach(model, family, row, name="second")
    contract.randomise(second, row.random_scale, seed=6)
    both = contract.run(model, x)
    assert (both - alone).abs().max() > 1e-5
    with second.disabled():
        torch.testing.assert_close(contract.run(model, x), alone, atol=1e-5, rtol=1e-4)
    if row.depends_on_weights:
        with pytest.raises(NotMergeableError, match="would not do what the adapter does"):
            first.merge()
        assert torch.equal(contract.run(model, x), both)
    elif row.mergeable:
        with pytest.raises(NotMergeableError, match="merge it first"):
            second.merge()
        first.merge()  # sequential application: the second now acts on a model that the first has become
        scale = max(1.0, float(both.abs().max()))
        assert (contract.run(model, x) - both).abs().max() <= 5e-5 * scale
        first.unmerge()  # the second stays above it
        assert torch.equal(contract.run(model, x), both)
    second.detach()
    first.detach()
    assert_unchanged(model, before)


COMPILED = {
    name for i, name in enumerate(IDS) if CASES[i][0] in ("vit", "dit") or CASES[i][1].method in ("ssf", "point_peft")
}
"""Compiling takes seconds: every method on one family, and every family with one method."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "row"),
    [c for c, i in zip(CASES, IDS, strict=True) if i in COMPILED],
    ids=sorted(COMPILED, key=IDS.index),
)
def test_compiled_equals_eager_in_one_graph(family: str, row: Row) -> None:
    model, x = frozen(contract.build(family)), contract.inputs(family)
    adapter = contract.attach(model, family, row, head=True)
    contract.randomise(adapter, row.random_scale)
    if family in row.compile_breaks:
        adapter.merge()
    expected = contract.run(model, x)
    torch._dynamo.reset()
    whole = family != "point"  # farthest points and neighbours are chosen outside the graph
    compiled = torch.compile(model, backend="aot_eager", fullgraph=whole)
    torch.testing.assert_close(contract.run(compiled, x), expected, atol=1e-4, rtol=1e-4)  # type: ignore[arg-type]


@pytest.mark.slow
def test_saved_adapters_load_in_a_fresh_process(tmp_path: Path) -> None:
    expected = {}
    for (family, row), name in zip(CASES, IDS, strict=True):
        model = contract.build(family)
        adapter = contract.attach(model, family, row, head=True)
        contract.randomise(adapter, row.random_scale)
        folder = save_adapter(adapter, tmp_path / name)
        assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}
        expected[name] = contract.run(model, contract.inputs(family)).detach()
    torch.save(expected, tmp_path / "expected.pt")
    script = (
        "import contract, json, sys, torch\nfrom mmkit.adapters import load_adapter\nroot = sys.argv[1]\n"
        "expected = torch.load(root + '/expected.pt', weights_only=True)\nout = {}\n"
        "for name, value in expected.items():\n"
        "    family = name.split('-')[0]\n    model = contract.build(family)\n    load_adapter(model, f'{root}/{name}')\n"
        "    out[name] = float((contract.run(model, contract.inputs(family)) - value).abs().max())\n"
        "print(json.dumps(out))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    errors = json.loads(result.stdout.splitlines()[-1])
    assert set(errors) == set(IDS)
    assert max(errors.values()) == 0.0, errors


@cases
def test_gradient_checkpointing_and_registration(family: str, row: Row) -> None:
    model, x = contract.build(family), contract.inputs(family)
    adapter = contract.attach(model, family, row)
    contract.randomise(adapter, row.random_scale)
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    model.train()
    contract.run(model, x).square().mean().backward()
    with_grad = [p for _, p in adapter.trainable_parameters() if p.grad is not None]
    assert with_grad
    keys = set(model.state_dict())
    with adapter.registered() as registered:
        inside = {id(p) for p in registered.parameters()}
        assert all(id(p) in inside for _, p in adapter.trainable_parameters())
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("family", ROWS[0].families)
def test_ssf_and_lora_stack_on_one_layer(family: str) -> None:
    x = contract.inputs(family)
    rows = {r.method: r for r in ROWS}
    for order in (("ssf", "lora"), ("lora", "ssf")):
        model = frozen(contract.build(family))
        before = snapshot(model)
        adapters = []
        for method in order:
            adapters.append(contract.attach(model, family, rows[method], name=method))
            contract.randomise(adapters[-1], 0.05)
        both = contract.run(model, x)
        adapters[0].merge()
        scale = max(1.0, float(both.abs().max()))
        assert (contract.run(model, x) - both).abs().max() <= 5e-5 * scale
        adapters[1].merge()
        assert (contract.run(model, x) - both).abs().max() <= 5e-5 * scale
        adapters[1].unmerge()
        adapters[1].detach()
        adapters[0].detach()
        assert_unchanged(model, before)


def test_timm_ema_follows_a_registered_adapter() -> None:
    from timm.utils import ModelEmaV3

    model, x = contract.build("vit"), contract.inputs("vit")
    adapter = apply_adapter(model, "ssf")
    with adapter.registered():
        ema = ModelEmaV3(model, decay=0.0)
        contract.randomise(adapter, 0.1)
        ema.update(model, step=1)
        torch.testing.assert_close(contract.run(ema.module, x), contract.run(model, x))


def test_plain_peft_reads_our_folder_and_we_read_theirs(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    x = contract.inputs("vit")
    model = contract.build("vit")
    adapter = apply_adapter(
        model, LoraConfig(r=4, target_modules=["qkv", "fc1"], modules_to_save=["head"], use_dora=True)
    )
    contract.randomise(adapter, 0.1)
    expected = contract.run(model, x)
    save_adapter(adapter, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(contract.build("vit"), str(tmp_path / "ours")).eval()
    assert torch.equal(contract.run(theirs, x), expected)

    plain = get_peft_model(
        contract.build("vit"), LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False)
    ).eval()
    plain.save_pretrained(str(tmp_path / "theirs"))
    other = contract.build("vit")
    load_adapter(other, tmp_path / "theirs")
    assert torch.equal(contract.run(other, x), contract.run(plain, x))
