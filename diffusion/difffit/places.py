"""Where DiffFit acts in the models it knows: the ends of their branches, norms, class tables and copied embedders."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from mmkit.adapters import hooks
from mmkit.errors import InputError

_BRANCH_ENDS = {  # the last layer of what a block adds to its stream, relative to the block
    *("attn.to_out.0", "attn1.to_out.0", "attn2.to_out.0", "attention.to_out.0", "attn.to_add_out", "attn.proj"),
    *("ff.net.2", "ff_context.net.2", "img_mlp.net.2", "txt_mlp.net.2", "mlp.fc2"),
    *("ff.linear_out", "ff_context.linear_out", "feed_forward.w2", "feed_forward.linear_2", "ff.conv_point"),
    *("proj_out", "attn.to_out"),  # attention and MLP in one, in the single blocks of Flux and Flux2
}


def is_branch_end(path: str) -> bool:
    """Whether the layer at `path` inside a block ends a branch."""
    return path in _BRANCH_ENDS


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a normalisation layer with parameters of its own, also one of diffusers."""
    norm = isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) or type(module).__name__ == "RMSNorm"
    return norm and isinstance(getattr(module, "weight", None), nn.Parameter)


def class_tables(model: nn.Module) -> list[str]:
    """Paths of the embeddings of class labels: `embedding_table` of diffusers' and facebookresearch's DiT."""
    return [
        p
        for p, m in hooks.named_plain_modules(model)
        if isinstance(m, nn.Embedding) and p.rpartition(".")[2] == "embedding_table"
    ]


def shared_copies(model: nn.Module) -> dict[str, str]:
    """Modules that repeat the first block's: copy -> original, for the embedders that diffusers' DiT builds into every block.

    Copies with other values than the first are no copies. Weights on the meta device count as equal.
    """
    plain = dict(hooks.named_plain_modules(model))
    copies = {}
    for path, module in plain.items():
        match = re.fullmatch(r"((?:.*\.)?transformer_blocks\.)(\d+)(\.norm1\.emb\..+)", path)
        if match is None or match[2] == "0" or not module._parameters:
            continue
        first = f"{match[1]}0{match[3]}"
        if first in plain and _equal(plain[first], module):
            copies[path] = first
    return copies


def _equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = [(p, b._parameters.get(k)) for k, p in a._parameters.items()]
    return all(
        (p is None and q is None)
        or (p is not None and q is not None and p.shape == q.shape and (p.is_meta or torch.equal(p, q)))
        for p, q in pairs
    )


@torch.no_grad()
def swap_class_table(model: nn.Module, num_classes: int, *, seed: int = 0) -> nn.Module:
    """Give a class-conditional DiT another set of classes, in place; returns the model.

    The table gets `num_classes + 1` rows: new ones from N(0, 0.02^2), and last the old null class of guidance. All copies of the
    table in diffusers' DiT are replaced alike. Do it before an adapter is attached, and again before one is loaded.

    Raises:
        InputError: fewer than one class, or a model without a class table.
    """
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
        raise InputError(f"num_classes must be at least 1, not {num_classes!r}.")
    tables = class_tables(model)
    if not tables:
        raise InputError(f"{type(model).__name__} has no class table (a module called embedding_table).")
    generator = torch.Generator().manual_seed(seed)
    first: Any = model.get_submodule(tables[0])
    rows = 0.02 * torch.randn(num_classes, first.embedding_dim, generator=generator)
    for path in tables:
        owner: Any = model.get_submodule(path.rpartition(".")[0])
        old: nn.Embedding = owner.embedding_table
        new = nn.Embedding(num_classes + 1, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
        new.weight.copy_(torch.cat([rows.to(old.weight), old.weight[-1:]]))
        owner.embedding_table = new.requires_grad_(old.weight.requires_grad)
        if hasattr(owner, "num_classes"):
            owner.num_classes = num_classes
    if hasattr(model, "register_to_config"):
        model.register_to_config(num_embeds_ada_norm=num_classes)  # type: ignore[operator]
    return model
