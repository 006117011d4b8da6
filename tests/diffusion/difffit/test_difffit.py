"""DiffFit: what is selected and counted, official files, missing biases, wrong input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmkit.adapters import apply_adapter, load_adapter, save_adapter
from mmkit.backbones import create_backbone
from mmkit.diffusion.difffit import swap_class_table, trained_counts
from mmkit.diffusion.difffit.official import load_official_checkpoint, match_official_numerics
from mmkit.errors import CheckpointError, InputError


def tiny_dit(depth: int = 2, classes: int = 10) -> Any:
    torch.manual_seed(0)
    model = create_backbone(
        "diffusers:DiTTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        num_layers=depth, sample_size=8, patch_size=2, num_embeds_ada_norm=classes,
    )  # fmt: skip
    for i in range(1, depth):  # diffusers draws each copy of the embedders anew; trained models hold equal ones
        model.transformer_blocks[i].norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


def dit_xl(classes: int) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    with torch.device("meta"):
        return DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32,
            patch_size=2, num_embeds_ada_norm=classes,
        )  # fmt: skip


def call(size: int = 8, label: int = 10) -> dict[str, torch.Tensor]:
    x = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(1))
    return {"hidden_states": x, "timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([1, label])}


@pytest.mark.parametrize(
    ("settings", "gamma", "total"),
    [
        ({"placement": "none"}, 0, 489_632 + 117_504),
        ({"scale_blocks": "all"}, 64_512, 671_648),
        ({"placement": "linear"}, 145_152, 752_288),  # the first 14 of 28 blocks
        ({"placement": "linear", "scale_blocks": "all"}, 290_304, 897_440),
        ({"placement": "linear", "scale_blocks": 13, "scale_modulation": True}, 224_640, 831_776),
    ],
)
def test_counts_of_dit_xl(settings: dict[str, Any], gamma: int, total: int) -> None:
    adapter = apply_adapter(dit_xl(101), "difffit", **settings)
    counts = trained_counts(adapter)
    assert (counts["gamma"], counts["bias"], counts["class table"]) == (gamma, 489_632, 117_504)
    assert adapter.num_parameters() == total
    assert [k for k, p in adapter.trainable_parameters() if p.ndim > 1] == [
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.table_delta"
    ]


def test_half_of_the_blocks_is_the_default() -> None:
    adapter = apply_adapter(tiny_dit(4), "difffit")
    blocks = {k.split(".")[1] for k, _ in adapter.trainable_parameters() if k.endswith("gamma_delta")}
    assert blocks == {"0", "1"}


def test_copies_of_the_embedders_share_one_difference_and_merge_into_all() -> None:
    model = tiny_dit().requires_grad_(False)
    adapter = apply_adapter(model, "difffit")
    keys = [k for k, _ in adapter.trainable_parameters() if "norm1.emb" in k]
    assert all(k.startswith("transformer_blocks.0.") for k in keys)
    with torch.no_grad():
        for _, p in adapter.trainable_parameters():
            p.add_(0.1 * torch.randn_like(p))
    want = model(**call()).sample
    adapter.merge()
    torch.testing.assert_close(model(**call()).sample, want, atol=1e-5, rtol=1e-5)
    first, second = (b.norm1.emb.class_embedder.embedding_table.weight for b in model.transformer_blocks)
    assert torch.equal(first, second)


def test_copies_that_differ_are_trained_apart() -> None:
    model = tiny_dit()
    model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.data.add_(1)
    keys = [k for k, _ in apply_adapter(model, "difffit").trainable_parameters()]
    assert sum("table_delta" in k for k in keys) == 2


def test_class_table_swap_keeps_the_null_class() -> None:
    model = tiny_dit(classes=10).requires_grad_(False)
    before = model(**call(label=10)).sample
    swap_class_table(model, 3, seed=0)
    table = model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight
    assert table.shape[0] == 4
    after = model(**{**call(), "class_labels": torch.tensor([0, 3])}).sample
    torch.testing.assert_close(after[1], before[1])
    assert (after[0] - before[0]).abs().max() > 1e-4
    assert model.config.num_embeds_ada_norm == 3
    model.train()
    model.transformer_blocks[0].norm1.emb.class_embedder(torch.tensor([0, 3]))  # drops labels to the new null class
    with pytest.raises(InputError, match="at least 1"):
        swap_class_table(model, 0)


class OfficialBlock(nn.Module):
    """A block with the layout of facebookresearch/DiT."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        from timm.layers import Mlp
        from timm.models.vision_transformer import Attention

        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads=2, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        s1, m1, g1, s2, m2, g2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + g1 * self.attn(self.norm1(x) * (1 + m1) + s1)
        return x + g2 * self.mlp(self.norm2(x) * (1 + m2) + s2)


