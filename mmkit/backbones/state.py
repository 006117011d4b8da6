"""Loading tensors into a backbone: strictly, except for what is said."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from typing import Any

from torch import Tensor, nn

from mmkit.backbones.builder import attach_info
from mmkit.backbones.info import BackboneInfo, ImageBackboneInfo, backbone_info
from mmkit.storage import load_state

logger = logging.getLogger(__name__)


def load_backbone_state(model: nn.Module, state: dict[str, Tensor], source: str, *, new_head: bool = False) -> None:
    """Load `state` and mark the model as trained.

    Three things may differ, and each is logged: position embeddings of another image size are interpolated, input weights
    follow another number of channels, and with `new_head` classifiers of another size start untrained.

    Raises `CheckpointError` listing missing, unexpected and misshapen keys; nothing is loaded then.
    """
    info = backbone_info(model)
    own = model.state_dict()
    state = dict(state)
    stored = Counter(str(v.dtype).removeprefix("torch.") for v in state.values() if v.is_floating_point())
    if new_head:
        state = _with_fresh_heads(state, own, (*info.heads, *_named(model, "classifier")), source)
    if isinstance(info, ImageBackboneInfo):
        for key in [k for k in state if k in own and state[k].shape != own[k].shape]:
            if key.endswith(("pos_embed", "positional_embedding")):
                state[key] = _resize_positions(state[key], own[key], info, key, source)
            elif key.removesuffix(".weight") in _named(model, "first_conv"):
                state[key] = _other_channels(state[key], own[key], key, source)
    rebuilt = [
        k for k, _ in model.named_buffers() if k.endswith(("relative_position_index", "attn_mask", "position_ids"))
    ]
    load_state(model, state, source=source, ignore=tuple(k for k in rebuilt if k in own and k not in state))
    fresh = tuple(
        head for head in info.heads if any(state.get(k) is v for k, v in own.items() if k.startswith(f"{head}."))
    )
    dtype = next((d for d, _ in stored.most_common(1) if d in ("float16", "bfloat16", "float64")), "float32")
    attach_info(model, dataclasses.replace(info, trained=True, fresh=fresh, dtype=dtype))


def note_random(model: nn.Module) -> None:
    """Keep the first value of every parameter of a model that is random, whole or in its classifiers, for `still_random`."""
    info = backbone_info(model)
    if info.trained is False or info.fresh:
        model.__dict__["backbone_start"] = _first_values(model)


def still_random(model: nn.Module, info: BackboneInfo) -> BackboneInfo:
    """`info` as it is now: what somebody's own loop has changed since the model was built is trained."""
    start = model.__dict__.get("backbone_start")
    if start is None:
        return info
    now = _first_values(model)
    moved = [k for k, v in now.items() if start.get(k) != v]
    fresh = tuple(h for h in info.fresh if not any(k.startswith(f"{h}.") for k in moved))
    return dataclasses.replace(info, trained=bool(moved) or info.trained, fresh=fresh)


def _first_values(model: nn.Module) -> dict[str, float]:
    return {k: float(p.detach().flatten()[0]) for k, p in model.named_parameters() if p.numel() and not p.is_meta}


def _with_fresh_heads(
    state: dict[str, Tensor], own: dict[str, Tensor], heads: tuple[str, ...], source: str
) -> dict[str, Tensor]:
    """`state` with our own classifiers in place of theirs, unless they have the same shapes."""
    prefixes = tuple(f"{head}." for head in heads)
    ours = {k: v for k, v in own.items() if k.startswith(prefixes)}
    theirs = {k: v for k, v in state.items() if k.startswith(prefixes)}
    if {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}:
        return state
    found = "has a classifier of other classes" if theirs else "brings no classifier"
    logger.info("%s %s: the classifier (%s) starts untrained", source, found, ", ".join(dict.fromkeys(heads)))
    return {k: v for k, v in state.items() if k not in theirs} | ours


def _resize_positions(theirs: Tensor, ours: Tensor, info: ImageBackboneInfo, key: str, source: str) -> Tensor:
    """Interpolate (1, N, D) or (N, D) embeddings of a square grid; returned as they are when they are not that."""
    table = theirs if theirs.dim() == 3 else theirs.unsqueeze(0)
    prefix = info.num_prefix_tokens
    if info.grid and ours.shape[-2] == info.grid[0] * info.grid[1]:
        prefix = 0  # models that add the class token's own embedding elsewhere
    patches = table.shape[1] - prefix
    if info.grid is None or theirs.shape[-1] != ours.shape[-1] or patches < 1 or int(patches**0.5) ** 2 != patches:
        return theirs  # load_state will name the mismatch
    from timm.layers import resample_abs_pos_embed

    logger.warning("%s: %s is interpolated from a %d-token to a %s grid", source, key, patches, info.grid)
    return resample_abs_pos_embed(table, list(info.grid), num_prefix_tokens=prefix).reshape(ours.shape)


def _named(model: nn.Module, role: str) -> tuple[str, ...]:
    """Module paths that timm lists for "classifier" (also those that only act in training) or "first_conv"."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get(role) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _other_channels(theirs: Tensor, ours: Tensor, key: str, source: str) -> Tensor:
    """Input weights for another number of channels, summed or repeated as timm does for its own weights."""
    from timm.models import adapt_input_conv

    if theirs.dim() != 4 or theirs.shape[0] != ours.shape[0] or theirs.shape[2:] != ours.shape[2:]:
        return theirs
    logger.warning("%s: %s is adapted from %d to %d input channels", source, key, theirs.shape[1], ours.shape[1])
    return adapt_input_conv(ours.shape[1], theirs, base_chans=theirs.shape[1])
