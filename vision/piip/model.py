"""Parameter-inverted image pyramid networks (arXiv 2406.04330, 2501.07783): large pictures to small models, small ones to large.

Branch 1 has the largest model and sees the smallest picture. Branches run side by side; after each group of blocks neighbours
exchange features, from the small models' end on: with three branches first 2 and 3, then 1 and 2, which therefore already sees
what 3 told 2. At the end all branches are brought to the width of branch 1 and the grid of the last branch, and summed.

Follows the released code (OpenGVLab/PIIP). Named deviations, each with the setting that restores the official behaviour:
class tokens keep their trained position (`official_positions`); a separate head reads the class token, where the official one reads
the first patch (`pool="first_patch"`); `num_classes` holds for every head; grids come from the feature maps, so pictures need not be
square, and a picture that gives no whole number of patches is refused rather than cut (`grid_fit="floor"`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Permute

from mmkit.backbones import ImageBackboneInfo, image_info
from mmkit.backbones.builder import attach_info
from mmkit.backbones.model import Model
from mmkit.data.transforms import resized
from mmkit.errors import InputError
from mmkit.vision.piip.branches import Family, Tokens, build_branch
from mmkit.vision.piip.config import BranchConfig, PIIPConfig
from mmkit.vision.piip.interaction import BidirectionalInteraction, init_weights
from mmkit.vision.piip.lanes import can_part, in_lanes
from mmkit.vision.piip.official import own_state

POOLS = ("token", "avg", "first_patch")


class Interaction(nn.Module):
    """All neighbours exchange features once, beginning at the small models' end."""

    def __init__(self, widths: Sequence[int], config: PIIPConfig):
        super().__init__()
        self.count = len(widths)
        for i in range(1, self.count):
            unit = BidirectionalInteraction((widths[i - 1], widths[i]), config)
            self.add_module(f"interaction_units_{i}{i + 1}", unit)

    def forward(self, branches: list[Tokens]) -> list[Tokens]:
        """Tokens of all branches, branch 1 first."""
        branches = list(branches)
        for i in range(self.count - 1, 0, -1):
            self.exchange(branches, i)
        return branches

    def exchange(self, branches: list[Tokens], i: int) -> None:
        """Between branches `i` and `i + 1` only; replaces them in the list."""
        a, b = branches[i - 1], branches[i]
        unit = self.get_submodule(f"interaction_units_{i}{i + 1}")
        x1, x2 = unit(a.x, b.x, a.grid, b.grid)
        branches[i - 1], branches[i] = dataclasses.replace(a, x=x1), dataclasses.replace(b, x=x2)


class Merge(nn.Module):
    """The sum of all branches at the grid of the last one, each at a learned weight.

    Args:
        widths: of the branches; all come to the first of them.
        kind: "linear" (classification: GroupNorm, Linear, GroupNorm), "conv" (GroupNorm and ReLU after one 3x3 convolution,
            none for branch 1) or "conv2" (two of them, for branch 1 too).
        groups: of the GroupNorms; the authors' 32 must divide all widths.
    """

    def __init__(self, widths: Sequence[int], kind: str, groups: int = 32):
        super().__init__()
        wrong = [w for w in (widths if kind == "linear" else widths[:1]) if w % groups]
        if wrong:
            raise InputError(f"norm_groups={groups} must divide the branches' widths {list(widths)}; choose a divisor.")
        make: dict[str, Callable[..., nn.Module]] = {
            "linear": _linear_merge,
            "conv": _conv_merge,
            "conv2": _conv2_merge,
        }
        self.branches = nn.ModuleList(make[kind](width, widths[0], i == 0, groups) for i, width in enumerate(widths))
        self.weights = nn.ParameterList(torch.tensor(1.0) for _ in widths)
        self.apply(init_weights)

    def forward(self, branches: list[Tokens]) -> Tensor:
        """(B, width of branch 1, H, W of the last branch)."""
        grid = branches[-1].grid
        parts = []
        for merge, weight, tokens in zip(self.branches, self.weights, branches, strict=True):
            maps = merge(tokens.maps)
            if tokens.grid != grid:
                maps = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
            parts.append(maps * weight)
        return torch.stack(parts).sum(0)


