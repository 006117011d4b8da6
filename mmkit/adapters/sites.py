"""Adapters that change the output of single modules: choose the sites, hook them, fold them. Most methods are of this kind."""

from __future__ import annotations

import fnmatch
from typing import Any

from torch import Tensor, nn

from mmkit.adapters import hooks
from mmkit.adapters.core import Adapter, Edit
from mmkit.errors import InputError, NotMergeableError, nearest


class SiteAdapter(Adapter):
    """Base of methods that change the output of single modules: y' = f(y, x).

    A method implements `is_site`, `make_site` (an `nn.Module` called as `site(output, args)`) and `fold`.
    """

    def is_site(self, path: str, module: nn.Module) -> bool:
        """Whether this method can act at `module`; `targets` selects among these."""
        raise NotImplementedError

    def default_sites(self, model: nn.Module, candidates: dict[str, nn.Module]) -> list[str]:
        """The sites used when `targets` is `None`: all candidates outside the head, unless overridden."""
        from mmkit.backbones import head_scopes

        heads = tuple(f"{path}." for path in head_scopes(model))
        return [p for p in candidates if not f"{p}.".startswith(heads)]

    def make_site(self, path: str, module: nn.Module) -> nn.Module:
        """The parameters for one site, on the CPU in float32."""
        raise NotImplementedError

    def fold(self, site: nn.Module, module: nn.Module) -> dict[str, Tensor]:
        """New values for parameters of `module` that make the site superfluous, computed in float64.

        Raises `NotMergeableError` when there are none.
        """
        raise NotMergeableError(f"{self.method!r} cannot be folded into a {type(module).__name__}.")

    def build(self, model: nn.Module) -> None:
        for module in list(model.modules()):
            if hooks.is_fused_attention(module):
                hooks.explicit_attention(module, self)  # type: ignore[arg-type]
        plain = dict(hooks.named_plain_modules(model))
        candidates = {p: m for p, m in plain.items() if p and self.is_site(p, m)}
        if self.config.targets is None:
            paths = self.default_sites(model, candidates)
        else:
            paths = match_targets(self.config.targets, list(candidates))
        if not paths:
            raise _no_match(self.method, self.config.targets, list(candidates), list(plain))
        silent = [p for p in paths if _reads_weights_directly(plain, p)]
        if silent:
            raise InputError(
                f"{self.method!r} would have no effect at {silent[:4]}: the attention there uses the weights without calling the "
                "module. Leave them out of `targets`."
            )
        for path in paths:
            module = plain[path]
            site = self.make_site(path, module)
            weight = getattr(module, "weight", None)
            self.add_site(path, site.to(weight.device) if isinstance(weight, Tensor) else site)

    def install(self, model: nn.Module) -> None:
        for module in list(model.modules()):
            if hooks.is_fused_attention(module):
                hooks.explicit_attention(module, self)  # type: ignore[arg-type]
        for path in self.site_paths:
            if path not in self._saved:
                hooks.add_hook(hooks.get_module(model, path), self, SiteHook(self.site(path)))

    def merge_edits(self, model: nn.Module) -> list[Edit]:
        edits, refused = [], []
        for path in self.site_paths:
            if path in self._saved:
                continue
            module = hooks.unwrap(hooks.get_module(model, path))
            try:
                folded = self.fold(self.site(path), module)
            except NotMergeableError:
                refused.append(path)
                continue
            if isinstance(module, hooks.InProjection):  # its tensors belong to the attention around it
                path = path.rpartition(".")[0]
                folded = {f"in_proj_{k}": v for k, v in folded.items()}
            edits += [Edit(path, k, v) for k, v in folded.items()]
        if refused:
            raise NotMergeableError(
                f"{self.method!r} cannot be folded at {refused}: no affine module there can absorb it. Keep the adapter attached, "
                "or leave these modules out of `targets`.",
                refused,
            )
        return edits


class SiteHook:
    """Hook function of a `SiteAdapter`: hands the output and the inputs of a module to its site."""

    def __init__(self, site: nn.Module):
        self.site = site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self.site(output, args)


def match_targets(targets: tuple[str, ...] | str, paths: list[str]) -> list[str]:
    """The `paths` that a pattern names in full, as an ending ("qkv", "attn.proj") or with wildcards."""
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    return [p for p in paths if any(fnmatch.fnmatchcase(p, t) or f".{p}".endswith(f".{t}") for t in patterns)]


def _no_match(method: str, targets: Any, candidates: list[str], names: list[str]) -> InputError:
    wanted = targets if isinstance(targets, str) else (targets or ("",))[0]
    endings = [c.rpartition(".")[2] for c in candidates] + candidates
    there = match_targets(targets, [n for n in names if n]) if targets else []
    reason = f"{there[:3]} exist but {method!r} cannot act on them. " if there else ""
    return InputError(
        f"No module matches targets={targets!r} for adapter {method!r}. {reason}"
        + (nearest(wanted, endings) if candidates else f"The model has no module that {method!r} can adapt.")
    )


def _reads_weights_directly(plain: dict[str, nn.Module], path: str) -> bool:
    """BEiT and Swin v2 keep query and value biases apart and call `F.linear` with the weight of `qkv`."""
    parent, _, leaf = path.rpartition(".")
    owner = plain.get(parent)
    if isinstance(owner, nn.MultiheadAttention) and not hooks.is_fused_attention(owner):
        return True
    return leaf == "qkv" and isinstance(getattr(owner, "q_bias", None), Tensor)
