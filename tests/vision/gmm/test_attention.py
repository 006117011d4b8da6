"""Gaussian mixture masks: the operator, the five backbones, and the adapter."""

from __future__ import annotations

import copy
import importlib.util
import math
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import set_fused_attn

from mmkit.adapters import apply_adapter, load_adapter, save_adapter
from mmkit.backbones.model import create_model, list_models, load_official_checkpoint
from mmkit.errors import BackendUnavailableError, CheckpointError, InputError, NotMergeableError
from mmkit.storage import write_safetensors
from mmkit.vision.gmm import attention as gmm_attention
from mmkit.vision.gmm.adapter import GMMConfig
from mmkit.vision.gmm.attention import masked_attention
from mmkit.vision.gmm.masks import ElementwiseLearnableMask, GaussianMixtureMask
from mmkit.vision.gmm.models.vit import GMMViT


def direct_mask(mask: GaussianMixtureMask) -> torch.Tensor:
    """The equation, written out in float64."""
    rows, columns = mask.grid
    y = torch.arange(rows).repeat_interleave(columns).double()
    x = torch.arange(columns).repeat(rows).double()
    d2 = (x[:, None] - x) ** 2 + (y[:, None] - y) ** 2
    alpha, sigma = mask.alpha.double(), mask.sigma.double()
    return mask.offset + (alpha * torch.exp(-d2 / (2 * (sigma**2 + 1e-5)))).sum(0)


@pytest.mark.parametrize("grid", [(6, 6), (14, 14), (10, 14), (1, 5)])
@pytest.mark.parametrize("init", ["official", "identity"])
def test_the_gathered_mask_equals_the_equation(grid, init):
    mask = GaussianMixtureMask(3, grid, 4, init=init)
    torch.nn.init.normal_(mask.alpha)
    torch.testing.assert_close(mask.matrix().double(), direct_mask(mask), atol=1e-6, rtol=1e-5)


def test_symmetric_block_toeplitz_and_invariant_under_rotation():
    mask = GaussianMixtureMask(2, (5, 5), 3)
    matrix = mask.matrix()
    torch.testing.assert_close(matrix, matrix.transpose(1, 2), atol=0, rtol=0)
    square = matrix.view(2, 5, 5, 5, 5)
    torch.testing.assert_close(square[:, :-1, :-1, :-1, :-1], square[:, 1:, 1:, 1:, 1:], atol=0, rtol=0)
    turned = torch.rot90(torch.rot90(square, 1, (1, 2)), 1, (3, 4))
    torch.testing.assert_close(turned, square, atol=0, rtol=0)


def test_gradients_in_float64():
    mask = GaussianMixtureMask(2, (3, 4), 2, num_prefix_tokens=1).double()
    sigma, alpha = torch.rand_like(mask.sigma) + 0.5, torch.randn_like(mask.alpha)

    def build(sigma, alpha):
        return torch.func.functional_call(_Matrix(mask), {"mask.sigma": sigma, "mask.alpha": alpha}, ())

    assert torch.autograd.gradcheck(build, (sigma.requires_grad_(), alpha.requires_grad_()))


class _Matrix(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self):
        return self.mask.matrix()


def test_prefix_tokens_stay_untouched():
    logits = torch.randn(2, 3, 14, 14)
    out = GaussianMixtureMask(3, (3, 4), 2, num_prefix_tokens=2)(logits)
    torch.testing.assert_close(out[..., :2, :], logits[..., :2, :], atol=0, rtol=0)
    torch.testing.assert_close(out[..., :2], logits[..., :2], atol=0, rtol=0)
    assert not torch.allclose(out[..., 2:, 2:], logits[..., 2:, 2:])


def test_official_underflow_truncates_far_pairs_and_the_default_does_not():
    ours, official = (GaussianMixtureMask(2, (14, 14), 3, official_underflow=flag) for flag in (False, True))
    official.load_state_dict(ours.state_dict())
    far = direct_mask(ours).shape[-1] - 1  # opposite corners: squared distance 338
    assert torch.all(official.matrix()[:, 0, far] == 0)
    assert torch.all(ours.matrix()[:, 0, far].abs() > 0)
    near = ours.matrix()[:, 0, :9]  # d2 <= 64: the official base is still a normal float32
    torch.testing.assert_close(official.matrix()[:, 0, :9], near, atol=1e-5, rtol=1e-5)