def _linear_merge(width: int, out: int, first: bool, groups: int) -> nn.Module:
    if first:
        return nn.GroupNorm(groups, out)
    to_last, to_first = Permute([0, 2, 3, 1]), Permute([0, 3, 1, 2])
    return nn.Sequential(
        nn.GroupNorm(groups, width), to_last, nn.Linear(width, out), to_first, nn.GroupNorm(groups, out)
    )


def _conv_merge(width: int, out: int, first: bool, groups: int) -> nn.Sequential:
    conv = [] if first else [nn.Conv2d(width, out, 3, padding=1, bias=False)]
    return nn.Sequential(*conv, nn.GroupNorm(groups, out), nn.ReLU())


def _conv2_merge(width: int, out: int, first: bool, groups: int) -> nn.Sequential:
    return nn.Sequential(*_conv_merge(width, out, False, groups), *_conv_merge(out, out, False, groups))


class Pyramid(Model):
    """The trunk of every PIIP model: branches and interactions. Subclasses add what reads the branches.

    Attributes:
        branch1, ...: the backbones, modules of their own libraries, without classifiers and final norms.
        interactions: one `Interaction` per group of blocks.
        multiple: sides of a picture that are multiples of this give every branch whole patches.
    """

    backbone_info: ImageBackboneInfo

    def _build(self, pyramid: PIIPConfig | dict[str, Any], class_names: Sequence[str] = ()) -> list[nn.Module]:
        """Make branches and interactions; returns the backbones' final norms."""
        config = PIIPConfig.of(pyramid)
        self.class_names = tuple(class_names)
        self.families: list[Family] = []
        self.groups: list[tuple[tuple[int, int], ...]] = []
        norms, facts = [], []
        for number, branch in enumerate(config.branches, 1):
            model, family, norm = build_branch(branch)
            facts.append(image_info(model))
            self.add_module(f"branch{number}", model)
            self.families.append(family)
            norms.append(norm)
        depths = [len(f.layers(m)) for f, m in zip(self.families, self.backbones, strict=True)]
        self.groups = _groups(config, depths)
        self.pyramid = config
        widths = self.widths()
        if widths[-1] != sorted(widths[-1], reverse=True):
            raise InputError(f"Branches go from the widest model to the narrowest; their widths are {widths[-1]}.")
        self.interactions = nn.ModuleList(Interaction(w, config) for w in widths)
        self._check_sizes()
        info = facts[-1]
        size = config.branches[-1].img_size
        attach_info(
            self,
            ImageBackboneInfo(
                name=type(self).__name__, mean=info.mean, std=info.std, interpolation=info.interpolation,
                input_size=(info.input_size[0], size, size), num_features=widths[-1][0],
            ),
        )  # fmt: skip
        return norms

    @property
    def backbones(self) -> list[Any]:
        """The branches' modules, branch 1 first."""
        return [self.get_submodule(f"branch{i + 1}") for i in range(len(self.families))]

    def widths(self) -> list[list[int]]:
        """Channels of every branch at every interaction."""
        per_branch = [f.widths(m) for f, m in zip(self.families, self.backbones, strict=True)]
        return [[w[g[k][1]] for w, g in zip(per_branch, self.groups, strict=True)] for k in range(len(self.groups[0]))]

    def strides(self) -> list[list[int]]:
        """Pixels per token of every branch at every interaction."""
        per_branch = [f.strides(m) for f, m in zip(self.families, self.backbones, strict=True)]
        return [[s[g[k][1]] for s, g in zip(per_branch, self.groups, strict=True)] for k in range(len(self.groups[0]))]

    @property
    def multiple(self) -> int:
        """Sides of a picture must be multiples of this (with `grid_fit="exact"`), else of the last branch's stride."""
        last, strides = self.pyramid.branches[-1].img_size, [max(s) for s in zip(*self.strides(), strict=True)]
        step = strides[-1]
        if self.pyramid.grid_fit != "exact":
            return step
        return next(
            side
            for side in range(step, step * last + 1, step)
            if all(
                side * b.img_size % last == 0 and side * b.img_size // last % s == 0
                for b, s in zip(self.pyramid.branches, strides, strict=True)
            )
        )

    def _check_sizes(self) -> None:
        strides = [max(s) for s in zip(*self.strides(), strict=True)]
        for number, (branch, stride) in enumerate(zip(self.pyramid.branches, strides, strict=True), 1):
            if branch.img_size % stride and self.pyramid.grid_fit == "exact":
                low = branch.img_size // stride * stride
                raise InputError(
                    f"Branch {number} ({branch.backbone}) sees {branch.img_size} pixels, which are no multiple of its patches of "
                    f"{stride}. Use {low or stride} or {low + stride}, or grid_fit='nearest'."
                )

    def at(self, img_sizes: Sequence[int]) -> Self:
        """The same modules, weights shared, at other resolutions.

        Args:
            img_sizes: one per branch, largest model first, so from the smallest picture to the largest.

        Raises `InputError` for another number of sizes, or sizes that do not fit the patches.
        """
        branches = self.pyramid.branches
        if len(img_sizes) != len(branches):
            raise InputError(f"The pyramid has {len(branches)} branches, but {len(img_sizes)} sizes were given.")
        model = copy.copy(self)
        model.pyramid = dataclasses.replace(
            self.pyramid,
            branches=tuple(dataclasses.replace(b, img_size=int(s)) for b, s in zip(branches, img_sizes, strict=True)),
        )
        model._check_sizes()
        last = int(img_sizes[-1])
        info = self.backbone_info
        return attach_info(model, dataclasses.replace(info, input_size=(info.input_size[0], last, last)))  # type: ignore[return-value]

    def load_branch(self, number: int, checkpoint_path: Any = None, *, pretrained: bool | str = False) -> None:
        """Put trained weights into one branch; its classifier, if the file has one, is left out.

        Args:
            number: 1 is the largest model.
            checkpoint_path, pretrained: as for `mmkit.create_backbone`.

        Raises:
            InputError: no such branch.
            CheckpointError: a file that does not fit the branch; nothing is changed.
        """
        if not 1 <= number <= len(self.families):
            raise InputError(f"There are branches 1 to {len(self.families)}, no {number}.")
        config = self.pyramid.branches[number - 1]
        model, _, norm = build_branch(config, checkpoint_path=checkpoint_path, pretrained=pretrained)
        self.backbones[number - 1].load_state_dict(model.state_dict())
        self._load_norm(number, norm)

    def _load_norm(self, number: int, norm: nn.Module) -> None:
        """What becomes of the final norm of a branch that `load_branch` reads; most heads have no use for it."""

    def pictures(self, x: Tensor) -> list[Tensor]:
        """What each branch sees of pictures (B, C, H, W) at the resolution of the last branch.

        Raises `InputError` for pictures of another rank or number of channels, too small, or of sides that do not divide.
        """
        channels = self.backbone_info.input_size[0]
        if x.dim() != 4 or x.shape[1] != channels or not x.is_floating_point():
            raise InputError(
                f"Pictures must be floating (B, {channels}, H, W), normalised; got {x.dtype} {tuple(x.shape)}."
            )
        config = self.pyramid
        last = config.branches[-1].img_size
        return [
            self._resized(x, branch, last, max(strides))
            for branch, strides in zip(config.branches, zip(*self.strides(), strict=True), strict=True)
        ]

    def _resized(self, x: Tensor, branch: BranchConfig, last: int, stride: int) -> Tensor:
        fit, (height, width) = self.pyramid.grid_fit, x.shape[-2:]
        if fit == "floor":
            if branch.img_size < last:
                scale = branch.img_size / last
                x = resized(x, scale_factor=scale, antialias=self.pyramid.antialias)
            size = [side // stride * stride for side in x.shape[-2:]]
            x = x[..., : size[0], : size[1]]
            if min(size) < 1:
                raise self._too_small(height, width)
        else:
            wanted = [side * branch.img_size / last for side in (height, width)]
            if min(wanted) < 1:
                raise self._too_small(height, width)
            if fit == "nearest" and branch.img_size < last:
                wanted = [max(round(side / stride), 1) * stride for side in wanted]
            if any(side % stride for side in wanted):
                raise InputError(
                    f"Pictures of {height}x{width} pixels give the branch for {branch.img_size} pixels "
                    f"{wanted[0]:g}x{wanted[1]:g}, no whole number of patches of {stride}. Make both sides multiples of {self.multiple}"
                    f"{'' if fit == 'nearest' else ', or build the pyramid with grid_fit=nearest'}."
                )
            if [int(side) for side in wanted] != [height, width]:
                shape = (int(wanted[0]), int(wanted[1]))
                x = resized(x, size=shape, antialias=self.pyramid.antialias)
        return x

    def _too_small(self, height: int, width: int) -> InputError:
        sizes = [b.img_size for b in self.pyramid.branches]
        return InputError(
            f"Pictures of {height}x{width} pixels are smaller than a patch in one of the branches (for {sizes} pixels); "
            f"make the sides at least {self.multiple}."
        )

    def forward_branches(
        self, x: Tensor, watch: Callable[[int, list[Tokens], list[Tokens]], None] | None = None
    ) -> list[Tokens]:
        """Tokens of every branch after the last interaction.

        Args:
            x: pictures (B, C, H, W) at the resolution of the last branch.
            watch: called at every interaction with its number and the tokens before and after it.
        """
        parts = list(zip(self.families, self.backbones, self.pyramid.branches, strict=True))
        tokens = [f.embed(m, p, c) for (f, m, c), p in zip(parts, self.pictures(x), strict=True)]
        tokens = [
            t if c.class_token else dataclasses.replace(t, prefix=None)
            for (_, _, c), t in zip(parts, tokens, strict=True)
        ]
        if watch is None and self._parts(x, tokens):
            return self._in_lanes(tokens)
        for k, interaction in enumerate(self.interactions):
            tokens = [f.run(m, t, *g[k], c) for (f, m, c), t, g in zip(parts, tokens, self.groups, strict=True)]
            before, tokens = tokens, interaction(tokens)
            if watch is not None:
                watch(k, before, tokens)
        return tokens

    def _parts(self, x: Tensor, tokens: list[Tokens]) -> bool:
        """Whether branches may run side by side, and no branch has so much to do that all threads should work on it."""
        work = [
            len(f.layers(m)) * t.x.shape[1] * t.x.shape[2] * (12 * t.x.shape[2] + 2 * t.x.shape[1])  # of ViT blocks
            for f, m, t in zip(self.families, self.backbones, tokens, strict=True)
        ]
        # lanes call the units of an interaction one by one, which a hook on the whole would not see
        hooked = any(i._forward_hooks or i._forward_pre_hooks for i in self.interactions)
        return max(work) < 0.6 * sum(work) and not hooked and can_part(self, x)

    def _in_lanes(self, tokens: list[Tokens]) -> list[Tokens]:
        """`forward_branches` after the embedding, with what does not wait for each other side by side."""

        def run(i: int, k: int) -> None:
            config, group = self.pyramid.branches[i], self.groups[i][k]
            tokens[i] = self.families[i].run(backbones[i], tokens[i], *group, config)

        backbones, tasks = self.backbones, list[tuple[set[int], Callable[[], Any]]]()
        interaction: Any
        for k, interaction in enumerate(self.interactions):
            tasks += [({i}, partial(run, i, k)) for i in reversed(range(len(tokens)))]
            tasks += [({i - 1, i}, partial(interaction.exchange, tokens, i)) for i in range(len(tokens) - 1, 0, -1)]
        in_lanes(tasks)
        return tokens

    def freeze_branches(self) -> None:
        """Let only interactions, merges and heads train; adapters on the branches stay trainable too."""
        for backbone in self.backbones:
            backbone.requires_grad_(False)

    def official_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return own_state(state, self)


def _groups(config: PIIPConfig, depths: list[int]) -> list[tuple[tuple[int, int], ...]]:
    """First and last block of every group of every branch. Raises `InputError` where they leave blocks out."""
    given = [len(b.interaction_indexes) for b in config.branches if b.interaction_indexes is not None]
    count = given[0] if given else min(depths)
    found = []
    for number, (branch, depth) in enumerate(zip(config.branches, depths, strict=True), 1):
        groups = branch.interaction_indexes
        if groups is None:
            ends = [round(depth * (k + 1) / count) for k in range(count)]
            groups = tuple(zip([0, *ends[:-1]], [e - 1 for e in ends], strict=True))
        if len(groups) != count or not groups:
            raise InputError(
                f"Branch {number} has {len(groups)} groups of blocks, but another has {count}; all need the same number."
            )
        starts = [0, *(last + 1 for _, last in groups)]
        if any(first != start or last < first for (first, last), start in zip(groups, starts, strict=False)):
            raise InputError(
                f"Branch {number}: interaction_indexes {list(groups)} must follow each other from block 0 on, each at least one block."
            )
        if starts[-1] != depth:
            raise InputError(
                f"Branch {number} ({branch.backbone}) has blocks 0 to {depth - 1}, but interaction_indexes end at {starts[-1] - 1}."
            )
        found.append(groups)
    return found


class PIIP(Pyramid):
    """A pyramid that classifies pictures: (B, C, H, W) at the resolution of the last branch -> (B, num_classes).

    Args:
        pyramid: a `PIIPConfig`, or a dict of its settings.
        num_classes: outputs.
        separate_head: every branch has its own norm and classifier and their logits are averaged (the released ImageNet
            models); else the branches are merged, normed, averaged over the map and classified once.
        pool: what a separate head reads: "token" (the class token), "avg" (all patches), or "first_patch" as the released models.
        norm_groups: of the merge's GroupNorms; must divide the widths.
        class_names: labels of the outputs.

    Raises `InputError` for settings that do not fit together.
    """

    def __init__(
        self,
        pyramid: PIIPConfig | dict[str, Any],
        num_classes: int = 1000,
        *,
        separate_head: bool = False,
        pool: str = "token",
        norm_groups: int = 32,
        class_names: Sequence[str] = (),
    ):
        super().__init__()
        norms = self._build(pyramid, class_names)
        if pool not in POOLS:
            raise InputError(f"pool must be one of {POOLS}, not {pool!r}.")
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise InputError(f"num_classes must be a whole number of at least 1, not {num_classes!r}.")
        if class_names and len(class_names) != num_classes:
            raise InputError(f"There are {num_classes} classes, but {len(class_names)} class_names.")
        self.num_classes, self.separate_head, self.pool = num_classes, separate_head, pool
        widths = self.widths()[-1]
        if separate_head:
            self.norms = nn.ModuleList(norms)
            self.heads = nn.ModuleList(nn.Linear(width, num_classes) for width in widths)
            self.heads.apply(init_weights)
        else:
            self.merge = Merge(widths, "linear", norm_groups)
            self.cls_norm = nn.LayerNorm(widths[0], eps=1e-6)
            self.cls_head = nn.Linear(widths[0], num_classes)
            init_weights(self.cls_head)
        heads = tuple(f"heads.{i}" for i in range(len(widths))) if separate_head else ("cls_head",)
        facts: dict[str, Any] = {"num_classes": num_classes, "class_names": self.class_names, "heads": heads}
        attach_info(self, dataclasses.replace(self.backbone_info, **facts))

    def _load_norm(self, number: int, norm: nn.Module) -> None:
        if self.separate_head:
            self.norms[number - 1].load_state_dict(norm.state_dict())

    def forward_features(self, x: Tensor) -> Tensor:
        """The merged branches, (B, d1, H, W). Only without separate heads."""
        if self.separate_head:
            raise InputError("A pyramid with separate heads does not merge its branches; use forward_branches.")
        return self.merge(self.forward_branches(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes)."""
        if not self.separate_head:
            return self.cls_head(self.cls_norm(self.forward_features(x).flatten(2).transpose(1, 2)).mean(1))
        branches = self.forward_branches(x)
        pooled = [self._pooled(tokens, norm) for tokens, norm in zip(branches, self.norms, strict=True)]
        return torch.stack([head(p) for head, p in zip(self.heads, pooled, strict=True)]).mean(0)

    def _pooled(self, tokens: Tokens, norm: nn.Module) -> Tensor:
        if self.pool == "avg":
            return norm(tokens.x).mean(1)
        if self.pool == "token" and tokens.prefix is None:
            raise InputError("pool='token' needs class tokens in every branch; use pool='avg'.")
        return norm(tokens.x if self.pool == "first_patch" else tokens.prefix)[:, 0]