class DiT(nn.Module):
    """A denoiser with the names of facebookresearch/DiT."""

    def __init__(self, depth: int = 3, dim: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(4, dim, 2, 2)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, dim)})
        self.pos_embed = nn.Parameter(official_positions(dim, 4), requires_grad=False)
        self.blocks = nn.ModuleList([OfficialBlock(dim) for _ in range(depth)])
        self.final_layer = nn.ModuleDict(
            {"linear": nn.Linear(dim, 32), "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))}
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        angles = t[:, None].float() * torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10000.0)))
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], -1)) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        h = nn.functional.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
        h = self.final_layer["linear"](h).view(len(x), 4, 4, 2, 2, 8)
        return torch.einsum("bhwpqc->bchpwq", h).reshape(len(x), 8, 8, 8)


def official_positions(dim: int, grid: int) -> torch.Tensor:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    return get_2d_sincos_pos_embed(dim, grid, base_size=grid, output_type="pt")[None].float()


def test_official_checkpoint_equals_after_both_patches_and_not_before() -> None:
    torch.manual_seed(0)
    theirs = DiT()
    for p in theirs.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))
    x = call()
    args = (x["hidden_states"], x["timestep"], torch.tensor([1, 5]))
    want = theirs(*args)
    state = theirs.state_dict()
    model, adapter = load_official_checkpoint(state, num_heads=2)
    assert adapter is None
    ours = {"hidden_states": args[0], "timestep": args[1], "class_labels": args[2]}
    assert (model(**ours).sample - want).abs().max() < 1e-5
    unpatched, _ = load_official_checkpoint(state, num_heads=2, match_numerics=False)
    assert (unpatched(**ours).sample - want).abs().max() > 1e-2
    assert (match_official_numerics(unpatched)(**ours).sample - want).abs().max() < 1e-5
    with pytest.raises(CheckpointError, match="unexpected"):
        load_official_checkpoint({**state, "blocks.0.attn.other.weight": torch.zeros(3)}, num_heads=2)
    with pytest.raises(InputError, match="num_heads"):
        load_official_checkpoint(state)


def test_a_model_with_official_names_is_adapted_as_it_is() -> None:
    model = DiT().eval()
    adapter = apply_adapter(model, "difffit", placement="linear", scale_blocks=1)
    gammas = [k for k, _ in adapter.trainable_parameters() if k.endswith("gamma_delta")]
    assert [g.removeprefix("blocks.0.") for g in gammas] == [
        "attn.qkv.gamma_delta", "attn.proj.gamma_delta", "mlp.fc1.gamma_delta", "mlp.fc2.gamma_delta"
    ]  # fmt: skip
    assert trained_counts(adapter)["class table"] == 6 * 16


