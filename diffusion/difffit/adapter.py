"""DiffFit: adapt a diffusion model by its biases, norms and a few scale factors. arXiv 2304.06648 (ICCV 2023).

Trained are, each as a difference that starts at zero: every bias, the affine parameters of every norm, the `scale_shift_table`s
of PixArt and Sana (which stand for the biases of a modulation layer), the class table of DiT, and scale factors
`gamma = 1 + gamma_delta` per output channel: `y' = gamma * (W x + b + bias_delta)`. All of it is linear in the weights and
folds into them, so that a merged model is a plain one.

No official code exists for diffusion transformers. Two placements of gamma are in circulation: "branch" scales what attention and
MLP add to the residual stream, "linear" every linear layer of attention and MLP. A gamma on a branch is a gamma on the branch's
last linear layer, so one primitive serves both.

Choices of this adapter:
- Parameters are selected by the type of their module. The rule by name in circulation (anything with "bias" or "norm" in it)
  would train the modulation layers `norm1.linear` of diffusers, 40 % of DiT-XL/2.
- diffusers' DiT holds a copy of the timestep and class embedders in every block. Equal copies share one difference here.
- Linear layers without a bias get one only with `create_bias=True`. A model without any is refused otherwise, because nothing
  of what the paper trains exists in it.
- Under torch.compile, the blocks of PixArt and Sana break the graph (diffusers marks them as opaque to it); merge first.
- Differences instead of values, and no weight decay, so that decay could never pull a gamma towards zero.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.adapters import Edit, SiteAdapter, hooks, register_adapter
from mmkit.adapters.bitfit import along
from mmkit.adapters.config import AdapterConfig
from mmkit.adapters.targets import match_targets, no_match
from mmkit.adapters.trial import channel_axis
from mmkit.diffusion.blocks import blocks_of, is_inner_linear, supported
from mmkit.diffusion.difffit.places import class_tables, is_branch_end, is_norm, shared_copies
from mmkit.errors import InputError

logger = logging.getLogger(__name__)

TABLE = "scale_shift_table"


@dataclass(frozen=True)
class DiffFitConfig(AdapterConfig):
    """Settings of DiffFit.

    Attributes:
        placement: where gammas sit: "branch", "linear", or "none" (biases and norms alone).
        scale_blocks: how many of the first blocks get gammas: a number, "half" or "all".
        scale_modulation: with "linear", also scale the modulation layers (adaLN) of the blocks.
        train_bias, train_norm, train_class_table: what is trained beside gammas.
        create_bias: give linear layers and convolutions without a bias one (zero at the start; a merge adds the parameter).
        targets: modules that get a gamma instead of those of `placement`; any architecture then.
        exclude: modules that are left out of everything.
    """

    placement: str = "branch"
    scale_blocks: int | str = "half"
    scale_modulation: bool = False
    train_bias: bool = True
    train_norm: bool = True
    train_class_table: bool = True
    create_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.placement not in ("branch", "linear", "none"):
            raise InputError(f"placement is 'branch', 'linear' or 'none', not {self.placement!r}.")
        blocks = self.scale_blocks
        if blocks not in ("half", "all") and (not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 0):
            raise InputError(f"scale_blocks is a number of blocks, 'half' or 'all', not {blocks!r}.")
        for name in ("scale_modulation", "train_bias", "train_norm", "train_class_table", "create_bias"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is True or False, not {getattr(self, name)!r}.")


class ScaleBias(nn.Module):
    """`(1 + gamma_delta) * (y + bias_delta)` along axis `axis` of y; either part may be missing."""

    def __init__(self, dim: int, axis: int, gamma: bool, bias: bool):
        super().__init__()
        self.axis = axis
        self.gamma_delta = nn.Parameter(torch.zeros(dim)) if gamma else None
        self.bias_delta = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, y: Tensor, args: Any = ()) -> Tensor:
        """(..., dim) or (B, dim, ...) -> the same shape and dtype."""
        if self.bias_delta is not None:
            y = y + along(self.bias_delta.to(y.dtype), self.axis, y.dim())
        if self.gamma_delta is not None:
            y = y * along((1 + self.gamma_delta).to(y.dtype), self.axis, y.dim())
        return y


class NormDelta(nn.Module):
    """Adds the answer of a copy of the norm whose weight and bias are the differences: a norm is linear in both."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.delta = hooks.plain_copy(norm).float().requires_grad_(True)
        for p in self.delta.parameters():
            nn.init.zeros_(p)

    def forward(self, y: Tensor, args: Any) -> Tensor:
        """The norm's output y for input `args[0]` -> the same shape and dtype."""
        dtype = next(self.delta.parameters()).dtype
        return y + self.delta(args[0].to(dtype)).to(y.dtype)


