"""DiffFit against a DiT written down once more in plain functions and float64; fresh, merged and restored on every known denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import contract  # of the contract suite
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkit.adapters import apply_adapter, load_adapter, save_adapter
from mmkit.backbones import create_backbone
from mmkit.diffusion.difffit import DiffFit, match_official_numerics

HEADS, WIDTH, GRID = 2, 16, 4
FAMILIES = [family for family, row in contract.CASES if row.method == "difffit"]


def tiny_dit(depth: int) -> Any:
    torch.manual_seed(depth)
    model = create_backbone(
        "diffusers:DiTTransformer2DModel", num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4,
        out_channels=8, num_layers=depth, sample_size=2 * GRID, patch_size=2, num_embeds_ada_norm=5,
    )  # fmt: skip
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    for block in model.transformer_blocks:  # as a trained one: all copies of the embedders equal
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return match_official_numerics(model).eval().requires_grad_(False)


def reference(
    weights: dict[str, Tensor], deltas: dict[str, Tensor], waves: Tensor, x: Tensor, labels: Tensor
) -> Tensor:
    """Equations of DiT (arXiv 2212.09748) with `(1 + gamma) * (W x + b + bias)`; `waves` are the sines of the timestep."""

    def linear(path: str, h: Tensor) -> Tensor:
        y = h @ weights[f"{path}.weight"].flatten(1).T + weights[f"{path}.bias"] + deltas.get(f"{path}.bias_delta", 0)
        return (1 + deltas.get(f"{path}.gamma_delta", torch.zeros((), dtype=y.dtype))) * y

    def norm(h: Tensor) -> Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    def attention(path: str, h: Tensor) -> Tensor:
        q, k, v = (linear(f"{path}.to_{n}", h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in "qkv")
        mixed = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return linear(f"{path}.to_out.0", mixed.transpose(1, 2).flatten(2))

    patches = x.unflatten(3, (GRID, 2)).unflatten(2, (GRID, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    h = linear("pos_embed.proj", patches) + weights["positions"]
    emb = "transformer_blocks.0.norm1.emb"
    table = weights[f"{emb}.class_embedder.embedding_table.weight"]
    table = table + deltas.get(f"{emb}.class_embedder.embedding_table.table_delta", 0)
    first = F.silu(linear(f"{emb}.timestep_embedder.linear_1", waves))
    told = F.silu(linear(f"{emb}.timestep_embedder.linear_2", first) + table[labels])
    for i in range(sum(k.endswith("ff.net.2.weight") for k in weights)):
        block = f"transformer_blocks.{i}"
        shift, scale, gate, shift2, scale2, gate2 = linear(f"{block}.norm1.linear", told)[:, None].chunk(6, -1)
        h = h + gate * attention(f"{block}.attn1", norm(h) * (1 + scale) + shift)
        inner = F.gelu(linear(f"{block}.ff.net.0.proj", norm(h) * (1 + scale2) + shift2), approximate="tanh")
        h = h + gate2 * linear(f"{block}.ff.net.2", inner)
    shift, scale = linear("proj_out_1", told)[:, None].chunk(2, -1)
    out = linear("proj_out_2", norm(h) * (1 + scale) + shift)
    return out.view(-1, GRID, GRID, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


LINEAR = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")


@pytest.mark.parametrize(
    ("depth", "settings", "blocks", "scaled"),
    [
        (1, {}, 1, ("attn1.to_out.0", "ff.net.2")),
        (3, {}, 2, ("attn1.to_out.0", "ff.net.2")),  # half of three, rounded up
        (5, {"scale_blocks": 4, "train_class_table": False}, 4, ("attn1.to_out.0", "ff.net.2")),
        (3, {"placement": "linear", "scale_blocks": 1}, 1, LINEAR),
        (2, {"placement": "linear", "scale_blocks": "all", "scale_modulation": True}, 2, (*LINEAR, "norm1.linear")),
        (2, {"placement": "none"}, 0, ()),
        (2, {"placement": "linear", "train_bias": False}, 1, LINEAR),
        (2, {"targets": ("pos_embed.proj", "proj_out_2")}, 0, ()),
    ],
)
def test_outputs_and_gradients_are_those_of_the_equations(
    depth: int, settings: dict[str, Any], blocks: int, scaled: tuple[str, ...]
) -> None:
    model = tiny_dit(depth).double()
    x, t, labels = torch.randn(2, 4, 8, 8).double(), torch.tensor([3, 700]), torch.tensor([1, 5])
    emb = model.transformer_blocks[0].norm1.emb
    weights = model.state_dict() | {"positions": model.pos_embed.pos_embed.double()}
    waves = emb.time_proj(t).double()
    base = model(hidden_states=x, timestep=t, class_labels=labels).sample
    torch.testing.assert_close(base, reference(weights, {}, waves, x, labels), atol=1e-10, rtol=1e-10)

    adapter = apply_adapter(model, "difffit", **settings).to(torch.float64)
    contract.randomise(adapter, 0.2)
    deltas = {k: p.detach().clone().requires_grad_(True) for k, p in adapter.trainable_parameters()}
    gammas = {k.removesuffix(".gamma_delta") for k in deltas if k.endswith("gamma_delta")}
    inside = {f"transformer_blocks.{i}.{place}" for i in range(blocks) for place in scaled}
    assert gammas == inside | set(settings.get("targets", ()))
    got = model(hidden_states=x, timestep=t, class_labels=labels).sample
    want = reference(weights, deltas, waves, x, labels)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    got.square().mean().backward()
    want.square().mean().backward()
    for name, p in adapter.trainable_parameters():
        torch.testing.assert_close(p.grad, deltas[name].grad, atol=1e-10, rtol=1e-8, msg=name)
    assert adapter.num_parameters() == sum(d.numel() for d in deltas.values())


def attach(model: torch.nn.Module, family: str, placement: str) -> DiffFit:
    return apply_adapter(model, "difffit", placement=placement, scale_blocks="all", create_bias=family == "flux2")


@pytest.mark.parametrize("placement", ["branch", "linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_is_the_base_merged_is_adapted_and_unmerging_restores(family: str, placement: str, tmp_path: Any) -> None:
    """Bit by bit where numbers stay the same, with gammas between 0.2 and 2, and in a file."""
    model, x = contract.build(family).requires_grad_(False), contract.inputs(family)
    before, base = {k: v.clone() for k, v in model.state_dict().items()}, contract.run(model, x)
    adapter = attach(model, family, placement)
    assert torch.equal(contract.run(model, x), base)
    torch.manual_seed(4)
    for name, p in adapter.trainable_parameters():
        p.data = torch.rand_like(p) * 1.8 - 0.8 if name.endswith("gamma_delta") else 0.1 * torch.randn_like(p)
    adapted = contract.run(model, x)
    assert (adapted - base).abs().max() > 1e-2
    save_adapter(adapter, tmp_path / "a")
    adapter.merge()
    scale = max(1.0, float(adapted.detach().abs().max()))
    assert (contract.run(model, x) - adapted).abs().max() < 1e-5 * scale
    assert [k for k in model.state_dict() if k in before] == list(before)
    assert family == "flux2" or len(model.state_dict()) == len(before)  # created biases are the only new keys
    adapter.unmerge()
    assert torch.equal(contract.run(model, x), adapted)
    adapter.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    load_adapter(model, tmp_path / "a")
    assert torch.equal(contract.run(model, x), adapted)


def test_of_pixart_only_the_modulation_tables_are_no_vectors() -> None:
    adapter = attach(contract.build("pixart"), "pixart", "linear")
    wide = {k for k, p in adapter.trainable_parameters() if p.ndim > 1}
    assert wide == {f"{path}scale_shift_table.delta" for path in ("", "transformer_blocks.0.", "transformer_blocks.1.")}


def test_file_of_a_tiny_dit_is_small_beside_the_model(tmp_path: Any) -> None:
    model = create_backbone(
        "diffusers:DiTTransformer2DModel", num_attention_heads=4, attention_head_dim=16, num_layers=4, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    whole = (tmp_path / "model" / "diffusion_pytorch_model.safetensors").stat().st_size
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    folder = save_adapter(apply_adapter(model, "difffit"), tmp_path / "a")
    assert (folder / "adapter_model.safetensors").stat().st_size < 0.05 * whole


def world(count: int, seed: int, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, 12, 12) in -1..1 of six shapes, and the shape of each."""
    from mmkit.data.drawn.scenes import draw_scenes, random_scenes

    generator = torch.Generator().manual_seed(seed)
    plain = {"count": "one", "texture": "plain", "size": "large", "position": "centre"}
    scenes = random_scenes(count, generator, **plain)
    return change(draw_scenes(scenes, generator, 12) * 2 - 1), scenes.shape


