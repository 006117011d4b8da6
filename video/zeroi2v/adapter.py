"""ZeroI2V: an image transformer becomes a video recogniser at no inference cost. arXiv 2310.01324 (ECCV 2024).

Two parts act inside every block of a frozen ViT that sees one frame per batch row, frames of a clip in adjacent rows:

- *Spatial-temporal dual-headed attention*: head i takes keys and values of frame t + offset_i, or of frame t where that
  lies outside the clip. No parameters, no arithmetic.
- *Linear adapters*: A(x) = x + s (W2 (W1 x + b1) + b2) before the query/key/value projection, after the output projection,
  before and after the MLP. Being linear, `merge()` multiplies them into those layers.

A temporal embedding is added to all tokens of a frame before the first block. Offsets, scale and embedding are read from
the live adapter and travel in its configuration; none of them is ever an argument of `merge`.

Deviations from the official code (MCG-NJU/ZeroI2V): offsets are given per head, not per channel, and a division that would
cut a head in two is refused; clips of another length interpolate the temporal embedding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.adapters import Adapter, AdapterConfig, Edit, current_context, hooks, register_adapter
from mmkit.adapters.attention import InProjection
from mmkit.adapters.targets import match_targets
from mmkit.backbones import backbone_info
from mmkit.errors import InputError, NotMergeableError

PLACES = ("attn_in", "attn_out", "mlp_in", "mlp_out")
"""Where linear adapters sit; the official names are T_Adapter_in, S_Adapter, MLP_Adapter and MLP_Adapter_out."""


def head_offsets_from_div(
    num_heads: int,
    shift_div: int,
    long_shift_div: int = -1,
    long_shift_right: bool = False,
    shift3_div: int = -1,
    shift3_right: bool = False,
    shift4_div: int = -1,
    shift4_right: bool = False,
    shift_stride: int = 1,
) -> tuple[int, ...]:
    """The official channel divisions as one frame offset per head (0 reads the head's own frame).

    `shift_div` s gives h/s heads the offset `-shift_stride` and as many `+shift_stride`; `long_shift_div` gives -2 (and +2 with
    `long_shift_right`) whatever the stride, `shift3_div` -3 and `shift4_div` -4 in the same way; -1 leaves a group out. For the
    official class `..._long`, which knows no stride, pass `long_shift_div=shift2_div, long_shift_right=True`.

    Raises:
        InputError: a group is not a whole number of heads, there are more groups than heads, or the stride is not at least 1.
    """
    if not isinstance(shift_stride, int) or shift_stride < 1:
        raise InputError(f"shift_stride must be a whole number of frames from 1, not {shift_stride!r}.")
    offsets: list[int] = []
    groups = [(shift_div, shift_stride, True), (long_shift_div, 2, long_shift_right)]
    groups += [(shift3_div, 3, shift3_right), (shift4_div, 4, shift4_right)]
    for div, step, right in groups:
        if div == -1:
            continue
        if not isinstance(div, int) or div < 1 or num_heads % div:
            raise InputError(f"{num_heads} heads cannot be divided by {div}: that would cut a head in two.")
        offsets += [-step] * (num_heads // div) + ([step] * (num_heads // div) if right else [])
    if len(offsets) > num_heads:
        raise InputError(f"The divisions ask for {len(offsets)} temporal heads; there are {num_heads}.")
    return (*offsets, *[0] * (num_heads - len(offsets)))


def default_head_offsets(num_heads: int) -> tuple[int, ...]:
    """An eighth of the heads (at least one) looks one frame back, as many one frame ahead: 2 of 12, 4 of 16."""
    n = max(1, num_heads // 8)
    if 2 * n > num_heads:
        raise InputError(f"{num_heads} attention head is too few: two are needed to look back and ahead.")
    return (*[-1] * n, *[1] * n, *[0] * (num_heads - 2 * n))


@dataclass(frozen=True)
class ZeroI2VConfig(AdapterConfig):
    """Settings of ZeroI2V.

    Attributes:
        head_offsets: per head the frame distance it looks at (0: its own frame), for all blocks, or one such tuple per
            block; `None` takes `default_head_offsets`.
        num_frames: clip length T of the temporal embedding.
        bottleneck_ratio: width of the adapters relative to the tokens; 0 leaves them out, which is the merged form.
        scale: s; 0.5 for Kinetics, UCF101 and HMDB51, 1.0 for Something-Something in the official configurations.
        dropout: on the bottleneck while training.
        placement: which of `PLACES` get an adapter.
        temporal_embedding: add the learned (1, T, D) embedding.
        train_norm: also train the final norm.
        targets: which blocks, `None` for all.
    """

    head_offsets: tuple[Any, ...] | None = None
    num_frames: int = 8
    bottleneck_ratio: float = 0.25
    scale: float = 0.5
    dropout: float = 0.1
    placement: tuple[str, ...] = PLACES
    temporal_embedding: bool = True
    train_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.num_frames, int) or self.num_frames < 1:
            raise InputError(f"ZeroI2VConfig: num_frames must be an integer from 1, not {self.num_frames!r}.")
        numbers = (self.bottleneck_ratio, self.scale, self.dropout)
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers):
            raise InputError(f"ZeroI2VConfig: bottleneck_ratio, scale and dropout must be numbers, not {numbers}.")
        if not 0 <= self.dropout < 1 or self.bottleneck_ratio < 0:
            raise InputError(
                "ZeroI2VConfig: dropout must lie in [0, 1) and bottleneck_ratio be at least 0, not "
                f"{self.dropout} and {self.bottleneck_ratio}."
            )
        if isinstance(self.placement, str) or set(self.placement) - set(PLACES):
            raise InputError(f"ZeroI2VConfig: placement must be a selection of {PLACES}, not {self.placement!r}.")
        if self.head_offsets is not None and not isinstance(self.head_offsets, (tuple, list)):
            raise InputError(f"ZeroI2VConfig: head_offsets must be a tuple of integers, not {self.head_offsets!r}.")


class LinearAdapter(nn.Module):
    """A(x) = x + s (W2 dropout(W1 x + b1) + b2), (..., D) -> (..., D) in x's dtype; the identity at the start."""

    def __init__(self, dim: int, ratio: float, scale: float, dropout: float):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.down = nn.Linear(dim, max(1, int(dim * ratio)))
        self.up = nn.Linear(self.down.out_features, dim)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        for p in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)

    def forward(self, x: Tensor, args: Any = ()) -> Tensor:
        h = F.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype))
        h = F.dropout(h, self.dropout, self.training)
        return x + self.scale * F.linear(h, self.up.weight.to(x.dtype), self.up.bias.to(x.dtype))

    def affine(self) -> tuple[Tensor, Tensor]:
        """(M, m) in float64 with A(x) = M x + m: M = s W2 W1 + I, m = s (W2 b1 + b2)."""
        w1, b1 = self.down.weight.detach().double(), self.down.bias.detach().double()
        w2, b2 = self.up.weight.detach().double(), self.up.bias.detach().double()
        eye = torch.eye(w2.shape[0], dtype=w2.dtype, device=w2.device)
        return self.scale * (w2 @ w1) + eye, self.scale * (w2 @ b1 + b2)