def test_masked_keys_get_no_weight_although_alpha_is_negative():
    mask = GaussianMixtureMask(2, (3, 3), 2)
    torch.nn.init.constant_(mask.alpha, -2.0)
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    v[:, :, 5:] = 1e6
    padding = torch.zeros(9).masked_fill(torch.arange(9) >= 5, -math.inf)
    out = masked_attention(q, k, v, mask, attn_mask=padding)
    assert out.abs().max() < 100
    torch.testing.assert_close(out, masked_attention(q, k, v, mask, attn_mask=torch.arange(9) < 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_matrix_masks_like_its_module_with_and_without_gradients(dtype):
    mask = GaussianMixtureMask(2, (4, 4), 3)
    q, k, v = torch.randn(3, 1, 2, 16, 8).to(dtype)
    expected = masked_attention(q, k, v, mask)
    torch.testing.assert_close(masked_attention(q, k, v, mask.matrix()), expected, atol=0, rtol=0)
    before = mask.matrix().detach().clone()
    with torch.no_grad():
        matrix = mask.matrix()
        torch.testing.assert_close(masked_attention(q, k, v, matrix), expected, atol=0, rtol=0)
        assert torch.equal(matrix, before)


def test_half_precision_computes_the_mask_in_float32():
    mask = GaussianMixtureMask(2, (12, 12), 3).eval()
    expected = mask.matrix()
    q, k, v = torch.randn(3, 1, 2, 144, 8)
    reference = masked_attention(q, k, v, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mask.matrix().dtype == torch.float32
        torch.testing.assert_close(mask.matrix(), expected)
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(mask).to(dtype)
        assert half.matrix().dtype == torch.float32
        assert torch.isfinite(half.matrix()).all()
        out = masked_attention(q.to(dtype), k.to(dtype), v.to(dtype), mask)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), reference, atol=0.15, rtol=0.15)


def test_the_cache_follows_every_change():
    mask = GaussianMixtureMask(2, (4, 4), 2).eval()
    with torch.no_grad():
        first = mask.matrix()
        assert mask.matrix() is first
        mask.alpha.data.mul_(2)
        torch.testing.assert_close(mask.matrix(), 2 * first)
        mask.set_grid((2, 3), sigma_scale=0.5)
        assert mask.matrix().shape == (2, 6, 6)
    assert mask.matrix().requires_grad
    assert copy.deepcopy(mask).matrix().shape == (2, 6, 6)


def test_another_resolution_needs_no_interpolation():
    small, large = GaussianMixtureMask(2, (5, 5), 2), GaussianMixtureMask(2, (10, 10), 2)
    large.load_state_dict(small.state_dict())
    large.set_grid((10, 10), sigma_scale=2.0)
    torch.testing.assert_close(  # the same picture at twice the resolution: every second patch sees the same mask
        large.matrix().view(2, 10, 10, 10, 10)[:, ::2, ::2, ::2, ::2],
        small.matrix().view(2, 5, 5, 5, 5),
        atol=1e-3,
        rtol=1e-3,
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GaussianMixtureMask(2, (4, 4), 0), "num_kernels.*not 0"),
        (lambda: GaussianMixtureMask(2, (4, 4), 2.5), "num_kernels.*whole number"),
        (lambda: GaussianMixtureMask(2, (4, 4), num_prefix_tokens=-1), "num_prefix_tokens"),
        (lambda: GaussianMixtureMask(2, (4, 4))(torch.zeros(16, 16)), "B, num_heads, N, N"),
        (lambda: masked_attention(*torch.zeros(3, 1, 2, 16, 4), torch.ones(2, 9, 9)), "2, 9, 9"),
        (lambda: masked_attention(*torch.zeros(3, 1, 2, 16, 4), torch.ones(3, 16, 16)), "3, 16, 16"),
        (lambda: GaussianMixtureMask(0, (4, 4)), "num_heads"),
        (lambda: GaussianMixtureMask(2, (4, 0)), "positive"),
        (lambda: GaussianMixtureMask(2, "44"), "rows, columns"),
        (lambda: GaussianMixtureMask(2, (4, 4), init="zero"), "init"),
        (lambda: GaussianMixtureMask(2, (4, 4), mode="add"), "mode"),
        (lambda: GaussianMixtureMask(2, (4, 4))(torch.zeros(1, 2, 17, 17)), "17 x 17 tokens"),
        (lambda: GaussianMixtureMask(2, (4, 4))(torch.zeros(1, 3, 16, 16)), "3 heads"),
        (lambda: ElementwiseLearnableMask(2, (4, 4))(torch.zeros(1, 2, 15, 15)), "15 x 15"),
        (lambda: create_model("gmm_vit", mask="gauss"), "gauss"),
        (lambda: create_model("gmm_vit", img_size=30), "multiple"),
        (lambda: create_model("gmm_vit", num_kernels=0), "num_kernels"),
        (lambda: create_model("gmm_vit", embed_dim=4, num_heads=8), "multiple of num_heads 8"),
        (lambda: create_model("gmm_swin", num_heads=[5, 6, 12]), "multiple of num_heads 5"),
        (lambda: create_model("gmm_t2t", num_heads=5), "multiple of num_heads 5"),
        (lambda: create_model("gmm_t2t", img_size=(32, 32)), "one side"),
        (lambda: create_model("gmm_vit")(torch.zeros(1, 3, 28, 28)), "3, 32, 32"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_flex_attention_multiplies_the_same_mask(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    mask = GaussianMixtureMask(2, (4, 4), 2).eval()
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    with pytest.raises(BackendUnavailableError, match="CUDA"):
        masked_attention(q, k, v, mask, backend="flex")
    monkeypatch.setattr(gmm_attention, "_flex_problem", lambda device: None)
    monkeypatch.setattr(gmm_attention, "_compiled_flex", lambda: flex_attention)
    with torch.no_grad(), pytest.warns(UserWarning, match="without torch.compile"):
        out = masked_attention(q, k, v, mask, backend="flex")
    torch.testing.assert_close(out, masked_attention(q, k, v, mask))


COUNTS = {
    # The specification's table of the official factory. Per mask: CIFAR-10, then CIFAR-100 and Tiny-ImageNet (64 pixels, 200
    # classes) where it gives them.
    "gmm_vit": {
        "none": (2_692_426, 2_709_796, 2_756_744),
        "gmm": (2_693_122, 2_710_492, 2_757_440),
        "elm": (2_728_906, 2_746_276, 2_793_224),
    },
    "gmm_swin": {"none": (7_073_188, 7_107_838, 7_149_794), "gmm": (7_074_088, 7_108_738, 7_150_694)},
    "gmm_cait": {
        "none": (9_020_618, 9_037_988, 9_084_936),
        "gmm": (9_021_578, 9_038_948, 9_085_896),
        "elm": (9_118_922,),
    },
    "gmm_cait_tiny": {
        "none": (5_078_834, 5_088_644, 5_115_096),
        "gmm": (5_079_794, 5_089_604, 5_116_056),
        "elm": (5_177_138,),
    },
    "gmm_pit": {
        "none": (6_972_586, 7_007_236, 7_049_192),
        "gmm": (6_973_186, 7_007_836, 7_049_792),
        "elm": (7_129_258,),
    },
    "gmm_t2t": {
        "none": (6_486_080, 6_509_210, 6_659_262),
        "gmm": (6_486_570, 6_509_700, 6_659_762),
        "elm": (6_600_768, None, 7_822_526),
    },
    "gmm_vit_base": {"none": (4_283_146,), "gmm": (4_282_954,), "elm": (4_806_922,)},
    "gmm_vit_heat": {"none": (2_425_930,), "gmm": (2_426_026,), "elm": (2_949_834,)},
    "gmm_vit_d6": {"none": (3_092_302,), "gmm": (3_092_518,)},
    "gmm_vit_d15": {"none": (2_523_898,), "gmm": (2_525_410,)},
    "gmm_vit_d30": {"none": (1_270_594,), "gmm": (1_274_050,)},
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_equal_the_official_ones(name):
    assert name in list_models("gmm_*")
    for mask, counts in COUNTS[name].items():
        for (img_size, num_classes), count in zip(((32, 10), (32, 100), (64, 200)), counts, strict=False):
            if count is not None:
                model = create_model(name, img_size=img_size, num_classes=num_classes, mask=mask)
                assert sum(p.numel() for p in model.parameters()) == count, (mask, img_size, num_classes)


@pytest.mark.parametrize(
    ("name", "patches"),
    [("gmm_vit", (4, 8, 32)), ("gmm_vit_d6", (4, 8, 8)), ("gmm_vit_base", (2, 8, 8)), ("gmm_vit_heat", (2, 4, 4))],
)
def test_patch_sizes_follow_the_image_as_in_the_official_factory(name, patches):
    for img_size, patch in zip((32, 64, 256), patches, strict=True):
        assert create_model(name, img_size=img_size, depth=1, embed_dim=24).config["patch_size"] == patch


SMALL = {
    "gmm_vit": {"embed_dim": 24, "depth": 2, "num_heads": 3},
    "gmm_swin": {"embed_dim": 12, "depths": [2, 1], "num_heads": [2, 3]},
    "gmm_cait": {"embed_dim": 12, "depth": 2, "cls_depth": 1, "num_heads": 2, "head_dim": 4, "mlp_dim": 16},
    "gmm_pit": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "head_dim": 4, "patch_size": 4},
    "gmm_t2t": {"embed_dim": 16, "depth": 1, "num_heads": 2, "token_dim": 8},
}


@pytest.mark.parametrize("mask", ["gmm", "elm", "none"])
@pytest.mark.parametrize("name", SMALL)
def test_every_backbone_trains_saves_and_loads(name, mask, tmp_path):
    model = create_model(name, mask=mask, **SMALL[name])
    images = torch.randn(2, 3, 32, 32)
    model(images).square().sum().backward()
    grads = {k: p.grad for k, p in model.named_parameters() if ".mask." in k}
    assert bool(grads) == (mask != "none")
    assert all(g is not None for g in grads.values())  # PiT reads its class token: the last mask's gradient is zero
    assert not grads or sum(g.abs().sum() for g in grads.values()) > 0
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(images), model(images), atol=0, rtol=0)


def test_non_square_images():
    assert GMMViT((16, 32), 4, embed_dim=24, depth=1, num_heads=2)(torch.randn(1, 3, 16, 32)).shape == (1, 10)


def test_a_damaged_official_file_is_refused(tmp_path):
    model = create_model("gmm_vit", **SMALL["gmm_vit"])
    write_safetensors(
        tmp_path / "w.safetensors", {"mask": torch.zeros(1, 1, 64, 64), "pos_embedding": torch.zeros(1, 64, 24)}
    )
    with pytest.raises(CheckpointError, match="missing"):
        load_official_checkpoint(model, tmp_path / "w.safetensors")


# --- the adapter ---------------------------------------------------------------------------------------------------------


def small_vit(**options):
    settings = {"depth": 2, "img_size": 64, "num_classes": 7, **options}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **settings).eval()


def randomise(adapter):
    for name, parameter in adapter.trainable_parameters():
        torch.nn.init.normal_(parameter, 0 if "alpha" in name else 2, 1)


@pytest.mark.parametrize("mode", ["multiply", "bias"])
def test_the_adapter_starts_as_the_identity(mode):
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = model(images)
        apply_adapter(model, "gmm", mode=mode)
        assert (model(images) - before).abs().max() < 1e-5


def test_the_identity_is_bit_exact_when_timm_runs_eagerly():
    set_fused_attn(False)
    try:
        model = small_vit()
    finally:
        set_fused_attn(True)
    images = torch.randn(2, 3, 64, 64)
    before = model(images)
    apply_adapter(model, "gmm")
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("name,heads,count", [("vit_small_patch16_224", 6, 720), ("vit_tiny_patch16_224", 3, 360)])
def test_adapter_parameter_counts(name, heads, count):
    adapter = apply_adapter(timm.create_model(name, pretrained=False), GMMConfig(num_kernels=5))
    assert adapter.num_parameters() == count


@pytest.mark.parametrize("mode", ["multiply", "bias"])
def test_adapter_changes_disables_detaches_saves(mode, tmp_path):
    model, images = small_vit(global_pool="avg", class_token=True, fc_norm=False), torch.randn(2, 3, 64, 64)
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, model(images)
    adapter = apply_adapter(model, "gmm", mode=mode, num_kernels=3)
    randomise(adapter)
    after = model(images)
    assert (after - before).abs().max() > 1e-4
    assert set(adapter.state_dict()) == {f"blocks.{i}.attn.{p}" for i in (0, 1) for p in ("alpha", "sigma")}
    with adapter.disabled():
        assert torch.equal(model(images), before)
    model(images).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(NotMergeableError, match="gmm"):
        adapter.merge()
    save_adapter(adapter, tmp_path)
    torch.testing.assert_close(copy.deepcopy(model)(images), after, atol=0, rtol=0)
    adapter.detach()
    assert torch.equal(model(images), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    load_adapter(model, tmp_path)
    assert torch.equal(model(images), after)


def test_baking_freezes_the_masks_and_unbaking_releases_them():
    model, images = small_vit(), torch.randn(1, 3, 64, 64)
    adapter = apply_adapter(model, "gmm")
    randomise(adapter)
    before = model(images)
    adapter.bake()
    assert adapter.num_parameters() == 0
    for path in adapter.mask_paths:
        adapter.mask(path).alpha.data.zero_()
    assert torch.equal(model(images), before)
    with pytest.raises(InputError, match="baked"):
        adapter.mask(adapter.mask_paths[0]).set_grid((2, 2))
    adapter.unbake()
    assert adapter.num_parameters() > 0
    assert not torch.equal(model(images), before)


def test_dynamic_image_sizes_and_register_tokens():
    model = small_vit(dynamic_img_size=True, reg_tokens=4)
    adapter = apply_adapter(model, "gmm")
    randomise(adapter)
    assert adapter.mask("blocks.0.attn").num_prefix_tokens == 5
    for height, width in ((64, 64), (96, 48), (64, 64)):
        assert model(torch.randn(1, 3, height, width)).shape == (1, 7)
        assert adapter.mask("blocks.1.attn").grid == (height // 16, width // 16)


def test_targets_stack_and_other_models_are_refused():
    model, images = small_vit(), torch.randn(1, 3, 64, 64)
    first = apply_adapter(model, "gmm", targets="blocks.0.attn", name="first")
    randomise(first)
    alone = model(images)
    second = apply_adapter(model, "gmm", name="second")
    torch.testing.assert_close(model(images), alone, atol=1e-5, rtol=1e-5)
    randomise(second)
    both = model(images)
    assert (both - alone).abs().max() > 1e-4
    first.detach()
    assert (model(images) - both).abs().max() > 1e-4
    with pytest.raises(InputError, match=r"blocks\.0\.attn"):
        apply_adapter(small_vit(), "gmm", targets="blocks.0.attention")
    with pytest.raises(InputError, match="patch grid"):
        apply_adapter(timm.create_model("resnet18", pretrained=False), "gmm")
    with pytest.raises(InputError, match="no timm ViT attention"):
        apply_adapter(timm.create_model("swin_tiny_patch4_window7_224", pretrained=False), "gmm")


def test_half_precision_and_compiled_models():
    model, images = small_vit(), torch.randn(1, 3, 64, 64)
    adapter = apply_adapter(model, "gmm")
    randomise(adapter)
    expected = model(images)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), expected.detach(), atol=1e-5, rtol=1e-5)
    half = model.to(torch.bfloat16)
    assert half(images.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.slow
def test_digits_from_scratch_learn_faster_with_the_mask():
    """Four hundred digits, 20 epochs: with the mask the small ViT has learnt, without it it has hardly begun (one seed)."""
    path = Path(__file__).parents[3] / "benchmarks" / "gmm_small_data.py"
    spec = importlib.util.spec_from_file_location("gmm_small_data", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    masked, plain = (
        benchmark.run("digits", f"mean pooling, {name}", 0, path, 20)["accuracy"] for name in ("GMM", "no mask")
    )
    assert masked >= 0.85
    assert masked >= plain + 0.2
