"""How an adapter reaches into a model without changing its keys, types or tensors.

Three reversible primitives, each marked with the adapter that owns it so that `remove(model, owner)` finds them again, also
in a deep copy or after unpickling:

- forward hooks and pre-hooks (`Hook`), for everything that acts on a module's inputs or output;
- a forward override (`ForwardOverride`), for methods that change what happens inside a module;
- explicit attention, an override of `nn.MultiheadAttention` that computes its projections by calling modules, because
  the fused form reads the weights directly and would never run a hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Hook:
    """A forward hook that knows its owner. `fn(module, args, output)` returns the new output.

    With `pre=True` it is a pre-hook with keyword arguments: `fn(module, args, kwargs)` returns the new `(args, kwargs)`.
    A plain class rather than a closure, so that attached models can be pickled and deep-copied.
    """

    def __init__(self, owner: Any, fn: Callable[..., Any]):
        self.owner = owner
        self.fn = fn

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        return self.fn(module, *args) if self.owner.enabled else None


def add_hook(module: nn.Module, owner: Any, fn: Callable[..., Any], *, pre: bool = False) -> None:
    """Register `fn` on `module`, owned by `owner` (see `Hook`)."""
    if pre:
        module.register_forward_pre_hook(Hook(owner, fn), with_kwargs=True)
    else:
        module.register_forward_hook(Hook(owner, fn))


class ForwardOverride:
    """Stands in for `module.forward` while an adapter is attached; subclasses implement `run`.

    Args:
        owner: the adapter.
        module: the module whose forward is replaced.
    """

    def __init__(self, owner: Any, module: nn.Module):
        self.owner = owner
        self.module = module
        self.previous: ForwardOverride | None = module.__dict__.get("forward")

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward this override stands in front of."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What to compute instead (abstract)."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs) if self.owner.enabled else self.original(*args, **kwargs)


def override_forward(override: ForwardOverride) -> None:
    """Put `override` in front of its module's forward."""
    override.module.__dict__["forward"] = override


def owned_hooks(module: nn.Module, owner: Any) -> Iterator[tuple[Any, int]]:
    """The hook tables of `module` and the ids in them that belong to `owner`."""
    for table in (module._forward_hooks, module._forward_pre_hooks):
        for key in [k for k, hook in table.items() if getattr(hook, "owner", None) is owner]:
            yield table, key


def remove(model: nn.Module, owner: Any) -> None:
    """Take everything `owner` placed in `model` out again."""
    for module in list(model.modules()):
        for table, key in owned_hooks(module, owner):
            del table[key]
            for flags in (module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs):
                flags.pop(key, None)
        _remove_override(module, owner)
        if isinstance(module, nn.MultiheadAttention):
            release_attention(module, owner)


def _remove_override(module: nn.Module, owner: Any) -> None:
    chain = []
    override = module.__dict__.get("forward")
    while isinstance(override, ForwardOverride):
        chain.append(override)
        override = override.previous
    kept = [o for o in chain if o.owner is not owner]
    if len(kept) == len(chain):
        return
    if kept:
        for outer, inner in zip(kept, [*kept[1:], None], strict=True):
            outer.previous = inner
        module.__dict__["forward"] = kept[0]
    else:
        del module.__dict__["forward"]


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Hand the hooks of `source` to `target`; used when a wrapper around `target` is taken away."""
    target._forward_hooks.update(source._forward_hooks)
    target._forward_pre_hooks.update(source._forward_pre_hooks)
    target._forward_pre_hooks_with_kwargs.update(source._forward_pre_hooks_with_kwargs)


# --- finding modules by path, also through peft's wrappers ------------------------------------------------------------


def inner_module(module: nn.Module) -> nn.Module | None:
    """What a peft wrapper wraps, or `None` when `module` is not one."""
    inner = module._modules.get("base_layer")
    return module._modules.get("original_module") if inner is None else inner


def unwrap(module: nn.Module) -> nn.Module:
    """The library's own module inside peft wrappers."""
    while (inner := inner_module(module)) is not None:
        module = inner
    return module


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The outermost module at `path`, where `path` is written as in the plain model. Raises `AttributeError`."""
    module = model
    for part in path.split(".") if path else []:
        while part not in module._modules and (inner := inner_module(module)) is not None:
            module = inner
        child = module._modules.get(part)
        if child is None:
            raise AttributeError(f"{type(model).__name__} has no module {path!r}")
        module = child
    return module


def named_plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` as the plain model would list it: peft wrappers are passed through, adapters left out."""

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        plain = unwrap(module)
        yield prefix, plain
        for name, child in plain._modules.items():
            if child is not None and not name.startswith("mmkit_adapter_"):
                yield from walk(f"{prefix}.{name}" if prefix else name, child)

    yield from walk("", model)


# --- explicit attention -------------------------------------------------------------------------------------------------


class InProjection(nn.Module):
    """The packed query/key/value projection of an `nn.MultiheadAttention`, as a module that hooks can sit on.

    It holds no tensors: `weight` and `bias` are those of the attention, so the model's keys do not change.
    """

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        self.__dict__["attention"] = attention

    @property
    def weight(self) -> Tensor:
        """`in_proj_weight`, (3E, E)."""
        return self.__dict__["attention"].in_proj_weight

    @property
    def bias(self) -> Tensor | None:
        """`in_proj_bias`, (3E,), or `None`."""
        return self.__dict__["attention"].in_proj_bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., 3E)."""
        return F.linear(x, self.weight, self.bias)


class ExplicitAttention:
    """Stands in for `nn.MultiheadAttention.forward`: the same result, computed by calling `in_proj` and `out_proj`."""

    def __init__(self, attention: nn.MultiheadAttention):
        self.attention = attention
        self.owners: list[Any] = []

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
        out = m.out_proj(out.transpose(1, 2).reshape(B, L, E))
        if not m.batch_first:
            out = out.transpose(0, 1)
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


def explicit_attention(module: nn.MultiheadAttention, owner: Any) -> None:
    """Compute `module` by calling `in_proj` and `out_proj` for as long as `owner` needs it. Keys and type stay."""
    explicit = module.__dict__.get("forward")
    if not isinstance(explicit, ExplicitAttention):
        explicit = ExplicitAttention(module)
        module.__dict__["forward"] = explicit
        module._modules["in_proj"] = InProjection(module).train(module.training)
    if not any(o is owner for o in explicit.owners):
        explicit.owners.append(owner)


def release_attention(module: nn.MultiheadAttention, owner: Any) -> None:
    """The opposite of `explicit_attention`; the fused form returns when the last owner lets go."""
    explicit = module.__dict__.get("forward")
    if isinstance(explicit, ExplicitAttention):
        explicit.owners = [o for o in explicit.owners if o is not owner]
        if not explicit.owners:
            del module.__dict__["forward"]
            del module._modules["in_proj"]
