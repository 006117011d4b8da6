"""Adapters that change the output of single modules: choose the sites, link them, fold them. Most methods are of this kind."""

from __future__ import annotations

from torch import Tensor, nn

from mmkit.adapters import hooks
from mmkit.adapters.attention import InProjection
from mmkit.adapters.config import Edit
from mmkit.adapters.core import Adapter
from mmkit.adapters.targets import match_targets, no_match
from mmkit.errors import NotMergeableError


class SiteAdapter(Adapter):
    """Base of methods that change the output of single modules: y' = f(y, x).

    A method implements `is_site`, `make_site` (an `nn.Module` called as `site(output, args)`) and `fold`.
    """

    def is_site(self, path: str, module: nn.Module) -> bool:
        """Whether this method can act at `module`; `targets` selects among these."""
        raise NotImplementedError

    def default_sites(self, model: nn.Module, candidates: dict[str, nn.Module]) -> list[str]:
        """The sites used when `targets` is `None`: all candidates outside the heads, unless overridden."""
        from mmkit.backbones import head_scopes

        heads = tuple(f"{h}." for h in head_scopes(model))
        return [p for p in candidates if not f"{p}.".startswith(heads)]

    def make_site(self, path: str, module: nn.Module) -> nn.Module:
        """The parameters for one site, on the CPU in float32."""
        raise NotImplementedError

    def fold(self, site: nn.Module, module: nn.Module) -> dict[str, Tensor]:
        """New values for parameters of `module` that make the site superfluous, computed in float64.

        Raises `NotMergeableError` when there are none. Whether they do is tried on a copy before anything is written.
        """
        raise NotMergeableError(f"{self.method!r} cannot be folded into a {type(module).__name__}.")

    def build(self, model: nn.Module) -> None:
        self.make_explicit(model)
        for path, module in self.choose_sites(model).items():
            site = self.make_site(path, module)
            weight = getattr(module, "weight", None)
            self.add_site(path, site.to(weight.device) if isinstance(weight, Tensor) else site)

    def choices(self, model: nn.Module) -> list[str]:
        return list(self.choose_sites(model))

    def choose_sites(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules to act at, by path, as `targets` and `exclude` say. Raises `InputError` when there is none."""
        plain = dict(hooks.named_plain_modules(model))
        candidates = {p: m for p, m in plain.items() if p and not self.inside_saved(p) and self.is_site(p, m)}
        left_out = set(match_targets(self.config.exclude, candidates))  # first: a default is chosen from what is left
        candidates = {p: m for p, m in candidates.items() if p not in left_out}
        if self.config.targets is None:
            paths = self.default_sites(model, candidates)
        else:
            paths = self.match(candidates, plain)
        if not paths:
            raise no_match(self.method, self.config.targets, list(candidates), list(plain))
        return {p: plain[p] for p in paths}

    def match(self, candidates: dict[str, nn.Module], plain: dict[str, nn.Module]) -> list[str]:
        """The candidates that `targets` names; `plain` are all modules of the model."""
        return match_targets(self.config.targets, candidates)

    def install(self, model: nn.Module) -> None:
        for path in self.own_paths:
            self.link(model, path, hooks.SiteAction(self.site(path)))

    def merge_edits(self, model: nn.Module) -> list[Edit]:
        edits, refused = [], {}
        for path in self.own_paths:
            module = hooks.unwrap(hooks.get_module(model, path))
            try:
                folded = self.fold(self.site(path), module)
            except NotMergeableError as error:
                refused[path] = f"{path} ({error})"
                continue
            if isinstance(module, InProjection):  # its tensors belong to the attention around it
                path = path.rpartition(".")[0]
                folded = {f"in_proj_{k}": v for k, v in folded.items()}
            edits += [Edit(path, k, v) for k, v in folded.items()]
        if refused:
            raise NotMergeableError(
                f"{self.method!r} cannot be folded at {list(refused.values())[:4]}. Keep the adapter attached, or exclude these modules.",
                refused,
            )
        return edits
