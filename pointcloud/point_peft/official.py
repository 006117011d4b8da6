"""The authors' files: Point-MAE, Point-BERT and what Point-PEFT, PointGST and IDPT add, as keys of this room."""

from __future__ import annotations

import os
import re
from typing import Any

from torch import Tensor

from mmkit.errors import CheckpointError
from mmkit.storage import load_state, read_tensors

_WRAPPERS = ("module.", "base_model.")
_RENAMED = (
    ("cls_head_finetune.", "head."),
    ("blocks.blocks.", "blocks."),
    ("MAE_decoder.blocks.", "decoder_blocks."),
    ("MAE_decoder.norm.", "decoder_norm."),
    ("increase_dim.0.", "increase_dim."),
    ("cls_token", "cls.token"),
    ("cls_pos", "cls.pos"),
)
_BERT_ONLY = (
    "transformer_k.",
    "transformer_q.cls_head",
    "transformer_q.lm_head",
    "transformer_q.mask_token",
    "dvae.",
    "queue",
)


def own_key(key: str) -> str:
    """An official key as the models of this room write it."""
    for wrapper in _WRAPPERS:
        key = key.removeprefix(wrapper)
    for part in ("MAE_encoder.", "ACT_encoder.", "transformer_q."):
        key = key.removeprefix(part)
    for theirs, ours in _RENAMED:
        key = key.replace(theirs, ours)
    return key


def plain_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under own keys, pointwise convolutions as linear layers; Point-BERT's second encoder is left out."""
    kept = {
        k: v
        for k, v in state.items()
        if not k.removeprefix("module.").removeprefix("base_model.").startswith(_BERT_ONLY)
    }
    return {own_key(k): flat(k, v) for k, v in kept.items()}


def flat(key: str, value: Tensor) -> Tensor:
    """Weights of 1x1 convolutions without their last axes."""
    if re.search(r"(conv\d?\.\d|increase_dim\.0|conv\d\.0)\.weight$", key) and value.dim() > 2:
        value = value.flatten(1)
    return value.float() if value.is_floating_point() else value


def own_state(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of a pre-training or fine-tuned file to those of `model`.

    A classifier takes pre-training files too: it leaves their decoder out and keeps its own class token and head.
    """
    own = plain_keys(state)
    if hasattr(model, "head") and any(k.startswith(("decoder_", "MAE_decoder", "mask_token")) for k in own):
        own = {k: v for k, v in own.items() if not k.startswith(("decoder_", "increase_dim", "mask_token"))}
    if hasattr(model, "head") and not any(k.startswith("head.") for k in own):
        fresh = {k: v for k, v in model.state_dict().items() if k.startswith(("head.", "cls."))}
        own = {**fresh, **own}
    return own


def load_official_adapter(
    adapter: Any, path: str | os.PathLike[str], pretrained: str | os.PathLike[str] | None = None
) -> None:
    """Load a fine-tuned file of Point-PEFT, PointGST or IDPT into an attached adapter and its model.

    Args:
        adapter: attached to a model of the file's sizes.
        path: the fine-tuned file: base weights, adapter and head.
        pretrained: the pre-training file the fine-tuning started from. Tuned biases then become the adapter's difference to it, so
            that Point-PEFT's query is that of the pre-trained encoder, as in the release; without it they are the model's own.

    Raises `CheckpointError` when tensors are missing, left over or of another shape; nothing is loaded then.
    """
    model, state = adapter.model, plain_keys(read_tensors(path))
    own, base = adapter.state_dict(), model.state_dict()
    names = {
        **adapter.official_keys(state),
        **{k: k for k in state if k.startswith(tuple(f"{p}." for p in adapter.saved_paths))},
    }
    if left := sorted(k for k in state if k not in base and k not in names):
        raise CheckpointError(
            f"{path} has {len(left)} tensors that neither the model nor {adapter.method!r} knows: {left[:4]}."
        )
    values = {ours: state[theirs] for theirs, ours in names.items() if ours}
    values |= {k: v for k, v in own.items() if k == "group.bank"}
    shifts = {k: k.removesuffix("delta") + "bias" for k in own if k.endswith(".delta")}
    loaded = {k: state[k] if k not in names or state[k].shape == v.shape else v for k, v in base.items() if k in state}
    if pretrained is not None:
        before = own_state(model, read_tensors(pretrained))
        loaded |= {bias: before[bias] for bias in shifts.values()}
    values |= {k: state[bias] - loaded[bias] for k, bias in shifts.items()}
    if wrong := sorted(k for k in own if k not in values or values[k].shape != own[k].shape):
        raise CheckpointError(
            f"{path} lacks {len(wrong)} tensors of {adapter.method!r}, or has other shapes: {wrong[:4]}."
        )
    load_state(model, loaded, source=str(path))
    adapter.load_state_dict(values)
    model.eval()
