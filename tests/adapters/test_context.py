"""One context per call: gates per row, timesteps, frames, grids and token layouts reach adapters, and nothing stays behind."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contract
import pytest
import torch
from torch import Tensor, nn

from mmkit.adapters import (
    Adapter,
    AdapterConfig,
    ForwardContext,
    apply_adapter,
    attached_adapters,
    current_context,
    forward_context,
    hooks,
    load_adapter,
    save_adapter,
)
from mmkit.backbones import create_backbone
from mmkit.errors import InputError


def _swin() -> nn.Module:
    torch.manual_seed(1)
    model = create_backbone(
        "swin_tiny_patch4_window7_224",
        num_classes=5,
        img_size=32,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 2),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval().requires_grad_(False)


BUILD = {"vit": lambda: contract.build("vit").requires_grad_(False), "swin": _swin}


@pytest.mark.parametrize("method", ["ssf", "lora", "bitfit"])
@pytest.mark.parametrize("family", BUILD)
def test_gates_act_per_row_also_where_windows_multiply_rows(family: str, method: str) -> None:
    model, x = BUILD[family](), torch.randn(3, 3, 32, 32)
    base = model(x)
    adapter = apply_adapter(model, method, name="style", **({"init_std": 0.0} if method == "ssf" else {}))
    contract.randomise(adapter, 0.1)
    full = model(x)
    with forward_context(gates={"style": torch.tensor([0.0, 1.0, 0.5])}):
        got = model(x)
    torch.testing.assert_close(got[0], base[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(got[1], full[1], atol=2e-5, rtol=1e-4)
    adapter.scale = 0.5
    half = model(x)
    torch.testing.assert_close(got[2], half[2], atol=2e-5, rtol=1e-4)
    with forward_context(gates={"style": 2.0}):  # a gate multiplies the scale
        torch.testing.assert_close(model(x), full, atol=2e-5, rtol=1e-4)
    with forward_context(gates={"another": torch.zeros(3)}):
        assert torch.equal(model(x), half)
    with forward_context(gates={"style": torch.ones(2)}), pytest.raises(InputError, match="one value per row"):
        model(x)
    assert current_context() is None


def test_attention_that_is_not_batch_first_gates_its_second_axis() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = x.transpose(0, 1)  # (L, B, E)
            return self.attn(y, y, y, need_weights=False)[0].transpose(0, 1)

    model, x = Attends().eval().requires_grad_(False), torch.randn(2, 4, 8)
    base = model(x)
    contract.randomise(apply_adapter(model, "lora", targets=("attn",), r=2), 0.3)
    full = model(x)
    with forward_context(gates={"default": torch.tensor([0.0, 1.0])}):
        got = model(x)
    torch.testing.assert_close(got[0], base[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[1], full[1], atol=1e-5, rtol=1e-4)


# --- tiny methods that need more than their module's output ---------------------------------------------------------------


class _AtTimestep(hooks.Action):
    """Shifts the output of a linear layer by a learnt amount for early timesteps only."""

    def __init__(self, site: nn.Module):
        self.site = site
        self.modules = (site,)

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        y = below(*args, **kwargs)
        context = current_context()
        assert context is not None
        early = (torch.as_tensor(context.timestep) < 5).to(y.dtype).reshape(-1)
        early = early.expand(context.rows) if early.numel() == 1 else early
        rows = early.repeat_interleave(y.shape[0] // early.shape[0]).view(-1, *(1,) * (y.dim() - 1))
        return y + rows * self.site.weight


@dataclass(frozen=True)
class _TimedConfig(AdapterConfig):
    pass


class Timed(Adapter):
    """A timestep-dependent method."""

    config_class = _TimedConfig

    def build(self, model: nn.Module) -> None:
        for path, module in hooks.named_plain_modules(model):
            if path.endswith(("to_q", "attn1.to_q")) and isinstance(module, nn.Linear):
                site = nn.Module()
                site.weight = nn.Parameter(torch.zeros(module.out_features))
                self.add_site(path, site)

    def install(self, model: nn.Module) -> None:
        for path in self.own_paths:
            self.link(model, path, _AtTimestep(self.site(path)))


def _dit() -> nn.Module:
    torch.manual_seed(1)
    model = create_backbone(
        "diffusers:DiTTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_type="ada_norm_zero",
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_timestep_dependent_method_sees_the_timestep_of_the_call(kind: str) -> None:
    model = contract.build("unet") if kind == "unet" else _dit()
    x = torch.randn(2, 4, 8, 8)
    text = torch.randn(2, 3, 12)
    late, mixed = torch.tensor([8, 9]), torch.tensor([2, 9])

    def run(t: Tensor, positional: bool) -> Tensor:
        if kind == "unet":
            return (model(x, t, text) if positional else model(sample=x, timestep=t, encoder_hidden_states=text)).sample
        labels = torch.tensor([1, 2])
        return (model(x, t, labels) if positional else model(hidden_states=x, timestep=t, class_labels=labels)).sample

    with torch.no_grad():
        base_late, base_mixed = run(late, True), run(mixed, True)
        adapter = Timed(_TimedConfig()).attach(model)
        contract.randomise(adapter, 1.0)
        for positional in (True, False):
            assert torch.equal(run(late, positional), base_late)
            moved = run(mixed, positional)
            assert (moved[0] - base_mixed[0]).abs().max() > 1e-4
            torch.testing.assert_close(moved[1], base_mixed[1], atol=1e-5, rtol=1e-5)
        adapter.detach()
        assert torch.equal(run(mixed, True), base_mixed)


class _Prompt(hooks.Action):
    """Puts learnt tokens in front of what a block sees and takes them away behind it."""

    def __init__(self, site: nn.Module):
        self.site = site
        self.modules = (site,)

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, tokens = args[0], self.site.tokens
        context = current_context()
        assert context is not None
        context.extra_tokens += tokens.shape[0]
        try:
            y = below(torch.cat([tokens.expand(x.shape[0], -1, -1), x], 1), *args[1:], **kwargs)
        finally:
            context.extra_tokens -= tokens.shape[0]
        return y[:, tokens.shape[0] :]


class Prompts(Adapter):
    """Visual prompts in every block (VPT-deep)."""

    def build(self, model: nn.Module) -> None:
        for i, _ in enumerate(model.blocks):
            site = nn.Module()
            site.tokens = nn.Parameter(torch.zeros(3, model.embed_dim))
            self.add_site(f"blocks.{i}", site)

    def install(self, model: nn.Module) -> None:
        for path in self.own_paths:
            self.link(model, path, _Prompt(self.site(path)), slot="prompts")

    def starts_as_identity(self) -> bool:
        return False


@pytest.mark.parametrize("order", [("gmm", "prompts"), ("prompts", "gmm")])
def test_prompt_tokens_live_beside_masks_and_forward_intermediates(order: tuple[str, ...]) -> None:
    model = create_backbone(
        "vit_tiny_patch16_224",
        num_classes=5,
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=4,
        dynamic_img_size=True,
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    x = torch.randn(2, 3, 32, 48)  # another grid than the one it was built for
    with torch.no_grad():
        base = model(x)
        adapters: dict[str, Adapter] = {}
        for name in order:
            adapters[name] = (
                apply_adapter(model, "gmm", name="gmm") if name == "gmm" else Prompts(name="prompts").attach(model)
            )
        for a in adapters.values():
            contract.randomise(a, 0.5)
        both = model(x)
        with adapters["prompts"].disabled():
            masked = model(x)
        with adapters["gmm"].disabled():
            prompted = model(x)
        assert min((both - o).abs().max() for o in (base, masked, prompted)) > 1e-4
        features, maps = model.forward_intermediates(x)
        assert [tuple(m.shape) for m in maps] == [(2, 48, 4, 6)] * 2
        torch.testing.assert_close(model.forward_head(features), both)
        assert torch.equal(model.forward_head(model.forward_features(x)), both)
        for a in adapters.values():
            a.detach()
        assert torch.equal(model(x), base)


def test_recomputed_layers_see_the_context_of_their_call() -> None:
    x = torch.randn(2, 3, 32, 32)
    grads = {}
    for checkpointing in (False, True):
        model = contract.build("vit")
        adapter = apply_adapter(model, "lora", r=2)
        contract.randomise(adapter, 0.1)
        masks = apply_adapter(model, "gmm", name="gmm")
        contract.randomise(masks, 0.5)
        model.set_grad_checkpointing(checkpointing)
        model.train()
        with forward_context(gates={"default": torch.tensor([0.3, 1.0])}):
            model(x).square().mean().backward()
        grads[checkpointing] = [
            p.grad.clone() for p in (*adapter.parameters(), *masks.parameters()) if p.grad is not None
        ]
    for a, b in zip(grads[False], grads[True], strict=True):
        torch.testing.assert_close(a, b)


def test_threads_do_not_see_each_others_context() -> None:
    model, x = contract.build("vit").requires_grad_(False), contract.inputs("vit")[0]
    base = model(x)
    contract.randomise(apply_adapter(model, "lora", name="a", r=2), 0.2)
    full, got = model(x), {}

    def work(gate: float) -> None:
        with forward_context(gates={"a": gate}):
            got[gate] = [model(x) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(g,)) for g in (0.0, 1.0)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.allclose(o, base, atol=1e-5) for o in got[0.0])
    assert all(torch.allclose(o, full, atol=1e-5) for o in got[1.0])


def test_unknown_values_are_named() -> None:
    with pytest.raises(InputError, match="timesteps"), forward_context(timesteps=3):
        pass
    with forward_context(num_frames=4) as context:
        assert isinstance(context, ForwardContext)
        assert context.num_frames == 4


# --- models made of several ----------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """A model made of two backbones."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = contract.build("vit", 1), contract.build("vit", 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fine(x) + self.coarse(x)


