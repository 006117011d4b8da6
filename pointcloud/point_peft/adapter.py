"""Point-PEFT: prompts that remember the training set, adapters that know the neighbourhood, and biases. arXiv 2310.03059 (AAAI 2024).

In every block: the biases are tuned, a bottleneck adapter reads the MLP's output, tokens are mixed within neighbourhoods of their
centres (one small attention for all blocks, then carried back by inverse distance), and a second bottleneck follows. Blocks of the
first half also get prompt tokens: learned ones, plus a prior made of the cloud's own global feature and of those entries of a
memory bank that are most like it. The feature is that of the frozen model: the same weights, with this adapter silent.

Deviations from the official code (Ivan-Tang-3D/Point-PEFT), which `index_mode="official"` undoes: there, prompt blocks take their
neighbour indices from a grouping of learned prompt coordinates and points, but read a token table that is ten rows longer per
sample, so that rows belong to other tokens and, from the second sample on, to other samples; aligned indices are those of the
sample's own centres. Official mode also creates the parameters that are never used, so that counts agree, and is the only mode for
released weights. `init="zero"` starts with silent adapters and a silent neighbourhood step (not official).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from mmkit.adapters import Adapter, AdapterConfig, Edit, current_context, forward_context, hooks, register_adapter
from mmkit.adapters.bitfit import Shift
from mmkit.adapters.stack import eval_mode
from mmkit.errors import InputError, NotMergeableError
from mmkit.ops.points import group_points, inverse_distance_weights
from mmkit.pointcloud.point_peft.bank import FeatureMemoryBank, Retrieved, retrieve

BIASES = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
"""Modules of a block whose bias is tuned."""

QUERY, OWN = "point_query", "bank_index"
"""What a caller may give in `forward_context(store={...})`: features (B, D) to search the bank with instead of the frozen model's,
and the bank's entry that each cloud is itself (B,), which is then not found."""

_TOKENIZER_NORMS = ("encoder.first_conv.1", "encoder.second_conv.1")


@dataclass(frozen=True)
class PointPEFTConfig(AdapterConfig):
    """Settings of Point-PEFT.

    Attributes:
        num_prompts: T, prompt tokens per block; 0 for none. The bank gives T - 2 entries.
        prompt_depth: the first so many blocks get prompts; `None`: half of them. The release has 6.
        adapter_dim, prompt_dim, local_dim: widths of the bottlenecks and of the attention inside neighbourhoods.
        mlp_scale, propagate_scale, center_scale: strengths of the MLP's adapter, of what is carried back, and of the centres in it.
        dropout: of adapters and prompts while training.
        bank_size: entries of the memory bank, which is stored with the adapter (see `set_bank`); 0: no prior.
        geometry: mix tokens within neighbourhoods.
        tune_bias: train the biases of the blocks.
        freeze_bn: keep the tokeniser's batch statistics; `False` lets them follow the new data, as the release does, in copies that
            are stored with the adapter.
        index_mode: "aligned" or "official", see the module.
        init: "official" (random) or "zero".
    """

    num_prompts: int = 10
    prompt_depth: int | None = None
    adapter_dim: int = 16
    prompt_dim: int = 8
    local_dim: int = 18
    mlp_scale: float = 0.7
    propagate_scale: float = 0.3
    center_scale: float = 0.3
    dropout: float = 0.1
    bank_size: int = 0
    geometry: bool = True
    tune_bias: bool = True
    freeze_bn: bool = True
    index_mode: str = "aligned"
    init: str = "official"
    modules_to_save: tuple[str, ...] = ("cls", "norm", "head")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.index_mode not in ("aligned", "official") or self.init not in ("official", "zero"):
            raise InputError(
                f"index_mode is 'aligned' or 'official', init 'official' or 'zero'; got {self.index_mode!r}, {self.init!r}."
            )
        if min(self.adapter_dim, self.prompt_dim) < 1 or self.local_dim < 6 or self.local_dim % 6:
            raise InputError("adapter_dim and prompt_dim must be at least 1, local_dim a multiple of 6.")
        if min(self.num_prompts, self.bank_size) < 0 or (self.bank_size and self.num_prompts < 3):
            raise InputError("num_prompts and bank_size cannot be negative; a bank needs at least 3 prompts.")
        if self.bank_size and self.bank_size < self.num_prompts - 2:
            raise InputError(
                f"A bank of {self.bank_size} entries cannot give {self.num_prompts - 2}: use num_prompts={self.bank_size + 2}."
            )


