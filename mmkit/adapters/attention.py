"""`nn.MultiheadAttention` computed by calling modules.

The fused form reads its weights directly and never calls anything an adapter could act at. While an adapter needs it, the
attention gets a child `in_proj` that shows the packed projection as a linear layer (it owns no tensors, so keys stay as they
are), and calls `in_proj` and `out_proj`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.adapters import hooks


class InProjection(nn.Linear):
    """The packed query/key/value projection of an `nn.MultiheadAttention`: (..., E) -> (..., 3E), with its weight and bias."""

    def __init__(self, attention: nn.MultiheadAttention):
        nn.Module.__init__(self)
        self.__dict__["attention"] = attention
        self.in_features, self.out_features = attention.embed_dim, 3 * attention.embed_dim

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """`in_proj_weight`, (3E, E)."""
        return self.__dict__["attention"].in_proj_weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """`in_proj_bias`, (3E,), or `None`."""
        return self.__dict__["attention"].in_proj_bias


class ExplicitAttention:
    """Stands in for `nn.MultiheadAttention.forward`: the same result, computed by calling `in_proj` and `out_proj`."""

    def __init__(self, attention: nn.MultiheadAttention):
        self.attention = attention
        attention._modules["in_proj"] = InProjection(attention).train(attention.training)

    def release(self) -> None:
        """Give the attention its fused form back."""
        del self.attention._modules["in_proj"]

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments, shapes and result of `nn.MultiheadAttention.forward`; `is_causal` is a hint beside `attn_mask`."""
        m = self.attention
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0 if m.batch_first else 1) for t in (query, key, value))
        q, k, v = self._project(query, key, value)
        if not m.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        B, L, E = q.shape
        S = k.shape[1]
        q, k, v = (t.reshape(B, -1, m.num_heads, m.head_dim).transpose(1, 2) for t in (q, k, v))  # (B, heads, N, D)
        mask = _additive_mask(attn_mask, key_padding_mask, B, m.num_heads, L, S, q.dtype)
        p = m.dropout if m.training else 0.0
        weights = None
        if need_weights:
            scores = (q * m.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            out = F.dropout(weights, p) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        out = out.transpose(1, 2).reshape(B, L, E)
        out = m.out_proj(out if m.batch_first else out.transpose(0, 1))  # rows lie where they lay for in_proj
        if not batched:
            out = out.squeeze(0 if m.batch_first else 1)
            weights = None if weights is None else weights.squeeze(0)
        return out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        in_proj = self.attention.in_proj
        packed = in_proj(query)
        q, k, v = packed.chunk(3, -1)
        if key is not query:
            packed = in_proj(key)
            k = packed.chunk(3, -1)[1]
        if value is key:
            v = packed.chunk(3, -1)[2]
        elif value is not query:
            v = in_proj(value).chunk(3, -1)[2]
        return q, k, v


def _additive_mask(
    attn_mask: Tensor | None, padding: Tensor | None, B: int, heads: int, L: int, S: int, dtype: torch.dtype
) -> Tensor | None:
    """One additive mask that broadcasts to (B, heads, L, S); in both inputs `True` means "do not attend"."""
    total: Tensor | None = None
    for mask, shape in ((attn_mask, None), (padding, (B, 1, 1, S))):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
        if shape is None:
            shape = (B, heads, L, S) if mask.dim() == 3 else (1, 1, L, S)
        mask = mask.to(dtype).reshape(shape)
        total = mask if total is None else total + mask
    return total


def is_fused_attention(module: nn.Module) -> bool:
    """Whether `module` is an `nn.MultiheadAttention` whose packed projection can be made explicit."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
    )


def make_explicit(model: nn.Module, owner: Any) -> None:
    """Compute every fused attention of `model` by calling modules, for as long as `owner` is there."""
    for module in list(model.modules()):
        if not is_fused_attention(module):
            continue
        chain = hooks.chain_of(module)
        if not chain.needed_by:
            chain.base = ExplicitAttention(module)  # type: ignore[arg-type]
            chain.rebuild(chain.links)
        if not any(o is owner for o in chain.needed_by):
            chain.needed_by.append(owner)
