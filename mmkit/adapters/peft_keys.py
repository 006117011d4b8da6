"""The names of tensors in peft's files, and what peft makes of them; see `mmkit.adapters.peft`."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from mmkit.adapters import hooks
from mmkit.adapters.attention import is_fused_attention
from mmkit.adapters.targets import match_targets
from mmkit.errors import CheckpointError


def to_peft(key: str, attentions: list[str]) -> str:
    """peft's key for a tensor of an `nn.MultiheadAttention`: the packed projection is the attention's own."""
    for a in attentions:
        if key.startswith(f"{a}.in_proj."):
            return f"{a}.{key.removeprefix(f'{a}.in_proj.')}"
        if key.startswith(f"{a}.out_proj."):
            return f"{a}.base_layer.{key.removeprefix(f'{a}.')}"
    return key


def repeated(state: dict[str, Tensor]) -> list[str]:
    """The tensors of a peft file that make up the update of an attention's output projection, one factor of each."""
    return [k for k in state if k.endswith(".base_layer.out_proj.lora_B.weight")]


@functools.cache
def times_out_proj() -> int:
    """How often the installed peft adds that update (0.21 does it twice): a file means what peft makes of it."""
    from peft import LoraConfig, inject_adapter_in_model

    holder = nn.Module()
    holder.attn = nn.MultiheadAttention(2, 1)
    before = holder.attn.out_proj.weight.detach().clone()
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["attn"], init_lora_weights=False)
    layer: Any = inject_adapter_in_model(config, holder).attn
    once = layer.base_layer.out_proj.get_delta_weight("default")
    layer.merge()
    after = layer.base_layer.out_proj.get_base_layer().weight
    return max(1, round(float((after.detach() - before).norm() / once.detach().norm())))


def from_peft(key: str) -> str:
    """The name of a tensor without the layer that peft puts around its host."""
    return key.replace(".base_layer.", ".")


def into_projection(key: str, fused: set[str]) -> str:
    """The name of a tensor of an attention that reads its weights directly (`fused`): it belongs to the input projection."""
    for a in fused:
        rest = key.removeprefix(f"{a}.")
        if rest != key and not rest.startswith(("in_proj.", "out_proj.")):
            return f"{a}.in_proj.{rest}"
    return key


def sites_of(model: nn.Module, state: dict[str, Tensor], saved: Any) -> tuple[list[str], list[str]]:
    """The modules that the tensors of a peft file belong to: adapted ones, and those that were trained whole."""
    plain = {p: m for p, m in hooks.named_plain_modules(model) if p}
    whole = (
        [p for p in match_targets(tuple(saved), plain) if any(k.startswith(f"{p}.") for k in state)] if saved else []
    )
    sites: list[str] = []
    for key in state:
        if any(key.startswith(f"{p}.") for p in whole):
            continue
        parts = key.split(".")
        path = next((p for i in range(len(parts) - 1, 0, -1) if (p := ".".join(parts[:i])) in plain), None)
        if path is None:
            raise CheckpointError(f"The model has no module for {key!r} of the peft file: it is for another model.")
        if is_fused_attention(plain[path]) and key.startswith(f"{path}.in_proj."):
            path = f"{path}.in_proj"  # there once it is made explicit; the attention's own name would stand for both projections
        if path not in sites:
            sites.append(path)
    return sites, whole