class Bottleneck(nn.Module):
    """A(z) = W2 drop(qgelu(W1 z + b1)) + b2, (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden: int, dropout: float, zero: bool):
        super().__init__()
        self.down, self.up, self.dropout = nn.Linear(dim, hidden), nn.Linear(hidden, dim), dropout
        for layer in (self.down, self.up):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)
        if zero:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, z: Tensor) -> Tensor:
        u = self.down(z.to(self.down.weight.dtype))
        return self.up(F.dropout(u * torch.sigmoid(1.702 * u), self.dropout, self.training)).to(z.dtype)


class MLPAdapter(nn.Module):
    """f + scale * A(f)."""

    def __init__(self, adapter: Bottleneck, scale: float):
        super().__init__()
        self.adapter, self.scale = adapter, scale

    def forward(self, f: Tensor, args: Any = ()) -> Tensor:
        return f + self.scale * self.adapter(f)


class LocalAttention(nn.Module):
    """Self-attention inside neighbourhoods (n, K, D), the norm before it included; one for all blocks.

    Six heads of local_dim / 6 channels; the scale is local_dim ** -0.5, as published.
    """

    def __init__(self, dim: int, local_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * local_dim, bias=False), nn.Linear(local_dim, dim)
        self.scale = local_dim**-0.5

    def forward(self, n: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(n)).unflatten(-1, (3, 6, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


class BlockTuner(nn.Module):
    """What one block owns: prompts with their adapter, the norm of the neighbourhood step, the last bottleneck."""

    def __init__(self, dim: int, config: PointPEFTConfig, prompted: bool, drop_path: float):
        super().__init__()
        zero = config.init == "zero"
        self.prompted = prompted
        self.dropout = config.dropout
        self.out = Bottleneck(dim, config.adapter_dim, config.dropout, zero)
        if prompted or (config.num_prompts and config.index_mode == "official"):
            self.prompts = nn.Parameter(torch.empty(config.num_prompts, dim))
            nn.init.trunc_normal_(self.prompts, std=0.02)
            if config.bank_size or config.index_mode == "official":
                self.prompt_adapter = Bottleneck(dim, config.prompt_dim, config.dropout, zero)
        if config.geometry:
            self.norm = nn.BatchNorm1d(dim)
            self.drop_path = DropPath(drop_path)
            if zero:
                self.gate = nn.Parameter(torch.zeros(1))
        if config.index_mode == "official":
            self.ad_gate = nn.Parameter(torch.zeros(1))

    def prompt_tokens(self, prior: Tensor | None, batch: int) -> Tensor:
        """(B, T, D)."""
        learned = F.dropout(self.prompts.expand(batch, -1, -1), self.dropout, self.training)
        if prior is None:
            return learned
        prior = prior.to(learned.dtype)
        return learned + prior + self.prompt_adapter(prior)


class Prior(nn.Module):
    """The memory bank, and in official mode the coordinates of the prompts."""

    def __init__(self, dim: int, config: PointPEFTConfig):
        super().__init__()
        if config.bank_size:
            self.register_buffer("bank", torch.zeros(dim, config.bank_size))
        if config.index_mode == "official":
            self.prompt_cor = nn.Parameter(torch.randn(config.num_prompts, 3) * 0.02)


@dataclass
class Neighbours:
    """Second-level groups: rows of a flat token table (B G2, K2) and (B G2,), and weights (B, G, G2) that carry back."""

    idx: Tensor
    center_idx: Tensor
    weights: Tensor


@dataclass
class CallState:
    """What one forward pass hands from the grouping to the blocks."""

    num_groups: int
    plain: Neighbours | None = None
    prompted: Neighbours | None = None
    prior: Tensor | None = None
    retrieved: Retrieved | None = field(default=None, repr=False)


def neighbours_of(center: Tensor, group_size: int, skip_origin: bool) -> Neighbours:
    """Groups of half as many centres with half as many members each, among `center` (B, G, 3)."""
    batch, g = center.shape[:2]
    second = group_points(center, max(1, g // 2), min(max(1, group_size // 2), g), skip_origin=skip_origin)
    offset = torch.arange(batch, device=center.device) * g
    return Neighbours(
        (second.idx + offset[:, None, None]).flatten(0, 1),
        (second.center_idx + offset[:, None]).flatten(),
        inverse_distance_weights(center, second.center),
    )


class _Prepare(hooks.Action):
    """On the grouping: finds second-level groups and the prior, and leaves them in the call's context."""

    def __init__(self, adapter: PointPEFT, modules: tuple[nn.Module, ...]):
        self.adapter, self.modules = adapter, modules

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = below(*args, **kwargs)
        context = current_context()
        if context is not None:
            context.store[self.adapter.key] = self.adapter.prepare(args[0], *out)
        return out

    def blended(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any], strength: Any) -> Any:
        return self.run(below, args, kwargs)


