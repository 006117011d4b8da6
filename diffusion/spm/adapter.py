"""SPM: a one-dimensional membrane on every layer of a denoiser's transformers that keeps one concept out. arXiv 2312.16145 (CVPR 2024).

For a frozen layer `y = W x + b` the membrane answers `y + alpha / r * U (D x)`, with `D: (r, in)` and `U: (out, r)`; U starts at zero.
Behind a convolution D is one with the layer's kernel, stride and padding and r output channels, U is 1 x 1. The strength of a membrane
("permeability", 1: the concept is erased, 0: the model as it was) is the adapter's `scale`, times its gate in
`forward_context(gates={name: number or one per row})`. Several concepts are several adapters on one model, and their changes add up.

Differences to Con6924/SPM:
- Layers are found by their type, not by the name of their class, and a model without any is refused; the official code then trains
  nothing, silently.
- D takes the layer's dilation and padding mode too, so that it folds exactly. Layers of the published models have neither.
- A membrane acts with its strength. Official inference multiplies both U and D by it, so that 0.7 acts like 0.49:
  `mmkit.diffusion.spm.composed` restores that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmkit.adapters import AdapterConfig, SiteAdapter, hooks, register_adapter
from mmkit.diffusion.blocks import blocks_of, is_inner_linear, supported
from mmkit.errors import InputError

_CONVS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class SPMConfig(AdapterConfig):
    """Settings of SPM.

    Attributes:
        rank: r, at least 1; at convolutions at most the smaller of their channels.
        alpha: the membrane is scaled by `alpha / r`; a finite number other than 0.
        concepts: the phrases this adapter erases, which its file carries along.
        targets: layers that get a membrane; default: every linear layer and convolution of the transformers inside a UNet, and those of
            attention and MLP in the blocks of PixArt, SD3, Flux, Flux2, Qwen-Image, Z-Image and their kin.
    """

    rank: int = 1
    alpha: float = 1.0
    concepts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise InputError(f"rank is a whole number from 1, not {self.rank!r}.")
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not number or not math.isfinite(self.alpha) or self.alpha == 0:
            raise InputError(f"alpha is a finite number other than 0, not {self.alpha!r}.")
        object.__setattr__(self, "concepts", phrases(self.concepts, allow_none=True))


def phrases(given: Any, *, allow_none: bool = False) -> tuple[str, ...]:
    """One phrase or several as a tuple. Raises `InputError` for empty ones."""
    texts = (given,) if isinstance(given, str) else given
    if not isinstance(texts, tuple | list) or not all(isinstance(t, str) and t.strip() for t in texts):
        raise InputError(
            f"A concept is a phrase such as 'snoopy', or a list of them, none of them empty; not {given!r}."
        )
    if not texts and not allow_none:
        raise InputError("No concept was given.")
    return tuple(t.strip() for t in texts)


class Membrane(nn.Module):
    """`y + alpha / r * up(down(x))` for the layer that answered y to x; see the module docstring."""

    def __init__(self, host: Any, rank: int, alpha: float):
        super().__init__()
        self.alpha = alpha
        if isinstance(host, nn.Linear):
            self.lora_down: nn.Module = nn.Linear(host.in_features, rank, bias=False)
            self.lora_up: nn.Module = nn.Linear(rank, host.out_features, bias=False)
        else:
            conv = next(c for c in _CONVS if isinstance(host, c))
            rank = min(rank, host.in_channels, host.out_channels)
            place = (host.kernel_size, host.stride, host.padding, host.dilation)
            self.lora_down = conv(host.in_channels, rank, *place, bias=False, padding_mode=host.padding_mode)
            self.lora_up = conv(rank, host.out_channels, 1, bias=False)
        nn.init.zeros_(self.lora_up.weight)  # type: ignore[arg-type]
        self.rank = rank

    def forward(self, y: Tensor, args: Any) -> Tensor:
        """The layer's output y for input `args[0]` -> the same shape and dtype."""
        down: Any = self.lora_down
        change = self.lora_up(down(args[0].to(down.weight.dtype)))
        return y + (self.alpha / self.rank * change).to(y.dtype)


@register_adapter("spm")
class SPM(SiteAdapter):
    """Concept semi-permeable membrane; see the module docstring."""

    config_class = SPMConfig
    tasks = ("text-to-image",)

    def is_site(self, path: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or (isinstance(module, _CONVS) and module.groups == 1)  # type: ignore[union-attr]

    def default_sites(self, model: nn.Module, candidates: dict[str, nn.Module]) -> list[str]:
        unet = tuple(
            f"{p}." for p, m in hooks.named_plain_modules(model) if _is_a(m, "Transformer2DModel") and p
        )  # diffusers' transformers inside a UNet
        if unet:
            return [p for p in candidates if p.startswith(unet)]
        blocks = tuple(f"{b}." for b in blocks_of(model))
        if not blocks:
            raise InputError(
                f"SPM does not know the transformer blocks of {type(model).__name__}. It knows UNets of diffusers and "
                f"{', '.join(supported())}. For another model name the layers: targets=('attn.*', 'mlp.*')."
            )
        inside = {p: p[len(b) :] for p in candidates for b in blocks if p.startswith(b)}
        return [p for p, rest in inside.items() if is_inner_linear(rest, modulation=False)]

    def make_site(self, path: str, module: nn.Module) -> nn.Module:
        return Membrane(module, self.config.rank, self.config.alpha)

    def fold(self, site: nn.Module, module: nn.Module) -> dict[str, Tensor]:
        own: Any = site
        change = own.lora_up.weight.detach().double().flatten(1) @ own.lora_down.weight.detach().double().flatten(1)
        weight: Any = module.weight
        return {"weight": weight.detach().double() + own.alpha / own.rank * change.view_as(weight)}


def _is_a(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)
