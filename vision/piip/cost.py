"""What a pyramid costs, without running it: multiply-adds as the authors count them (they publish the sum as "FLOPs").

Linear layers and convolutions are counted exactly, self-attention as 2 N^2 d (within windows 2 N w^2 d), the sampling of deformable
attention as 5 N K d; norms, activations, resizing and the filling-up of windows as nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mmkit.errors import InputError
from mmkit.vision.piip.branches import Family
from mmkit.vision.piip.config import BranchConfig, PIIPConfig
from mmkit.vision.piip.interaction import DeformableAttention, Injector
from mmkit.vision.piip.model import PIIP, Pyramid


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one picture, and parameters.

    Attributes:
        branches: multiply-adds of each branch, branch 1 first.
        interactions: of all interactions.
        merge: of bringing the branches together, and of the classifiers.
        params: of the whole model.
    """

    branches: tuple[float, ...]
    interactions: float
    merge: float
    params: int

    @property
    def total(self) -> float:
        """All multiply-adds."""
        return sum(self.branches) + self.interactions + self.merge


def meta_model(pyramid: PIIPConfig | Mapping[str, Any], **settings: Any) -> PIIP:
    """A pyramid without weights, for counting: it takes no memory and cannot be run."""
    with torch.device("meta"), _Unfilled():
        return PIIP(PIIPConfig.of(pyramid), **settings)


class _Unfilled(TorchFunctionMode):
    """Leaves the initialisation of meta tensors out: it changes nothing and takes most of the time."""

    fills = ("kaiming_uniform_", "uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.fills:
            target = args[0] if args else kwargs["tensor"]
            if target.is_meta:
                return target
        return func(*args, **(kwargs or {}))


def piip_flops(model: Pyramid | PIIPConfig | Mapping[str, Any], size: int | tuple[int, int] | None = None) -> Cost:
    """The cost of one picture.

    Args:
        model: a pyramid, or a configuration, which is counted with merged branches and 1000 classes. Of a feature pyramid or a
            segmenter the branches, interactions and merges are counted, not the maps and heads made from them.
        size: side, or (height, width), of the picture at the last branch; default: what the pyramid was made for.

    Raises `InputError` for a size that does not give every branch a patch.
    """
    if not isinstance(model, Pyramid):
        model = meta_model(model)
    branches = model.pyramid.branches
    last = branches[-1].img_size
    height, width = (size, size) if isinstance(size, int) else size or (last, last)
    parts = list(zip(model.backbones, model.families, branches, strict=True))
    sides = [(height * c.img_size / last, width * c.img_size / last) for c in branches]
    costs = tuple(branch_flops(m, f, c, side) for (m, f, c), side in zip(parts, sides, strict=True))
    patches = [
        [round(h // s) * round(w // s) for (h, w), s in zip(sides, strides, strict=True)] for strides in model.strides()
    ]
    interactions = sum(
        _unit(i.get_submodule(f"interaction_units_{n}{n + 1}"), counts[n - 1], counts[n])
        for i, counts in zip(model.interactions, patches, strict=True)
        for n in range(1, len(counts))
    )
    return Cost(costs, interactions, _merging(model, patches[-1]), sum(p.numel() for p in model.parameters()))


def branch_flops(model: nn.Module, family: Family, config: BranchConfig, size: tuple[float, float]) -> float:
    """Multiply-adds of a backbone, without its classifier, on a picture of `size` pixels (height, width)."""
    layers, strides = family.layers(model), family.strides(model)
    counts = [(int(size[0] // s), int(size[1] // s)) for s in strides]
    if not counts or min(min(c) for c in counts) < 1:
        raise InputError(f"{size[0]:g}x{size[1]:g} pixels are smaller than a patch of {config.backbone}.")
    inside = {id(m) for layer in layers for m in layer.modules()}
    stem = [m for m in model.modules() if id(m) not in inside and isinstance(m, nn.Conv2d)]
    total = _weights(stem) * counts[0][0] * counts[0][1]
    prefix = family.prefix_tokens(model) if config.class_token else 0
    for number, (layer, dim, (rows, columns)) in enumerate(zip(layers, family.widths(model), counts, strict=True)):
        tokens = rows * columns + prefix
        total += _weights(layer.modules()) * tokens
        window = config.window_of(number)
        if family.attends and window:
            total += 2 * tokens * window**2 * dim
        elif family.attends:
            total += 2 * tokens**2 * dim
    return float(total)


def compare(model: Pyramid, size: int | None = None, window: int = 14) -> dict[str, tuple[float, int]]:
    """Multiply-adds and parameters of a pyramid beside what shows the same detail.

    Args:
        size: side of the picture at the last branch; default: what the pyramid was made for.
        window: tokens per side of the windows.

    Returns:
        "pyramid", "single branch" (the largest model on the largest picture), "classic pyramid" (the largest model on every
        picture) and "windowed" (the largest model on the largest picture, two blocks of three within windows).
    """
    cost = piip_flops(model, size)
    branches = model.pyramid.branches
    last = size or branches[-1].img_size
    largest, family, config = model.backbones[0], model.families[0], dataclasses.replace(branches[0], window=0)
    params = sum(p.numel() for p in largest.parameters())
    windows = tuple(0 if i % 3 == 2 else window for i in range(len(family.layers(largest))))
    sides = [last * b.img_size / branches[-1].img_size for b in branches]
    at = [branch_flops(largest, family, config, (s, s)) for s in sides]
    windowed = branch_flops(largest, family, dataclasses.replace(config, window=windows), (last, last))
    return {
        "pyramid": (cost.total, cost.params),
        "single branch": (at[-1], params),
        "classic pyramid": (sum(at), params),
        "windowed": (windowed, params),
    }


def _weights(modules: Iterable[nn.Module]) -> int:
    """Multiply-adds per place of all linear layers and convolutions."""
    return sum(m.weight.numel() for m in modules if isinstance(m, (nn.Linear, nn.Conv2d)))


def _unit(unit: nn.Module, first: int, second: int) -> float:
    """One bidirectional interaction between `first` and `second` patches."""
    total = 0.0
    for name, queries, features in (("branch2to1", first, second), ("branch1to2", second, first)):
        injector = getattr(unit, f"{name}_injector", None)
        if isinstance(injector, Injector):
            total += _weights([getattr(unit, f"{name}_proj")]) * features + _injection(injector, queries, features)
    return total


def _injection(injector: Injector, queries: int, features: int) -> float:
    attn: Any = injector.attn
    dim = injector.ca_gamma.numel()
    if isinstance(attn, DeformableAttention):
        read, sampling = [attn.value_proj], 5 * queries * attn.num_points * dim
    else:
        read, sampling = [attn.wk, attn.wv], 2 * queries * features * dim
    everything = _weights(injector.modules())
    return _weights(read) * features + (everything - _weights(read)) * queries + sampling


def _merging(model: Pyramid, patches: list[int]) -> float:
    if isinstance(model, PIIP) and model.separate_head:
        return float(_weights(model.heads))
    merge: Any = model.merge
    total = sum(_weights(m.modules()) * n for m, n in zip(merge.branches, patches, strict=True))
    return float(total + (_weights([model.cls_head]) if isinstance(model, PIIP) else 0))
