"""No silent no-op: modules that are never called are named, and a compiled model never answers with a stale graph."""

from __future__ import annotations

import ast
from typing import Any

import contract
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.adapters import apply_adapter, set_active_adapters
from mmkit.backbones import create_backbone
from mmkit.errors import InputError

START = {"ssf": {"init_std": 0.0}}
READS_QKV = {  # families whose attention joins biases outside the projection and reads its weight
    "beit": ("beit_base_patch16_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2},
    ),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2}),
}


def _first_call(model: nn.Module, x: Tensor) -> str:
    try:
        model(x)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("method", ["lora", "ssf", "bitfit"])
@pytest.mark.parametrize("family", READS_QKV)
def test_what_attention_reads_without_calling_is_named_and_the_rest_can_be_had(family: str, method: str) -> None:
    name, settings = READS_QKV[family]
    torch.manual_seed(0)
    model = create_backbone(name, num_classes=3, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(1, 3, settings["img_size"], settings["img_size"])
    base = model(x)
    adapter = apply_adapter(model, method)
    problem = _first_call(model, x)
    if problem:
        assert not adapter.mergeable
        adapter.detach()
        adapter = apply_adapter(model, method, exclude=ast.literal_eval(problem.rpartition("exclude=")[2].rstrip(".")))
        assert not _first_call(model, x), "the message gives the way out"
    contract.randomise(adapter, 0.2)
    moved = model(x).detach()
    assert (moved - base).abs().max() > 1e-4
    for path in adapter.own_paths:  # each single site acts
        kept = {k: v.clone() for k, v in adapter.site(path).state_dict().items()}
        with torch.no_grad():
            for p in adapter.site(path).parameters():
                p.mul_(1.7).add_(0.1)
            assert not torch.equal(model(x), moved), path
        adapter.site(path).load_state_dict(kept)


class ReadsWeights(nn.Module):
    """`b` is read, `c` is skipped, `d` takes part by chance while training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.a(x), self.b.weight)
        return x if self.training else self.d(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["ssf", "lora"])
def test_the_first_call_names_weights_that_are_read_and_modules_that_are_skipped(method: str, training: bool) -> None:
    model = ReadsWeights().train(training)
    adapter = apply_adapter(model, method)
    with pytest.raises(InputError, match=r"\['b', 'c'\].*exclude=\('b', 'c'\)"):
        model(torch.zeros(1, 4))
    with pytest.raises(InputError, match="no effect"):
        adapter.check(torch.zeros(1, 4))
    adapter.detach()
    apply_adapter(model, method, exclude=("b", "c"))
    model(torch.zeros(1, 4))  # `d` is reached in an evaluation and therefore in order


def test_merge_wants_to_have_seen_the_model_at_work() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    adapter = apply_adapter(model, "ssf")
    with pytest.raises(InputError, match="run the model once"):
        adapter.merge()
    adapter.check(torch.zeros(1, 4))
    adapter.merge()
    known = create_backbone("tiny_vit")  # tells its example input, so that the check runs by itself
    apply_adapter(known, "ssf").merge()


def test_open_clips_attention_pool_is_named() -> None:
    model = create_backbone(
        "open_clip:RN50", vision_cfg={"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, embed_dim=8
    )
    adapter = apply_adapter(model, "lora", targets=("attnpool.*",))
    with pytest.raises(InputError, match=r"attnpool\.[qkv]_proj"):
        adapter.check(torch.zeros(1, 3, 32, 32))


def _way_out(problem: str) -> tuple[str, ...]:
    return ast.literal_eval(problem.rpartition("exclude=")[2].rstrip("."))


def test_the_way_out_leaves_out_no_more_than_what_is_never_called() -> None:
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    model = create_backbone("open_clip:coca_ViT-B-32", num_classes=3, embed_dim=32, vision_cfg=vision).eval()
    x = torch.randn(1, 3, 32, 32)
    adapter = apply_adapter(model, "lora")
    everywhere = set(adapter.own_paths)
    exclude = _way_out(_first_call(model, x))
    adapter.detach()
    adapter = apply_adapter(model, "lora", exclude=exclude)
    assert not _first_call(model, x)
    assert everywhere - set(adapter.own_paths) == {"tower.attn_pool.attn.out_proj"}


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_leaving_out_the_default_sites_takes_the_next_ones(method: str) -> None:
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    model = create_backbone("open_clip:RN50", vision_cfg=vision, embed_dim=8).eval()
    x, exclude = torch.zeros(1, 3, 32, 32), ()
    for _ in range(3):
        adapter = apply_adapter(model, method, exclude=exclude)
        if not (problem := _first_call(model, x)):
            break
        adapter.detach()
        exclude += _way_out(problem)
    assert not problem
    assert "layer1.0.conv1" in adapter.own_paths


@pytest.mark.parametrize("method", ["ssf", "lora"])
@pytest.mark.parametrize("padded", [False, True])
def test_torchs_transformer_acts_the_same_in_training_and_evaluation(method: str, padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False, False, False, True, True]]) if padded else None
    adapter = apply_adapter(model, method, targets=("linear1", "linear2", "self_attn.*"), **START.get(method, {}))
    contract.randomise(adapter, 0.3)
    seen = ~mask if mask is not None else torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        trained, evaluated = model.train()(x, src_key_padding_mask=mask), model.eval()(x, src_key_padding_mask=mask)
        torch.testing.assert_close(trained[seen], evaluated[seen], atol=1e-5, rtol=1e-4)
        with adapter.disabled():
            assert (model(x, src_key_padding_mask=mask)[seen] - evaluated[seen]).abs().max() > 1e-3


def _both(model: nn.Module, compiled: Any, x: Tensor) -> Tensor:
    eager = model(x)
    torch.testing.assert_close(compiled(x), eager, atol=1e-5, rtol=1e-4)
    return eager.detach()


@pytest.mark.slow
def test_a_model_that_was_compiled_before_follows_every_change() -> None:
    torch._dynamo.reset()
    model, (x,) = contract.build("vit").requires_grad_(False), contract.inputs("vit")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    base = _both(model, compiled, x)
    first = apply_adapter(model, "ssf", name="first", init_std=0.0)
    contract.randomise(first, 0.1, seed=1)
    one = _both(model, compiled, x)
    assert (one - base).abs().max() > 1e-3
    second = apply_adapter(model, "lora", name="second", r=2)
    contract.randomise(second, 0.1, seed=2)
    both = _both(model, compiled, x)
    set_active_adapters(model, "second")  # switched without attaching anything anew
    assert (_both(model, compiled, x) - both).abs().max() > 1e-3
    set_active_adapters(model, ["first", "second"])
    torch.testing.assert_close(_both(model, compiled, x), both)
    first.scale = 0.5
    half = _both(model, compiled, x)
    first.scale = 1.0
    assert (half - both).abs().max() > 1e-3
    first.merge()
    torch.testing.assert_close(_both(model, compiled, x), both, atol=2e-5, rtol=1e-4)
    first.unmerge()
    second.detach()
    torch.testing.assert_close(_both(model, compiled, x), one)
    first.detach()
    assert torch.equal(_both(model, compiled, x), base)
