"""Files of others: DiT checkpoints of facebookresearch/DiT (with or without DiffFit gammas) and folders of mkshing/DiffFit-pytorch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.adapters import hooks
from mmkit.diffusion.difffit.adapter import DiffFit, DiffFitConfig
from mmkit.errors import CheckpointError, InputError
from mmkit.lazy import library
from mmkit.storage import load_state, read_tensors

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of DiT-S, -B, -L and -XL
_NAMES = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_GAMMAS = {  # official name -> layers whose outputs it scales, in order
    "gamma1": ("attn1.to_out.0",),
    "gamma2": ("ff.net.2",),
    "attn.gamma1": _QKV,
    "attn.gamma2": ("attn1.to_out.0",),
    "mlp.gamma1": ("ff.net.0.proj",),
    "mlp.gamma2": ("ff.net.2",),
}


def match_official_numerics(model: nn.Module) -> nn.Module:
    """Make diffusers' DiT compute what facebookresearch/DiT does; returns the model.

    diffusers spaces the frequencies of the timestep embedding otherwise and uses an epsilon of 1e-5 in the blocks' norms
    (official: 1e-6): outputs differ by a tenth of their size. Neither is part of the configuration, so call this again after
    `from_pretrained`.
    """
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.norm.eps = block.norm3.eps = 1e-6
    return model


def load_official_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    match_numerics: bool = True,
    name: str = "default",
) -> tuple[Any, DiffFit | None]:
    """A checkpoint of facebookresearch/DiT as diffusers' `DiTTransformer2DModel`, and its gammas as an attached adapter.

    Args:
        source: `.pt`, `.safetensors`, or a state dict. Gammas are called `blocks.i.gamma1|2` (branches),
            `blocks.i.attn.gamma1|2` and `blocks.i.mlp.gamma1|2` (linear layers).
        num_heads: of attention; known for widths of the published models.
        match_numerics: see `match_official_numerics`.
        name: of the adapter.

    Returns:
        The model in eval mode, and the adapter or `None` when there are no gammas. Biases and tables of the file are the model's;
        the adapter's differences to them start at zero.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors.
        InputError: `num_heads` is not known.
    """
    state = dict(source) if isinstance(source, Mapping) else read_tensors(source)
    text = "the DiT checkpoint" if isinstance(source, Mapping) else str(source)
    gammas = {k: state.pop(k) for k in list(state) if re.fullmatch(r"blocks\.\d+\.(attn\.|mlp\.)?gamma[12]", k)}
    model = _empty_dit(state, num_heads, text)
    renamed = {new: value for key, tensor in state.items() for new, value in _renamed(key, tensor, model)}
    positions = state.get("pos_embed")
    if positions is not None and positions.shape == model.pos_embed.pos_embed.shape:
        model.pos_embed.pos_embed.copy_(positions)
    load_state(model, renamed, source=text)
    if match_numerics:
        match_official_numerics(model)
    return model.eval(), _attach_gammas(model, gammas, name) if gammas else None


def _empty_dit(state: Mapping[str, Tensor], num_heads: int | None, source: str) -> Any:

    try:
        width, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
        rows, tokens = state["y_embedder.embedding_table.weight"].shape[0], state["pos_embed"].shape[1]
        out = state["final_layer.linear.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{source} is no checkpoint of facebookresearch/DiT: {error!r}.") from error
    heads = num_heads or _HEADS.get(width)
    if heads is None or width % heads:
        raise InputError(f"A DiT of width {width} is none of the published ones: pass num_heads= that divides it.")
    return library("diffusers").DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=in_channels,
        out_channels=out // patch**2,
        num_layers=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        sample_size=round(tokens**0.5) * patch,
        patch_size=patch,
        num_embeds_ada_norm=rows - 1,
        activation_fn="gelu-approximate",
    )


def _renamed(key: str, tensor: Tensor, model: Any) -> list[tuple[str, Tensor]]:
    """Names and tensors in diffusers of one official tensor; embedders go into every block."""
    blocks = range(len(model.transformer_blocks))
    owner, _, leaf = key.rpartition(".")
    if key == "pos_embed":
        return []
    plain = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1"}
    plain["final_layer.linear"] = "proj_out_2"
    if owner in plain:
        return [(f"{plain[owner]}.{leaf}", tensor)]
    embedders = {
        "t_embedder.mlp.0": "timestep_embedder.linear_1",
        "t_embedder.mlp.2": "timestep_embedder.linear_2",
        "y_embedder.embedding_table": "class_embedder.embedding_table",
    }
    if owner in embedders:
        return [(f"transformer_blocks.{i}.norm1.emb.{embedders[owner]}.{leaf}", tensor) for i in blocks]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", owner)
    if match and match[2] == "attn.qkv":
        parts = tensor.chunk(3)
        return [(f"transformer_blocks.{match[1]}.{to}.{leaf}", part) for to, part in zip(_QKV, parts, strict=True)]
    if match and match[2] in _NAMES:
        return [(f"transformer_blocks.{match[1]}.{_NAMES[match[2]]}.{leaf}", tensor)]
    return [(key, tensor)]  # reported as unexpected


def _attach_gammas(model: nn.Module, gammas: Mapping[str, Tensor], name: str) -> DiffFit:
    values = {}
    for key, tensor in gammas.items():
        block, kind = re.fullmatch(r"blocks\.(\d+)\.(.+)", key).groups()  # type: ignore[union-attr]
        places = _GAMMAS[kind]
        for place, part in zip(places, tensor.chunk(len(places)), strict=True):
            values[f"transformer_blocks.{block}.{place}"] = part
    return _with_gammas(model, values, name)


def _with_gammas(model: nn.Module, values: Mapping[str, Tensor], name: str) -> DiffFit:
    """A DiffFit adapter on `model` with the gammas `values`, by module path."""
    adapter = DiffFit(DiffFitConfig(targets=tuple(values)), name=name).attach(model)
    with torch.no_grad():
        for path, gamma in values.items():
            adapter.site(path).gamma_delta.copy_(gamma - 1)  # type: ignore[union-attr, operator]
    return adapter


def load_mkshing(
    model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor], *, name: str = "default"
) -> DiffFit:
    """Attach what mkshing/DiffFit-pytorch trained: a folder with `efficient_weights.safetensors`, or its tensors.

    A branch is scaled twice there, by `gamma_fnn` in the attention processor and by `gamma_attn1|2` around it: here by the product.

    Args:
        model: the diffusers UNet (or a part of one) that was adapted.

    Raises:
        CheckpointError: a tensor has no place in the model.
    """
    tensors = (
        dict(source) if isinstance(source, Mapping) else read_tensors(Path(source) / "efficient_weights.safetensors")
    )
    gammas: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        place = _mkshing_place(key)
        if place is None:
            values[key] = tensor
        else:
            gammas[place] = gammas.get(place, torch.ones(())) * tensor
    plain = dict(hooks.named_plain_modules(model))
    if unknown := [k for k in (*gammas, *(k.rpartition(".")[0] for k in values)) if k not in plain]:
        raise CheckpointError(f"The DiffFit file has {len(unknown)} tensors without a place, such as {unknown[:3]}.")
    adapter = _with_gammas(model, gammas, name)
    try:
        with torch.no_grad():
            for key, value in values.items():
                path, _, leaf = key.rpartition(".")
                site: Any = adapter.site(path)
                delta = site.bias_delta if hasattr(site, "bias_delta") else getattr(site.delta, leaf)
                delta.copy_(value - getattr(plain[path], leaf))
    except (KeyError, AttributeError, RuntimeError) as error:
        adapter.detach()
        raise CheckpointError(f"The DiffFit file does not fit this model: {key} ({error}).") from error
    return adapter


def _mkshing_place(key: str) -> str | None:
    """The module whose output a gamma scales; `None` for other tensors."""
    match = re.fullmatch(r"(.*?)(?:(attn[12])\.processor\.)?gamma_(q|k|v|fnn|attn1|attn2|ff)", key)
    if match is None:
        return None
    prefix, attention, kind = match.groups()
    if attention:
        return f"{prefix}{attention}.{'to_out.0' if kind == 'fnn' else f'to_{kind}'}"
    return prefix + ("ff.net.2" if kind == "ff" else f"{kind}.to_out.0")
