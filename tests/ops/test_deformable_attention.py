"""Deformable attention's sampling: both operators agree with a loop, one with transformers; gradients are right, bad input is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmkit.errors import InputError
from mmkit.ops import deformable_grid_attention, multi_scale_deformable_attention

SHAPES = [(5, 7), (3, 4), (1, 1)]


def problem(dtype: torch.dtype = torch.float32, dim: int = 3) -> list[Tensor]:
    """Values, places (a third of them outside), weights."""
    make = torch.Generator().manual_seed(dim)
    cells = sum(h * w for h, w in SHAPES)
    value = torch.randn(2, cells, 2, dim, generator=make, dtype=dtype)
    places = torch.rand(2, 6, 2, len(SHAPES), 4, 2, generator=make, dtype=dtype) * 1.6 - 0.3
    weights = torch.randn(2, 6, 2, len(SHAPES), 4, generator=make, dtype=dtype)
    return [value.requires_grad_(), places.requires_grad_(), weights.requires_grad_()]


def loop(value: Tensor, places: Tensor, weights: Tensor, shapes: list[tuple[int, int]] = SHAPES) -> Tensor:
    """The definition, sample by sample."""
    out = torch.zeros(*places.shape[:3], value.shape[-1], dtype=value.dtype)
    for b, n, m in ((b, n, m) for b in range(2) for n in range(6) for m in range(2)):
        start = 0
        for level, (height, width) in enumerate(shapes):
            for k in range(4):
                x, y = (float(places[b, n, m, level, k, i]) * side - 0.5 for i, side in ((0, width), (1, height)))
                for i in (math.floor(y), math.floor(y) + 1):
                    for j in (math.floor(x), math.floor(x) + 1):
                        if 0 <= i < height and 0 <= j < width:
                            share = (1 - abs(x - j)) * (1 - abs(y - i)) * weights[b, n, m, level, k]
                            out[b, n, m] += share * value[b, start + i * width + j, m]
            start += height * width
    return out.flatten(2)


def test_equal_to_the_definition() -> None:
    value, places, weights = (t.detach() for t in problem(torch.float64))
    got = multi_scale_deformable_attention(value, SHAPES, places, weights)
    torch.testing.assert_close(got, loop(value, places, weights), atol=1e-12, rtol=0)


@pytest.mark.slow
def test_equal_to_transformers() -> None:
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention as theirs

    value, places, weights = (t.detach() for t in problem(torch.float64))
    got = multi_scale_deformable_attention(value, SHAPES, places, weights)
    torch.testing.assert_close(got, theirs(value, SHAPES, places, weights), atol=1e-12, rtol=0)


def grid_problem(dtype: torch.dtype, dim: int = 3) -> list[Tensor]:
    """Values on 5 x 7 cells, offsets of 2 x 3 queries that often lead outside, logits."""
    make = torch.Generator().manual_seed(1)
    shapes = ((2, 35, 2, dim), (2, 6, 2, 4, 2), (2, 6, 2, 4))
    return [(torch.randn(s, generator=make, dtype=torch.float64) * 2).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("dim", [1, 3, 16])
def test_queries_on_a_grid_look_around_their_own_place(dim: int) -> None:
    exact = grid_problem(torch.float64, dim)
    want = deformable_grid_attention(*exact, (2, 3), (5, 7))
    places = [((n % 3 + 0.5) / 3, (n // 3 + 0.5) / 2) for n in range(6)]
    places = torch.tensor(places, dtype=torch.float64)[:, None, None] + exact[1] / torch.tensor([7, 5])
    by_hand = loop(exact[0], places[:, :, :, None].detach(), exact[2].softmax(-1)[:, :, :, None], [(5, 7)])
    torch.testing.assert_close(want, by_hand, atol=1e-12, rtol=0)
    slopes = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).view_as(want)
    grads = torch.autograd.grad((want * slopes).sum(), exact)
    for backend in ("cpu", "torch"):
        tensors = grid_problem(torch.float32, dim)
        got = deformable_grid_attention(*tensors, (2, 3), (5, 7), backend=backend)
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4)
        for g, w in zip(torch.autograd.grad((got * slopes.float()).sum(), tensors), grads, strict=True):
            torch.testing.assert_close(g.double(), w, atol=5e-5, rtol=1e-3)


def test_gradients_in_float64() -> None:
    tensors = problem(torch.float64, dim=2)
    assert torch.autograd.gradcheck(lambda v, p, w: multi_scale_deformable_attention(v, SHAPES, p, w), tensors)


def test_half_precision_is_computed_in_float32_and_nan_comes_out_again() -> None:
    value, *rest = (t.detach() for t in grid_problem(torch.float32))
    half = deformable_grid_attention(value.half(), *rest, (2, 3), (5, 7))
    assert half.dtype == torch.float16
    whole = deformable_grid_attention(value.half().float(), *rest, (2, 3), (5, 7))
    torch.testing.assert_close(half, whole.half())
    value[0, :, 1] = float("nan")
    spoilt = deformable_grid_attention(value, *rest, (2, 3), (5, 7)).view(2, 6, 2, 3)
    assert spoilt[0, :, 1].isnan().all()
    assert spoilt[1].isfinite().all()
    assert spoilt[0, :, 0].isfinite().all()


def test_threads_share_the_work() -> None:
    tensors, before = grid_problem(torch.float32), torch.get_num_threads()

    def answer() -> list[Tensor]:
        out = deformable_grid_attention(*tensors, (2, 3), (5, 7), backend="cpu")
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    one = answer()
    try:
        torch.set_num_threads(3)
        many = answer()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_bad_input_is_refused() -> None:
    value, places, weights = (t.detach() for t in problem())
    for arguments, words in (
        ((value[0], SHAPES, places, weights), r"value must be floating \(B, S, M, D\)"),
        ((value, SHAPES[:2], places, weights), "do not have the 48 cells"),
        ((value, SHAPES, places[:, :, :1], weights), "locations the same with a last axis of 2"),
        ((value, SHAPES, places, weights[..., 0]), "weights must be"),
    ):
        with pytest.raises(InputError, match=words):
            multi_scale_deformable_attention(*arguments)
    with pytest.raises(InputError, match=r"grid of \(2, 2\) does not have the 6 queries"):
        deformable_grid_attention(*grid_problem(torch.float32), (2, 2), (5, 7))
    with pytest.raises(InputError, match="unknown backend"):
        deformable_grid_attention(*grid_problem(torch.float32), (2, 3), (5, 7), backend="gpu")
    with pytest.raises(InputError, match="computes in float32"):
        deformable_grid_attention(*grid_problem(torch.float64), (2, 3), (5, 7), backend="cpu")