def test_no_biases_is_said_and_created_ones_merge_away_again() -> None:
    from denoisers import call_of, denoiser  # of the contract suite

    model = denoiser("flux2").eval().requires_grad_(False)
    with pytest.raises(InputError, match=r"0 biases found .*create_bias=True"):
        apply_adapter(model, "difffit")
    keys = list(model.state_dict())
    adapter = apply_adapter(model, "difffit", create_bias=True)
    with torch.no_grad():
        for _, p in adapter.trainable_parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = call_of("flux2", torch.Generator().manual_seed(0))
    want = model(**x).sample
    adapter.merge()
    assert {k for k in model.state_dict() if k not in keys} == {
        k.replace("weight", "bias") for k in keys if k.replace("weight", "bias") not in keys and "norm_" not in k
    } | {"norm_out.linear.bias"}
    torch.testing.assert_close(model(**x).sample, want, atol=1e-5, rtol=1e-5)
    adapter.detach()
    assert list(model.state_dict()) == keys
    assert trained_counts(apply_adapter(model, "difffit", train_bias=False))["bias"] == 0


@pytest.mark.parametrize("family", ["sana", "lumina2"])
def test_denoisers_beside_those_of_the_contract(family: str) -> None:
    from denoisers import call_of, denoiser

    model = denoiser(family).eval().requires_grad_(False)
    x = call_of(family, torch.Generator().manual_seed(0))
    base = model(**x).sample
    adapter = apply_adapter(model, "difffit", scale_blocks="all")
    assert torch.equal(model(**x).sample, base)
    with torch.no_grad():
        for _, p in adapter.trainable_parameters():
            p.add_(0.05 * torch.randn_like(p))
    adapted = model(**x).sample
    adapter.merge()
    torch.testing.assert_close(model(**x).sample, adapted, atol=2e-5, rtol=2e-5)
    adapter.detach()
    assert torch.equal(model(**x).sample, base)


def test_files_are_small_and_refuse_another_depth(tmp_path: Any) -> None:
    model = tiny_dit(4)
    adapter = apply_adapter(model, "difffit", train_class_table=False)
    save_adapter(adapter, tmp_path / "a")
    size = sum(p.numel() for p in adapter.state_dict().values())
    assert size < 0.05 * sum(p.numel() for p in model.parameters())
    with pytest.raises(CheckpointError, match="made for"):
        load_adapter(tiny_dit(2), tmp_path / "a")


def test_unknown_models_and_settings_are_refused() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    with pytest.raises(InputError, match="PixArtTransformer2DModel"):
        apply_adapter(plain, "difffit")
    assert apply_adapter(plain, "difffit", targets=("1",)).num_parameters() == 4 + 3 + 3
    for settings in ({"placement": "heads"}, {"scale_blocks": -1}, {"scale_blocks": "most"}, {"train_bias": 1}):
        with pytest.raises(InputError):
            apply_adapter(tiny_dit(), "difffit", **settings)
    with pytest.raises(InputError, match="2 blocks"):
        apply_adapter(tiny_dit(), "difffit", scale_blocks=3)


def test_twice_the_resolution_keeps_the_range_of_positions(tmp_path: Any) -> None:
    from denoisers import SETTINGS
    from diffusers import PixArtTransformer2DModel

    from mmkit.diffusion import raise_resolution

    settings = SETTINGS["PixArtTransformer2DModel"]
    coarse, fine = (PixArtTransformer2DModel(**settings) for _ in range(2))
    raise_resolution(fine, 16)
    fine.save_pretrained(tmp_path)
    for model in (fine, PixArtTransformer2DModel.from_pretrained(tmp_path)):
        positions = model.pos_embed.pos_embed.view(8, 8, -1)
        assert (positions[::2, ::2] - coarse.pos_embed.pos_embed.view(4, 4, -1)).abs().max() < 1e-6
        assert model.config.sample_size == 16
    dit = raise_resolution(tiny_dit(), 16)
    assert dit(**call(16)).sample.shape == (2, 8, 16, 16)
    apply_adapter(dit, "difffit")
    for wrong, message in ((lambda: raise_resolution(dit, 8), "Detach"), (lambda: raise_resolution(coarse, 9), "multiple"),
                           (lambda: raise_resolution(nn.Linear(2, 2), 8), "PixArt")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            wrong()