class TemporalEmbedding(nn.Module):
    """Adds one vector per frame to all its tokens, (B*T, N, D) -> the same; other clip lengths interpolate linearly."""

    def __init__(self, num_frames: int, dim: int):
        super().__init__()
        self.temporal_embedding = nn.Parameter(torch.zeros(1, num_frames, dim))

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """`num_frames` is T of this batch."""
        table = resample_frames(self.temporal_embedding, num_frames)
        return (x.unflatten(0, (-1, num_frames)) + table.to(x.dtype).unsqueeze(2)).flatten(0, 1)


def resample_frames(table: Tensor, num_frames: int) -> Tensor:
    """A temporal embedding `(1, T, D)` for clips of `num_frames` frames, by linear interpolation."""
    if num_frames == table.shape[1]:
        return table
    return F.interpolate(table.transpose(1, 2), num_frames, mode="linear", align_corners=False).transpose(1, 2)


def shift_heads(packed: Tensor, offsets: Sequence[int], num_frames: int) -> Tensor:
    """Give every head the keys and values of its neighbouring frame.

    Args:
        packed: (B*T, N, 3D) queries, keys and values, heads in order inside each; frames of a clip in adjacent rows.
        offsets: per head; frame t reads frame t + offset, or itself where that lies outside the clip.
        num_frames: T.

    Returns:
        The same shape. A tensor that needs no gradient is changed in place.
    """
    out = packed.clone() if packed.requires_grad else packed
    source = packed.unflatten(-1, (3, len(offsets), -1)).unflatten(0, (-1, num_frames))  # (B, T, N, 3, h, d)
    target = out.unflatten(-1, (3, len(offsets), -1)).unflatten(0, (-1, num_frames))
    for offset in sorted(set(offsets)):
        if offset == 0 or abs(offset) >= num_frames:
            continue
        later, earlier = slice(abs(offset), None), slice(None, -abs(offset))
        into, read = (later, earlier) if offset < 0 else (earlier, later)
        for first, last in _runs(offsets, offset):
            kv = source[:, read, :, 1:, first:last]
            target[:, into, :, 1:, first:last] = kv if out is not packed else kv.clone()
    return out