class TableDelta(nn.Module):
    """Adds rows of a table to what an embedding looked up."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.table_delta = nn.Parameter(torch.zeros(weight.shape, device=weight.device))

    def forward(self, y: Tensor, args: Any) -> Tensor:
        """The embedding's output y for indices `args[0]` -> the same shape and dtype."""
        return y + F.embedding(args[0], self.table_delta).to(y.dtype)


class ParameterDelta(nn.Module):
    """A difference to a parameter that a module holds directly."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(value.shape, device=value.device))


class ParameterAction(hooks.Action):
    """While the module is called, its parameter `name` reads as `parameter + delta`.

    A strength between 0 and 1 scales the difference, as a merge does; strengths per row blend outputs.
    """

    def __init__(self, host: nn.Module, name: str, site: nn.Module):
        self.host, self.name, self.site = host, name, site
        self.modules = (site,)

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any], strength: float = 1.0) -> Any:
        own = self.host.__dict__
        before = own.get(self.name)
        value = getattr(self.host, self.name)
        own[self.name] = value + strength * self.site.delta.to(value.dtype)  # type: ignore[union-attr, operator]
        try:
            return below(*args, **kwargs)
        finally:
            del own[self.name]
            if before is not None:
                own[self.name] = before

    def blended(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any], strength: Any) -> Any:
        if isinstance(strength, float):
            return self.run(below, args, kwargs, strength)
        return super().blended(below, args, kwargs, strength)

    def needs_trial(self, scale: float) -> bool:
        return False  # a merge writes the very tensor that the module computes with


@register_adapter("difffit")
class DiffFit(SiteAdapter):
    """Biases, norms and scale factors of a diffusion model; see the module docstring."""

    config_class = DiffFitConfig
    tasks = ("text-to-image",)
    decays = False

    def is_site(self, path: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and channel_axis(module) is not None

    def build(self, model: nn.Module) -> None:
        self._copies = shared_copies(model)
        plain = {p: m for p, m in hooks.named_plain_modules(model) if p not in self._copies}
        kept = [p for p in plain if not self.inside_saved(p)]
        left_out = set(match_targets(self.config.exclude, kept))
        plain = {p: plain[p] for p in kept if p not in left_out}
        scaled = self._scaled_paths(model, plain)
        biased = self._biased_paths(plain)
        for path, module in plain.items():
            site = self._site_for(path, module, path in scaled, path in biased)
            if site is not None:
                weight = getattr(module, "weight", None)
                self.add_site(path, site.to(weight.device) if isinstance(weight, Tensor) else site)
            if self.config.train_bias and isinstance(module._parameters.get(TABLE), Tensor):
                self.add_site(path, ParameterDelta(module._parameters[TABLE]), TABLE)  # type: ignore[arg-type]
        if not self.sites:
            raise InputError(
                "DiffFit has nothing to train here: placement='none' and nothing else was switched on or found."
            )

    def _site_for(self, path: str, module: nn.Module, gamma: bool, bias: bool) -> nn.Module | None:
        if gamma or bias:
            dim, axis = channel_axis(module)  # type: ignore[misc]
            return ScaleBias(dim, axis, gamma, bias)
        if self.config.train_norm and is_norm(module):
            return NormDelta(module)
        if self.config.train_class_table and path in self._tables:
            return TableDelta(module.weight)  # type: ignore[arg-type]
        return None

    def _scaled_paths(self, model: nn.Module, plain: dict[str, nn.Module]) -> set[str]:
        """Modules that get a gamma."""
        config = self.config
        self._tables = set(class_tables(model))
        candidates = [p for p, m in plain.items() if self.is_site(p, m)]
        if config.targets is not None:
            paths = match_targets(config.targets, candidates)
            if not paths:
                raise no_match(self.method, config.targets, candidates, [p for p in plain if p])
            return set(paths)
        blocks = blocks_of(model)
        if not blocks:
            raise InputError(
                f"DiffFit does not know the blocks of {type(model).__name__}. It knows those of {', '.join(supported())}. For "
                "another model name the modules that get scale factors: targets=('attn.proj', 'mlp.fc2')."
            )
        if config.placement == "none":
            return set()
        count = {"half": (len(blocks) + 1) // 2, "all": len(blocks)}.get(config.scale_blocks, config.scale_blocks)
        if count > len(blocks):
            raise InputError(
                f"scale_blocks={count}, but the model has {len(blocks)} blocks. Give at most that, or 'all'."
            )
        chosen = blocks[:count]
        inside = {p: p[len(b) + 1 :] for p in candidates for b in chosen if p.startswith(f"{b}.")}
        if config.placement == "branch":
            return {p for p, rest in inside.items() if is_branch_end(rest)}
        return {p for p, rest in inside.items() if is_inner_linear(rest, config.scale_modulation)}

    def _biased_paths(self, plain: dict[str, nn.Module]) -> set[str]:
        """Modules that get a difference to their bias, or a bias where there is none."""
        config = self.config
        if not config.train_bias:
            return set()
        affine = {p: m for p, m in plain.items() if self.is_site(p, m)}
        found = {p for p, m in affine.items() if getattr(m, "bias", None) is not None}
        if config.create_bias:
            return set(affine)
        if not found:
            norms = sum(is_norm(m) for m in plain.values())
            raise InputError(
                f"0 biases found in {len(affine)} linear layers and convolutions ({norms} norms with parameters): what DiffFit trains is "
                "not there. Pass create_bias=True to give every layer a bias, or train_bias=False to train scales and norms alone."
            )
        if len(found) < len(affine) / 2:
            logger.warning(
                "DiffFit: only %d of %d layers have a bias; create_bias=True gives the others one.",
                len(found),
                len(affine),
            )
        return found

    def choices(self, model: nn.Module) -> list[str]:
        fresh = type(self)(self.config, name=self.name)
        fresh._build_saved(model)
        fresh.build(model)
        return fresh.own_paths

    def install(self, model: nn.Module) -> None:
        twins: dict[str, list[str]] = {}
        for copy, first in shared_copies(model).items():
            twins.setdefault(first, []).append(copy)
        for key in self.sites:
            path, _, slot = key.partition("|")
            path = path.replace("/", ".")
            for place in (path, *twins.get(path, ())):
                site = self.site(path, slot)
                host = hooks.unwrap(hooks.get_module(model, place))
                action = ParameterAction(host, slot, site) if slot else hooks.SiteAction(site)
                self.link(model, place, action, slot=slot)

    def fold(self, site: nn.Module, module: nn.Module) -> dict[str, Tensor]:
        own: Any = site
        if isinstance(site, NormDelta | TableDelta):
            deltas = dict(own.delta.named_parameters()) if isinstance(site, NormDelta) else {"weight": own.table_delta}
            return {k: _double(getattr(module, k)) + _double(v) for k, v in deltas.items()}
        weight, bias = _double(module.weight), getattr(module, "bias", None)
        bias = None if bias is None else _double(bias)
        if own.bias_delta is not None:
            bias = _double(own.bias_delta) + (0 if bias is None else bias)
        if own.gamma_delta is not None:
            gamma = 1 + _double(own.gamma_delta)
            weight = weight * along(gamma, 1 if getattr(module, "transposed", False) else 0, weight.dim())
            bias = None if bias is None else bias * gamma
            return {"weight": weight} | ({} if bias is None else {"bias": bias})
        return {"bias": bias}  # type: ignore[dict-item]

    def merge_edits(self, model: nn.Module) -> list[Edit]:
        edits = []
        for link in self.links:
            if link.key.partition("|")[0] in self.saved_paths:
                continue
            path, _, slot = link.key.partition("|")
            host: Any = hooks.unwrap(hooks.get_module(model, path))
            site: Any = link.action.modules[0]
            folded = {slot: _double(getattr(host, slot)) + _double(site.delta)} if slot else self.fold(site, host)
            edits += [Edit(path, name, value) for name, value in folded.items()]
        return edits

    @staticmethod
    def _plain(key: str) -> str:
        return SiteAdapter._plain(key).lstrip(".")  # the table of the model itself lies at the path ""


def _double(tensor: Any) -> Tensor:
    value: Tensor = tensor.detach().double()
    return value


def trained_counts(adapter: DiffFit) -> dict[str, int]:
    """How many values of each kind an adapter trains: "gamma", "bias", "norm", "class table"."""
    kinds = {"gamma_delta": "gamma", "bias_delta": "bias", "table_delta": "class table"}
    counts = dict.fromkeys(("gamma", "bias", "norm", "class table"), 0)
    for name, p in adapter.trainable_parameters():
        kind = kinds.get(name.rpartition(".")[2])
        counts[kind or ("bias" if re.search(rf"(^|\.){TABLE}\.", name) else "norm")] += p.numel()
    return counts