@pytest.mark.slow
def test_a_class_conditional_model_moves_to_another_domain() -> None:
    """Pre-trained on drawn shapes by class, then adapted to a washed-out world at equal steps."""
    import copy

    from diffusers import DDIMScheduler

    from mmkit import FitConfig, fit
    from mmkit.diffusion import Denoiser
    from mmkit.diffusion.training import DenoisingLoss, Latents, ValidationLoss

    class Parts:
        vae, device = None, torch.device("cpu")

        def __init__(self, transformer: Any) -> None:
            self.transformer, self.scheduler = transformer, DDIMScheduler(prediction_type="v_prediction")

    def train(model: Any, pictures: Tensor, labels: Tensor, lr: float, steps: int, adapter: Any = None) -> Denoiser:
        denoiser = Denoiser(Parts(model))
        loss = DenoisingLoss(denoiser.encode_captions([*range(6), -1]))
        config = FitConfig(max_steps=steps, batch_size=32, lr=lr, warmup_steps=10, weight_decay=0.0, progress=False)
        fit(denoiser, Latents(pictures, labels.tolist()), loss_fn=loss, config=config, adapter=adapter)
        return denoiser.eval()

    @torch.no_grad()
    def held_back(denoiser: Denoiser, pictures: Tensor, labels: Tensor) -> float:
        loader = torch.utils.data.DataLoader(Latents(pictures, labels.tolist()), batch_size=128)
        return ValidationLoss(DenoisingLoss(denoiser.encode_captions([*range(6), -1])))(denoiser, loader)["loss"]

    torch.manual_seed(0)
    model = create_backbone(
        "diffusers:DiTTransformer2DModel", num_attention_heads=4, attention_head_dim=24, in_channels=3, out_channels=3,
        num_layers=2, sample_size=12, patch_size=3, num_embeds_ada_norm=6,
    )  # fmt: skip
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb  # tied, as in the official model
    train(model, *world(1000, 1, lambda x: x), lr=2e-3, steps=400)
    washed: Callable[[Tensor], Tensor] = lambda x: 0.55 * x + 0.4  # noqa: E731
    new, test = world(300, 2, washed), world(200, 3, washed)
    whole = train(copy.deepcopy(model), *new, lr=5e-4, steps=60)
    before = held_back(Denoiser(Parts(model)).eval(), *test)
    adapter = apply_adapter(model, "difffit", train_class_table=False)
    assert adapter.num_parameters() < 0.03 * sum(p.numel() for p in model.parameters())
    ours, full = held_back(train(model, *new, lr=1e-2, steps=60, adapter=adapter), *test), held_back(whole, *test)
    assert before - ours > 0.5 * (before - full) > 0.02, (before, ours, full)