class _Through(hooks.Action):
    """On the drop path of the attention: nothing is dropped, as in the release."""

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0]


class _Instead(hooks.Action):
    """A norm of the tokeniser whose statistics follow the data; its mode is that of the grouping, for the frozen norm stays in eval."""

    def __init__(self, site: nn.Module):
        self.site = site

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.site(args[0])


class _TuneBlock(hooks.Action):
    """Around a block: prompts in, neighbourhoods and the last bottleneck after it, prompts out."""

    def __init__(self, adapter: PointPEFT, tuner: BlockTuner, local: nn.Module | None):
        self.adapter, self.tuner, self.local = adapter, tuner, local
        self.modules = (tuner,) if local is None else (tuner, local)

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        context, x = current_context(), args[0]
        state = None if context is None else context.store.get(self.adapter.key)
        if state is None or x.shape[1] < state.num_groups:
            raise InputError("Point-PEFT acts on whole clouds: call the model, not its blocks, and hide no groups.")
        prefix = x.shape[1] - state.num_groups
        prompted = self.tuner.prompted
        prompts = self.tuner.prompt_tokens(state.prior, len(x)).to(x.dtype) if prompted else x[:, :0]
        count = prompts.shape[1]
        x = below(torch.cat([x[:, :prefix], prompts, x[:, prefix:]], 1), **kwargs)
        first, prompts, tokens = x.split([prefix, count, state.num_groups], 1)
        if self.local is not None:
            official = prompted and state.prompted is not None
            table = torch.cat([prompts, tokens], 1) if official else tokens
            tokens = self.mix(tokens, table.flatten(0, 1), state.prompted if official else state.plain)
        x = torch.cat([first, tokens], 1)  # the prompts are not read any more
        return x + self.tuner.out(x)

    def mix(self, tokens: Tensor, table: Tensor, near: Neighbours) -> Tensor:
        """Tokens (B, G, D) plus what their neighbourhoods, rows of `table`, say."""
        config, tuner = self.adapter.config, self.tuner
        table = table.to(tuner.norm.weight.dtype)
        n = table[near.idx]
        n = n + tuner.drop_path(self.local(n))  # type: ignore[misc]
        v = F.gelu(tuner.norm(n.amax(1))) + config.center_scale * table[near.center_idx]
        carried = near.weights.to(v.dtype) @ v.unflatten(0, (len(tokens), -1))
        return tokens + (config.propagate_scale * carried * getattr(tuner, "gate", 1.0)).to(tokens.dtype)


