"""Attention whose logits pass through a mask before the softmax; see `mmkit.vision.gmm.masks`."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkit.errors import InputError
from mmkit.ops.backends import choose_backend
from mmkit.vision.gmm.masks import LogitMask


def _flex_problem(device: torch.device) -> str | None:
    return (
        None if device.type == "cuda" else f"flex_attention needs CUDA, the tensors are on {device.type}; use 'eager'."
    )


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LogitMask | Tensor | None,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "eager",
) -> Tensor:
    """Attention whose logits pass through `mask` before the softmax; `attn_mask` is applied after it.

    Args:
        q, k, v: `(B, H, N, D)`.
        mask: a `LogitMask`, a multiplicative matrix `(H, N, N)` or `(1, N, N)`, or `None` for plain attention.
        scale: factor on the logits; `None` is `D ** -0.5`.
        attn_mask: boolean (`True` = attend) or additive, broadcastable to `(B, H, N, N)`.
        dropout_p: dropout on the attention weights.
        backend: "eager" (exact, any device) or "flex" (fused on CUDA through `torch.nn.attention.flex_attention`,
            without dropout and `attn_mask`). An additive mask (`mode="bias"`) always runs in
            `scaled_dot_product_attention`.

    Returns:
        `(B, H, N, D)` in v's dtype.

    Raises:
        InputError: a mask that does not fit, or options the backend cannot serve.
        BackendUnavailableError: "flex" away from CUDA.
    """
    if backend not in ("eager", "flex"):
        raise InputError(f"backend must be 'eager' or 'flex', not {backend!r}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(mask, LogitMask):
        mask.check(q.shape[1], q.shape[2], k.shape[2])
    elif mask is not None and (
        mask.shape[-2:] != (q.shape[2], k.shape[2]) or mask.shape[:-2] not in ((1,), q.shape[1:2])
    ):
        raise InputError(
            f"mask must be {(q.shape[1], q.shape[2], k.shape[2])} or one matrix (1, N, N), not {tuple(mask.shape)}."
        )
    if mask is None or (isinstance(mask, LogitMask) and mask.mode == "bias"):
        bias = None if mask is None else mask.matrix().to(q.dtype)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=sum_masks(bias, attn_mask, q.dtype), dropout_p=dropout_p, scale=scale
        )
    if backend == "flex":
        choose_backend("masked_attention", "flex", q.device, {"cpu": ("flex",)}, {"flex": _flex_problem})
        if attn_mask is not None or dropout_p:
            raise InputError("backend='flex' takes neither attn_mask nor dropout; use backend='eager'.")
        matrix = (mask.matrix() if isinstance(mask, LogitMask) else mask).expand(q.shape[1], -1, -1).contiguous()

        def score(logit: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return logit * matrix[head, i, j]

        return _compiled_flex()(q, k, v, score_mod=score, scale=scale)
    logits = (q * scale) @ k.transpose(-2, -1)
    if isinstance(mask, LogitMask):
        logits = mask(logits)
    elif torch.is_grad_enabled() or mask.dtype != logits.dtype:
        logits = logits * mask
    else:
        logits.mul_(mask)  # without gradients nothing needs the largest tensor twice
    additive = sum_masks(None, attn_mask, logits.dtype)
    if additive is not None:
        logits = logits + additive
    weights = F.dropout(logits.softmax(-1).to(v.dtype), dropout_p)
    return weights @ v


def sum_masks(bias: Tensor | None, attn_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One additive mask from a bias and a boolean or additive mask."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=dtype).masked_fill(~attn_mask, -math.inf)
    if bias is None or attn_mask is None:
        return attn_mask if bias is None else bias
    return bias + attn_mask
