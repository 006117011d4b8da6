"""What is learned about labels: a linear head over rendered codes, and the loss over a tree's levels and leaves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.errors import InputError
from mmkit.pointcloud.slam.tree import SemanticTree


class SemanticHead(nn.Linear):
    """Rendered codes (..., D) to scores of the K classes (..., K): the official 1 x 1 convolution, channels last.

    Args:
        code_dim: D.
        num_classes: K.
        generator: of the first weights, which are drawn as `nn.Conv2d` draws them.
    """

    def __init__(self, code_dim: int, num_classes: int, generator: torch.Generator | None = None):
        super().__init__(code_dim, num_classes)
        if generator is not None:
            bound = code_dim**-0.5
            with torch.no_grad():
                self.weight.uniform_(-bound, bound, generator=generator)
                self.bias.uniform_(-bound, bound, generator=generator)


class HierarchicalSemanticLoss:
    """Cross entropy per level plus cross entropy of the head's classes (arXiv 2409.12518, equations 3 to 5).

    l = level_weight * sum over levels of CE(S_l, p_l)  +  leaf_weight * CE(head(S), y), the second term from iteration
    `leaf_from_iter` of a mapping round on.

    Args:
        tree: its level widths part the code.
        level_weight, leaf_weight: of the two terms.
        leaf_from_iter: counted from 0.
        ignore_index: a class number that is not learned. Pixels of class -1 (unknown) never are, unlike in the official code, which
            fails on them.

    Gradients also move, scale and fade the Gaussians, as in the official code; `HierSLAMConfig.detach_geometry` stops that.
    """

    def __init__(
        self, tree: SemanticTree, level_weight: float = 1.0, leaf_weight: float = 5.0, leaf_from_iter: int = 14,
        ignore_index: int | None = None,
    ):  # fmt: skip
        self.tree, self.level_weight, self.leaf_weight = tree, level_weight, leaf_weight
        self.leaf_from_iter, self.ignore_index = leaf_from_iter, ignore_index

    def levels(self, code: Tensor, leaves: Tensor) -> Tensor:
        """The inter-level term: the sum over levels of mean cross entropies of codes (..., D) at class numbers (...)."""
        code, leaves = self._known(code, leaves)
        if not len(leaves):
            return code.sum() * 0
        places = self.tree.level_labels(leaves)
        terms = [F.cross_entropy(part, places[:, l]) for l, part in enumerate(self.tree.split(code))]
        return torch.stack(terms).sum()

    def leaf(self, code: Tensor, leaves: Tensor, head: nn.Module) -> Tensor:
        """The cross-level term: mean cross entropy of the head's classes."""
        code, leaves = self._known(code, leaves)
        return F.cross_entropy(head(code), leaves) if len(leaves) else code.sum() * 0

    def __call__(self, code: Tensor, leaves: Tensor, head: nn.Module | None = None, iteration: int = 0) -> Tensor:
        """Both terms of codes (..., D) at class numbers (...); `iteration` of the mapping round, from 0."""
        loss = self.level_weight * self.levels(code, leaves)
        if head is not None and self.leaf_weight and iteration >= self.leaf_from_iter:
            loss = loss + self.leaf_weight * self.leaf(code, leaves, head)
        return loss

    def _known(self, code: Tensor, leaves: Tensor) -> tuple[Tensor, Tensor]:
        if code.shape[:-1] != leaves.shape:
            raise InputError(f"Codes {tuple(code.shape)} and labels {tuple(leaves.shape)} do not belong together.")
        code, leaves = code.reshape(-1, code.shape[-1]), leaves.reshape(-1).long()
        kept = leaves >= 0
        if self.ignore_index is not None:
            kept = kept & (leaves != self.ignore_index)
        return (code, leaves) if bool(kept.all()) else (code[kept], leaves[kept])