@register_adapter("point_peft")
class PointPEFT(Adapter):
    """The adapter; see the module. It goes on a `PointMAE` (or Point-BERT) classifier, or a segmenter.

    Example:
        >>> import torch
        >>> from mmkit import apply_adapter
        >>> from mmkit.pointcloud.point_peft import FeatureMemoryBank, point_mae_nano
        >>> model, clouds = point_mae_nano(), torch.rand(16, 256, 3)
        >>> bank = FeatureMemoryBank.build(model, clouds.split(8))
        >>> adapter = apply_adapter(model, "point_peft", bank_size=len(bank))
        >>> adapter.set_bank(bank)
        >>> tuple(model(clouds).shape)
        (16, 16)
    """

    config_class = PointPEFTConfig
    tasks = ("point-cloud-classification", "point-cloud-segmentation")

    @property
    def key(self) -> tuple[str, str]:
        """Where this adapter's state of a call lies in the context's store."""
        return self.method, self.name

    def starts_as_identity(self) -> bool:
        return self.config.init == "zero" and not self.config.num_prompts

    def set_bank(self, bank: FeatureMemoryBank) -> None:
        """Give the adapter its memory, of the width of the tokens and with `config.bank_size` entries. Raises `InputError`."""
        own = getattr(self.site("group"), "bank", None)
        want = None if own is None else tuple(own.shape)
        if want != tuple(bank.features.shape):
            raise InputError(
                f"The bank is {tuple(bank.features.shape)} (width, entries); this adapter was made for {want}. Build it with the same "
                "encoder and attach with bank_size=len(bank)."
            )
        own.copy_(bank.features)  # type: ignore[union-attr]

    def _prompt_depth(self, depth: int) -> int:
        wanted = depth // 2 if self.config.prompt_depth is None else self.config.prompt_depth
        return min(wanted, depth) if self.config.num_prompts else 0

    def build(self, model: nn.Module) -> None:
        config = self.config
        root = require_point_model(model, self.method)
        dim, depth = root.embed_dim, len(root.blocks)
        zero = config.init == "zero"
        self.add_site("group", Prior(dim, config))
        if config.geometry:
            self.add_site("blocks", LocalAttention(dim, config.local_dim))
        for i, block in enumerate(root.blocks):
            drop_path = getattr(block.drop_path2, "drop_prob", 0.0)
            self.add_site(f"blocks.{i}", BlockTuner(dim, config, i < self._prompt_depth(depth), drop_path))
            unit = Bottleneck(dim, config.adapter_dim, config.dropout, zero)
            self.add_site(f"blocks.{i}.drop_path2", MLPAdapter(unit, config.mlp_scale))
            for name in BIASES if config.tune_bias else ():
                module = hooks.get_module(block, name)
                self.add_site(f"blocks.{i}.{name}", Shift(len(module.bias), -1))  # type: ignore[arg-type]
        for path in () if config.freeze_bn else _TOKENIZER_NORMS:
            copy = hooks.plain_copy(hooks.get_module(model, path))
            copy.__dict__.pop("train", None)
            self.add_site(path, copy.requires_grad_(False))
        self.to(next(model.parameters()).device)

    def install(self, model: nn.Module) -> None:
        norms = [self.site(p) for p in self.own_paths if p in _TOKENIZER_NORMS]
        self.link(model, "group", _Prepare(self, (self.site("group"), *norms)))
        local = self.sites["blocks"] if self.config.geometry else None
        for path in self.own_paths:
            site = self.site(path)
            if isinstance(site, BlockTuner):
                self.link(model, path, _TuneBlock(self, site, local))
                self.link(model, f"{path}.drop_path1", _Through())
            elif isinstance(site, MLPAdapter | Shift):
                self.link(model, path, hooks.SiteAction(site))
            elif path in _TOKENIZER_NORMS:
                self.link(model, path, _Instead(site))

    def prepare(self, points: Tensor, neighborhood: Tensor, center: Tensor) -> CallState:
        """What the blocks need to know about the clouds of this call."""
        config, group = self.config, hooks.get_module(self.model, "group")
        state = CallState(center.shape[1])
        if config.geometry:
            state.plain = neighbours_of(center, neighborhood.shape[2], group.skip_origin)  # type: ignore[arg-type]
            if config.index_mode == "official" and config.num_prompts:
                state.prompted = self._official_neighbours(points, *neighborhood.shape[1:3])
        if config.bank_size and config.num_prompts:
            state.retrieved, state.prior = self.recall(self._query(neighborhood, center))
        return state

    def _official_neighbours(self, points: Tensor, num_groups: int, group_size: int) -> Neighbours:
        """Those of the release: groups of prompt coordinates and points, whose rows are read as if they were tokens."""
        own: Any = self.site("group")
        skip = hooks.get_module(self.model, "group").skip_origin
        together = torch.cat([own.prompt_cor.to(points.dtype).expand(len(points), -1, -1), points], 1)
        center = group_points(together, num_groups, group_size, skip_origin=skip).center  # type: ignore[arg-type]
        return neighbours_of(center, group_size, skip)  # type: ignore[arg-type]

    @torch.no_grad()
    def _query(self, neighborhood: Tensor, center: Tensor) -> Tensor:
        """The global feature of the frozen model, which this adapter leaves alone meanwhile."""
        context, model = current_context(), self.model
        if context is not None and QUERY in context.store:
            return context.store[QUERY]
        gates = {**(context.gates if context is not None else {}), self.name: 0.0}
        with eval_mode(model), forward_context(gates=gates):
            return model.encode_groups(neighborhood, center).amax(1)  # type: ignore[operator]

    def recall(self, query: Tensor) -> tuple[Retrieved, Tensor]:
        """What the bank holds for queries (B, D), and the prior prompts (B, T, D): query, weighted mean, entries."""
        bank: Any = self.site("group").bank
        if query.shape[-1] != len(bank):
            raise InputError(f"The bank holds features of width {len(bank)}; the query is {tuple(query.shape)}.")
        if not bank.any():
            raise InputError(
                "The memory bank is empty: call adapter.set_bank(FeatureMemoryBank.build(model, clouds)) first."
            )
        context = current_context()
        own = None if context is None else context.store.get(OWN)
        found = retrieve(bank, query.to(bank.dtype), self.config.num_prompts - 2, own)
        mean = (found.weight.unsqueeze(-1) * found.feature).sum(1, keepdim=True)
        return found, torch.cat([query.unsqueeze(1), mean, found.feature], 1)

    @torch.no_grad()
    def retrieved(self, points: Tensor) -> Retrieved:
        """Which bank entries the prompts of these clouds (B, N, 3) are made from."""
        return self.recall(self._query(*self.model.group(points)))[0]  # type: ignore[operator]

    def merge_edits(self, model: nn.Module) -> list[Edit]:
        raise NotMergeableError("Point-PEFT adds tokens and non-linear layers: keep the adapter attached.")

    def official_keys(self, keys: Iterable[str]) -> dict[str, str]:
        """What tensors of an official file (as `official.plain_keys` names them) are called in this adapter."""
        mine, saved = self.state_dict(), tuple(f"{p}." for p in self.saved_paths)
        found = {key: functools.reduce(lambda k, pair: k.replace(*pair), _OFFICIAL, key) for key in keys}
        return {key: own for key, own in found.items() if own in mine and not key.startswith(saved)}


_OFFICIAL = (
    (".ln1.", ".down."),
    (".ln2.", ".up."),
    (".adapter.", ".drop_path2.adapter."),
    (".adapter1.", ".out."),
    (".cp_adapter.", ".prompt_adapter."),
    (".out_transform.0.", ".norm."),
    (".prompt_embeddings", ".prompts"),
    ("blocks.attn1.", "blocks."),
    ("blocks.norm3.", "blocks.norm."),
    ("prompt_cor", "group.prompt_cor"),
)


def require_point_model(model: nn.Module, method: str) -> Any:
    """The model, when it has the parts that these methods know."""
    missing = [n for n in ("group", "encoder", "blocks", "norm", "embed_dim", "encode_groups") if not hasattr(model, n)]
    if missing:
        raise InputError(
            f"{method!r} adapts point cloud transformers such as mmkit.pointcloud.point_peft.PointMAE; {type(model).__name__} has no "
            f"{', '.join(missing)}."
        )
    return model
