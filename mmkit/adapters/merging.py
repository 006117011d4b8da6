"""Folding an adapter into weights and taking it out again; a part of `Adapter`.

What a merge writes is tried on copies before anything is written, and kept so that `unmerge` is bit-exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mmkit.adapters import hooks, trial
from mmkit.adapters.attention import make_explicit
from mmkit.adapters.config import Edit
from mmkit.adapters.places import owner_and_leaf
from mmkit.adapters.stack import AdapterStack, roots_of
from mmkit.errors import InputError, NotMergeableError

COUNT = itertools.count(1)
"""Numbers attachments and merges in the order in which they happen."""


def strength(value: Any) -> float:
    """`value` as the strength of an adapter. Raises `InputError` unless it is a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"The scale of an adapter is a finite number (0: the base, 1: as trained), not {value!r}.")
    return number


class Merging:
    """The merging half of an adapter."""

    name: str
    method: ClassVar[str] = ""
    model: nn.Module
    enabled: bool
    links: list[hooks.Link]
    saved_paths: list[str]
    saved: nn.ModuleDict
    _scale: float
    _explicit: bool
    check: Any
    unreached: Any

    merged = False
    _merge_order = 0
    _backup: list[tuple[str, str, Tensor | None]]

    def merge_edits(self, model: nn.Module) -> list[Edit]:
        """The tensors a merge writes, computed without changing anything. Raises `NotMergeableError`."""
        raise NotMergeableError(f"{self.method!r} cannot be folded into weights; keep it attached.")

    @property
    def mergeable(self) -> bool:
        """Whether `merge` would succeed now."""
        try:
            self._plan(self._scale)
        except (NotMergeableError, InputError):
            return False
        return True

    def _plan(self, scale: float) -> list[Edit]:
        """What to write, tried numerically before anything is written."""
        model = self.model
        if self.merged:
            raise NotMergeableError(f"Adapter {self.name!r} is already merged.")
        if not self.enabled:
            raise NotMergeableError(f"Adapter {self.name!r} is disabled; enable it to merge it.")
        self._refuse_replaced(model)
        self._refuse_unmerged_below(model)
        edits = self._scaled(model, self.merge_edits(model) + self._saved_edits(), scale)
        for edit in edits:
            if edit.value.is_floating_point() and not torch.isfinite(edit.value).all():
                raise NotMergeableError(f"Merging would write NaN or infinite values to {edit.path}.", [edit.path])
        _refuse_shared(model, edits)
        if any(self.unreached(root) for _, root in roots_of(model)):
            self.check()
        trial.require_equal_folds(self, model, edits, scale)
        return edits

    def _refuse_replaced(self, model: nn.Module) -> None:
        paths = {link.key.partition("|")[0]: link for link in self.links}
        plain = dict(hooks.named_plain_modules(model))
        gone = [
            p for p, link in paths.items() if p not in plain or link not in hooks.links_at(hooks.get_module(model, p))
        ]
        if gone:
            raise InputError(
                f"{gone[:4]} became other modules after adapter {self.name!r} was attached, so it does not act there. Detach it, and "
                "attach it to the model as it is now."
            )

    def _refuse_unmerged_below(self, model: nn.Module) -> None:
        for link in self.links:
            for other in hooks.links_at(hooks.get_module(model, link.key.partition("|")[0])):
                if other is link:
                    break
                if other.owner is not self and other.folds:
                    raise NotMergeableError(
                        f"Adapter {other.owner.name!r} was attached before {self.name!r} and acts at the same modules; merge it first.",
                        [link.key],
                    )

    def _saved_edits(self) -> list[Edit]:
        return [
            Edit(*owner_and_leaf(path, name), value)
            for path in self.saved_paths
            for name, value in self.saved[path.replace(".", "/")].state_dict().items()
        ]

    def _scaled(self, model: nn.Module, edits: list[Edit], scale: float) -> list[Edit]:
        if scale == 1.0:
            return edits
        out = []
        for path, name, value in edits:
            if value.is_floating_point():
                now = getattr(hooks.unwrap(hooks.get_module(model, path)), name, None)
                if now is None:  # what a missing parameter stands for
                    now = torch.ones_like(value) if name == "weight" else torch.zeros_like(value)
                value = now.detach().to(value) + scale * (value - now.detach().to(value))
            out.append(Edit(path, name, value))
        return out

    def merge(self, scale: float | None = None) -> nn.Module:
        """Fold the adapter into the weights and take its links off. Returns the model. All or nothing.

        Args:
            scale: strength, kept as `adapter.scale`; default: the present one.

        Raises:
            NotMergeableError: a site cannot absorb the change (`.sites` names it), or an earlier adapter on the same modules
                is not merged yet. The model is unchanged.
            InputError: a site was not reached (see `check`).
        """
        scale = self._scale if scale is None else strength(scale)
        edits = self._plan(scale)
        self._scale = scale
        return self._fold(edits)

    def _fold(self, edits: list[Edit]) -> nn.Module:
        model = self.model
        hooks.remove(model, self)
        self._backup = [trial.write(model, edit) for edit in edits]
        hooks.refuse_loading(model, self, {path for path, _, _ in self._backup})
        self.merged = True
        self._merge_order = next(COUNT)
        self._relink(link for link in self.links if not link.folds)
        hooks.forget_compiled()
        return model

    def _relink(self, links: Iterable[hooks.Link]) -> None:
        """Put `links` back, each at its place in the order of attachment."""
        links = list(links)
        if links and self._explicit:
            make_explicit(self.model, self)
        for link in links:
            hooks.add_link(hooks.get_module(self.model, link.key.partition("|")[0]), link)
        if links:
            hooks.call_all_modules(self.model, self)
        for _, root in roots_of(self.model):
            AdapterStack.of(root).settle()

    def unmerge(self) -> Self:
        """Undo `merge` bit-exactly (from a copy, never by dividing) and act through links again.

        Raises:
            InputError: not merged, or an adapter that was merged later on the same weights still is.
        """
        model = self.model
        if not self.merged:
            raise InputError(f"Adapter {self.name!r} is not merged.")
        mine = {(path, name) for path, name, _ in self._backup}
        for _, root in roots_of(model):
            for other in AdapterStack.of(root).adapters.values():
                if other.merged and other._merge_order > self._merge_order and mine & {b[:2] for b in other._backup}:
                    raise InputError(
                        f"Adapter {other.name!r} was merged after {self.name!r} into the same weights; unmerge or detach it first."
                    )
        hooks.remove(model, self)
        for path, name, value in reversed(self._backup):
            trial.restore(model, path, name, value)
        self._backup = []
        self.merged = False
        self._relink(self.links)
        hooks.forget_compiled()
        return self


def _refuse_shared(model: nn.Module, edits: list[Edit]) -> None:
    """A tensor used by several modules must not be folded into: the other module would change too."""
    users: dict[int, set[int]] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                users.setdefault(id(p), set()).add(id(module))
    shared = []
    for edit in edits:
        current = getattr(hooks.unwrap(hooks.get_module(model, edit.path)), edit.name, None)
        if current is not None and len(users.get(id(current), ())) > 1:
            shared.append(edit.path)
    if shared:
        raise NotMergeableError(
            f"Weights at {shared} are shared with another module and cannot be folded into.", shared
        )