def test_adapters_are_found_through_submodules() -> None:
    model, (x,) = Two().requires_grad_(False), contract.inputs("vit")
    base = model(x)
    inner = apply_adapter(model.coarse, "lora", r=2)
    outer = apply_adapter(model, "ssf", init_std=0.0, targets=("qkv",), name="outer")
    assert outer.own_paths == [f"{b}.blocks.{i}.attn.qkv" for b in ("fine", "coarse") for i in range(2)]
    assert attached_adapters(model) == {"coarse.default": inner, "outer": outer}
    masks = apply_adapter(model, "gmm", name="masks")
    assert len(masks.mask_paths) == 4
    for a in (inner, outer):
        contract.randomise(a, 0.1)
    moved = model(x)
    with forward_context(gates={"outer": 0.0, "default": 0.0}):
        torch.testing.assert_close(model(x), base, atol=1e-5, rtol=1e-4)
    inner.merge()
    outer.merge()
    torch.testing.assert_close(model(x), moved, atol=2e-5, rtol=1e-4)
    for a in (masks, outer, inner):
        a.detach()
    assert torch.equal(model(x), base)
    assert attached_adapters(model) == {}


def test_one_adapter_over_several_modules_of_a_pipeline_is_one_file(tmp_path: Path) -> None:
    def parts() -> dict[str, nn.Module]:
        torch.manual_seed(0)
        return {
            "unet": contract.build("unet"),
            "text_encoder": nn.Sequential(nn.Embedding(10, 12), nn.Linear(12, 12)).eval(),
        }

    def run(p: dict[str, nn.Module]) -> Tensor:
        text = p["text_encoder"](torch.tensor([[1, 2, 3], [4, 5, 6]]))
        return contract.run(p["unet"], (*contract.inputs("unet")[:2], text))

    pipe = parts()
    base = run(pipe)
    adapter = apply_adapter(pipe, "lora", r=2, targets=("to_q", "text_encoder.1"))
    assert {p.split(".")[0] for p in adapter.own_paths} == {"unet", "text_encoder"}
    assert not any(p.requires_grad for part in pipe.values() for p in part.parameters())
    contract.randomise(adapter, 0.2)
    moved = run(pipe)
    assert (moved - base).abs().max() > 1e-4
    assert (
        list(attached_adapters(pipe["unet"]).values())
        == list(attached_adapters(pipe["text_encoder"]).values())
        == [adapter]
    )
    folder = save_adapter(adapter, tmp_path / "one")
    other = parts()
    load_adapter(other, folder)
    assert torch.equal(run(other), moved)
    adapter.merge()
    torch.testing.assert_close(run(pipe), moved, atol=1e-5, rtol=1e-4)
    adapter.detach()
    assert torch.equal(run(pipe), base)
    dead = apply_adapter(pipe, "lora", r=2, targets=("text_encoder.1", "to_q"))
    pipe["text_encoder"](torch.tensor([[1]]))  # the UNet has not been called yet, and is not held against it
    run(pipe)
    dead.detach()