def _runs(offsets: Sequence[int], value: int) -> list[tuple[int, int]]:
    """[first, last) of each run of `value`: neighbouring heads move together in one copy."""
    runs: list[tuple[int, int]] = []
    for i, offset in enumerate(offsets):
        if offset == value:
            if runs and runs[-1][1] == i:
                runs[-1] = (runs[-1][0], i + 1)
            else:
                runs.append((i, i + 1))
    return runs


class _Block(NamedTuple):
    """Module paths inside one block."""

    attn: str
    attn_in: str
    attn_out: str
    mlp_in: str
    mlp_out: str


_LAYOUTS = (  # timm and open_clip
    _Block("attn", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    _Block("attn", "attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"),
)


class _Shift(hooks.Action):
    """On a packed projection: moves keys and values between frames."""

    def __init__(self, adapter: ZeroI2V, offsets: tuple[int, ...]):
        self.adapter, self.offsets = adapter, offsets

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        output = below(*args, **kwargs)
        if output.dim() != 3:
            raise InputError(f"ZeroI2V needs tokens (B*T, N, D); this backbone computes {tuple(output.shape)}.")
        return shift_heads(output, self.offsets, self.adapter.clip_length(output.shape[0]))


class _Embed(hooks.Action):
    """The temporal embedding is added to the tokens that a module is given."""

    def __init__(self, adapter: ZeroI2V, site: nn.Module):
        self.adapter, self.site = adapter, site
        self.modules = (site,)

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return below(self.site(args[0], self.adapter.clip_length(args[0].shape[0])), *args[1:], **kwargs)


class _Before(hooks.Action):
    """The site's adapter acts on the input of a linear layer."""

    def __init__(self, site: nn.Module):
        self.site = site
        self.modules = (site,)

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return below(self.site(args[0]), *args[1:], **kwargs)


@register_adapter("zeroi2v")
class ZeroI2V(Adapter):
    """The adapter; see the module. Feed the backbone (B*T, C, H, W) with the frames of a clip in adjacent rows.

    Clips have `config.num_frames` frames unless the call says otherwise: `with forward_context(num_frames=T)`, as `VideoClassifier`
    does. After a merge, attention across frames and the temporal embedding stay on the model; they cost nothing.
    """

    config_class = ZeroI2VConfig
    tasks = ("video-classification",)

    def clip_length(self, rows: int) -> int:
        """T for a batch of `rows` frames. Raises `InputError` when they are not whole clips."""
        context = current_context()
        frames = self.config.num_frames if context is None or context.num_frames is None else context.num_frames
        if rows % frames:
            raise InputError(f"{rows} frames are not whole clips of {frames}; give forward_context(num_frames=T).")
        return frames

    @property
    def rows_at_once(self) -> int:  # type: ignore[override]
        """Frames of one clip."""
        return self.config.num_frames

    def starts_as_identity(self) -> bool:
        return False  # heads look at other frames from the start

    def build(self, model: nn.Module) -> None:
        blocks = self._blocks(model)
        self.offsets(model)
        plain: dict[str, Any] = dict(hooks.named_plain_modules(model))
        c = self.config
        if c.temporal_embedding:
            self.add_site(self._entry(model), TemporalEmbedding(c.num_frames, _width(plain[blocks[0].attn_in])))
        if int(_width(plain[blocks[0].attn_in]) * c.bottleneck_ratio) > 0:
            for block in blocks:
                for place in PLACES:
                    if place in c.placement:
                        path = getattr(block, place)
                        dim = _width(plain[path]) if place.endswith("in") else plain[path].weight.shape[0]
                        self.add_site(path, LinearAdapter(dim, c.bottleneck_ratio, c.scale, c.dropout))
        if c.train_norm and (norm := _final_norm(plain, _root(blocks[0].attn))):
            self.saved[norm.replace(".", "/")] = hooks.trained_copy(plain[norm])
        self.to(plain[blocks[0].mlp_in].weight.device)

    def install(self, model: nn.Module) -> None:
        blocks = self._blocks(model)
        if self.config.temporal_embedding:
            entry = self._entry(model)
            self.link(model, entry, _Embed(self, self.site(entry)), slot="frames", folds=False)
        for block, offsets in zip(blocks, self.offsets(model), strict=True):
            if any(offsets):
                self.link(model, block.attn_in, _Shift(self, offsets), slot="frames", folds=False)
        sites = set(self.own_paths)
        for block in blocks:
            for place in PLACES:
                path = getattr(block, place)
                if path in sites:
                    site = self.site(path)
                    self.link(model, path, _Before(site) if place.endswith("in") else hooks.SiteAction(site))

    @property
    def added_biases(self) -> list[str]:
        """Paths of the layers that had no bias before `merge` folded one in."""
        return [path for path, name, before in self._backup if before is None and name == "bias"]

    @property
    def has_linear_adapters(self) -> bool:
        """Whether there is anything to fold."""
        return any(isinstance(s, LinearAdapter) for s in self.sites.values())

    def offsets(self, model: nn.Module | None = None) -> list[tuple[int, ...]]:
        """Per block, the frame offset of each head. Raises `InputError` when the configured table does not fit."""
        model = self.model if model is None else model
        heads = [_num_heads(hooks.unwrap(hooks.get_module(model, b.attn))) for b in self._blocks(model)]
        table = self.config.head_offsets
        if table is None:
            return [default_head_offsets(h) for h in heads]
        rows = list(table) if table and isinstance(table[0], (tuple, list)) else [table] * len(heads)
        if [len(r) for r in rows] != heads or not all(isinstance(v, int) for r in rows for v in r):
            raise InputError(
                f"head_offsets needs one integer per head ({heads[0]} heads, {len(heads)} blocks); got {table}."
            )
        return [tuple(r) for r in rows]

    def _blocks(self, model: nn.Module) -> list[_Block]:
        """Paths of the blocks, `nn.MultiheadAttention` made explicit so that hooks act on it."""
        self.make_explicit(model)
        names = [n for n, _ in hooks.named_plain_modules(model)]
        known, found = set(names), []
        for path in backbone_info(model).blocks:
            for layout in _LAYOUTS:
                block = _Block(*(f"{path}.{part}" for part in layout))
                if known.issuperset(block):
                    found.append(block)
        if not found or not all(_is_plain(model, block) for block in found):
            raise InputError(
                "ZeroI2V needs a plain ViT of timm or open_clip: blocks that call attn.qkv and mlp.fc1 (or attn.in_proj and "
                f"mlp.c_fc) on all tokens of a frame; {type(model).__name__} has others (windows, or weights read directly)."
            )
        if self.config.targets is None:
            return found
        chosen = set(match_targets(self.config.targets, [b.attn.removesuffix(".attn") for b in found]))
        if not chosen:
            raise InputError(
                f"targets={self.config.targets!r} matches no block; there are {found[0].attn} to {found[-1].attn}."
            )
        return [b for b in found if b.attn.removesuffix(".attn") in chosen]

    def _entry(self, model: nn.Module) -> str:
        """The module whose input gets the temporal embedding: the norm before the blocks (an identity counts)."""
        first = backbone_info(model).blocks[0]
        names = {n for n, _ in hooks.named_plain_modules(model)}
        root = _root(f"{first}.attn")
        return next((f"{root}{n}" for n in ("norm_pre", "ln_pre") if f"{root}{n}" in names), first)

    # -- merging

    def merge_edits(self, model: nn.Module) -> list[Edit]:
        edits: list[Edit] = []
        for block in self._blocks(model):
            for place in PLACES:
                path = getattr(block, place)
                if path in self.own_paths:
                    edits += self._folded(path, hooks.unwrap(hooks.get_module(model, path)), place.endswith("in"))
        if not edits:
            raise NotMergeableError("There are no linear adapters to fold: the model is merged already.")
        return edits

    def _folded(self, path: str, module: Any, before: bool) -> list[Edit]:
        matrix, shift = self.site(path).affine()  # type: ignore[operator]
        weight = module.weight.detach().double()
        bias = torch.zeros_like(weight[:, 0]) if module.bias is None else module.bias.detach().double()
        if module.bias is None and isinstance(module, InProjection):
            raise NotMergeableError(f"{path} has no bias to fold into.", [path])
        if before:  # W (M x + m) + b
            weight, bias = weight @ matrix, weight @ shift + bias
        else:  # M (W x + b) + m
            weight, bias = matrix @ weight, matrix @ bias + shift
        if isinstance(module, InProjection):  # it only shows the tensors of the attention around it
            path = path.rpartition(".")[0]
            return [Edit(path, "in_proj_weight", weight), Edit(path, "in_proj_bias", bias)]
        return [Edit(path, "weight", weight), Edit(path, "bias", bias)]


def _root(attn_path: str) -> str:
    """ "backbone." from "backbone.blocks.0.attn", "" from "transformer.resblocks.0.attn"."""
    return attn_path.removesuffix(".attn").rpartition(".")[0].removesuffix("blocks").removesuffix("transformer.res")


def _is_plain(model: nn.Module, block: _Block) -> bool:
    """Whether attention runs over whole frames, and through the projection module, so that a hook on it acts.

    BEiT and EVA join `q_bias` and `v_bias` outside the projection and then read its weight directly.
    """
    attention: Any = hooks.unwrap(hooks.get_module(model, block.attn))
    parent: Any = hooks.unwrap(hooks.get_module(model, block.attn.removesuffix(".attn")))
    direct = getattr(attention, "q_bias", None) is not None and not getattr(attention, "qkv_bias_separate", False)
    windows = any(getattr(m, name, None) for m in (parent, attention) for name in ("window_size", "partition_size"))
    maps = not isinstance(
        hooks.unwrap(hooks.get_module(model, block.attn_in)), nn.Linear
    )  # convolutions see (B, C, H, W)
    return hasattr(attention, "num_heads") and not (direct or windows or maps)


def _width(module: Any) -> int:
    return int(module.weight.shape[1])


def _num_heads(attention: Any) -> int:
    return int(attention.num_heads)


def _final_norm(plain: dict[str, nn.Module], root: str) -> str | None:
    for name in ("norm", "ln_post", "fc_norm"):
        module = plain.get(f"{root}{name}")
        if module is not None and any(True for _ in module.parameters()):
            return f"{root}{name}"
    return None


def warn_other_length(trained: int, num_frames: int) -> None:
    """Tell that a clip length differs from training: the embedding is interpolated, offsets stay in frames."""
    warnings.warn(
        f"The model was made for clips of {trained} frames and gets {num_frames}: its temporal embedding is "
        "interpolated; heads look as many frames away as before, which is another time when the stride changes.",
        stacklevel=3,
    )
