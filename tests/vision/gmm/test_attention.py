"""Gaussian mixture masks: the operator, the five backbones, and the adapter."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from mmkit.backbones.model import create_model
from mmkit.errors import BackendUnavailableError, InputError
from mmkit.vision.gmm import attention as gmm_attention
from mmkit.vision.gmm.attention import masked_attention
from mmkit.vision.gmm.masks import ElementwiseLearnableMask, GaussianMixtureMask


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
