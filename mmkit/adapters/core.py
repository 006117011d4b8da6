"""The contract every adapter keeps: attach, train, disable, scale, merge, unmerge, detach.

An adapter owns its own parameters and nothing else. While it is attached the model keeps its keys, module types and tensors;
after `detach` it is bit-equal to before. A method that changes a module's output subclasses `SiteAdapter` (see
`mmkit.adapters.sites`); a method that changes tokens, attention or the block graph subclasses `Adapter` and links actions of
`mmkit.adapters.hooks` to modules.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mmkit.adapters import hooks, trial
from mmkit.adapters.attention import make_explicit
from mmkit.adapters.config import AdapterConfig
from mmkit.adapters.files import AdapterFiles
from mmkit.adapters.merging import COUNT, Merging, strength
from mmkit.adapters.places import ancestors, is_routed, row_axis, saved_paths_of, signature
from mmkit.adapters.stack import AdapterStack, eval_mode, roots_of
from mmkit.adapters.targets import shortest_endings
from mmkit.errors import CheckpointError, InputError


class Sites(nn.ModuleDict):
    """Modules by any name, also by those that a dict's own methods have, such as "keys"."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._modules[name] = module  # type: ignore[assignment]


class Adapter(Merging, AdapterFiles, nn.Module):
    """Base class of all methods.

    Subclasses set `config_class`, create their parameters in `build(model)` with `add_site`, place actions in `install(model)`
    with `link`, and return what a merge writes from `merge_edits(model)`.

    Attributes:
        config: the frozen settings.
        sites: the `nn.Module`s that hold the method's parameters, by "<module path>" or "<module path>|<slot>" ("/" for ".").
        saved: trained copies of whole modules, by path.
        enabled: whether the adapter acts; `disabled()` and `set_active_adapters` change it.
    """

    method: ClassVar[str] = ""
    config_class: ClassVar[type[AdapterConfig]] = AdapterConfig
    tasks: ClassVar[tuple[str, ...]] = ()
    """Tasks the method is made for; empty: any."""
    lr_scale: ClassVar[float] = 1.0
    """Learning rate of the method's own parameters over the one `fit` is given, which heads and norms keep."""
    decays: ClassVar[bool] = True
    """Whether weight decay applies to the method's own parameters."""
    rows_at_once: int = 1
    """The least number of rows a call needs (frames of a clip)."""

    def __init__(self, config: AdapterConfig | None = None, name: str = "default"):
        super().__init__()
        if not isinstance(name, str) or not name:
            raise InputError(f"The name of an adapter is a text of one letter or more, not {name!r}.")
        self.config: Any = config if config is not None else self.config_class()
        self.name = name
        self.enabled = True
        self.order = 0
        self.sites = Sites()
        self.saved = Sites()
        self.links: list[hooks.Link] = []
        self._explicit = False
        self._scale = 1.0
        self._backup: list[tuple[str, str, Tensor | None]] = []
        self._hosts: dict[str, str] = {}
        self.__dict__["_model"] = None

    @classmethod
    def configure(cls, settings: dict[str, Any]) -> Any:
        """The config that keywords of `apply_adapter` stand for. Raises `TypeError` or `InputError` for unknown ones."""
        return cls.config_class(**settings)

    # --- what a method implements -----------------------------------------------------------------------------------

    def build(self, model: nn.Module) -> None:
        """Create this method's parameters for `model` with `add_site`."""

    def install(self, model: nn.Module) -> None:
        """Place the method's actions with `link`."""

    def choices(self, model: nn.Module) -> list[str]:
        """The paths at which `build` would put its sites on `model`; they must be known when the adapter comes to another one."""
        return self.own_paths

    def starts_as_identity(self) -> bool:
        """Whether a fresh adapter leaves the model as it is; tried on every kind of module when it is attached."""
        return True

    # --- attaching ----------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model this adapter is attached to or merged into. Raises `InputError` when there is none."""
        model = self.__dict__["_model"]
        if model is None:
            raise InputError(f"Adapter {self.name!r} is not attached; call adapter.attach(model) first.")
        return model

    @property
    def attached(self) -> bool:
        """Whether the adapter acts on a model un-merged."""
        return self.__dict__["_model"] is not None and not self.merged

    @property
    def placed(self) -> bool:
        """Whether anything of the adapter acts through the calls of a model; also what some methods leave after a merge."""
        return self.attached or any(not link.folds for link in self.links)

    def attach(self, model: nn.Module) -> Self:
        """Place the adapter on `model`. On any error the model and the adapter are left as they were.

        Raises:
            InputError: already attached, the name is taken, no module matches, the adapter was made for another architecture,
                or another adapter is in the way.
        """
        if self.__dict__["_model"] is not None:
            raise InputError(f"Adapter {self.name!r} is already attached; detach it first.")
        stacks = [AdapterStack.of(root) for _, root in roots_of(model)]
        if any(self.name in stack.adapters for stack in stacks):
            raise InputError(f"The model already has an adapter called {self.name!r}; pass another name=.")
        if any(torch.nn.parameter.is_lazy(p) for p in model.parameters()):
            raise InputError(
                f"{type(model).__name__} has parameters without a shape yet: run the model once, then attach."
            )
        before = {k: copy.copy(v) if isinstance(v, dict | list) else v for k, v in self.__dict__.items()}
        try:
            with torch.inference_mode(False):  # parameters made in inference mode could never be trained
                self._place(model)
        except BaseException:
            hooks.remove(model, self)
            self.__dict__.clear()
            self.__dict__.update(before)
            for stack in stacks:
                stack.forget()
            raise
        self.__dict__["_model"] = model
        for stack in stacks:
            stack.adapters[self.name] = self
            stack.watching = True
            stack.settle()
        hooks.forget_compiled()
        return self

    def _place(self, model: nn.Module) -> None:
        """Build (at the first time) and link everything, and make sure that it fits together."""
        fresh = not self._hosts
        self.order = next(COUNT)
        if self._explicit:
            make_explicit(model, self)
        if fresh:
            self.sites, self.saved = Sites(), Sites()
            self._build_saved(model)
            self.build(model)
            self._hosts = {path: signature(model, path) for path in self.site_paths}
        elif misfits := [p for p, s in self._hosts.items() if signature(model, p) != s]:
            raise InputError(
                f"Adapter {self.name!r} was made for another model: {len(misfits)} of its {len(self._hosts)} modules are missing or "
                f"of another shape here, such as {misfits[:4]}. Make a new one with apply_adapter."
            )
        elif new := [p for p in self.choices(model) if p not in self._hosts]:
            raise InputError(
                f"Adapter {self.name!r} was made for another model: this one has {len(new)} more modules it would act at, such as "
                f"{new[:4]}. Make a new one with apply_adapter."
            )
        self.links = []
        self.install(model)
        for path in self.saved_paths:
            self.link(model, path, hooks.SavedAction(self.saved[path.replace(".", "/")]))
        self._refuse_shadowed(model)
        hooks.call_all_modules(model, self)
        if fresh and self.starts_as_identity():
            trial.require_identity(self, model)

    def detach(self) -> nn.Module:
        """Take the adapter off; the model is bit-equal to before. A merged adapter is unmerged first."""
        model = self.model
        if self.merged:
            self.unmerge()
        hooks.remove(model, self)
        self.links = []
        self.__dict__["_model"] = None
        for _, root in roots_of(model):
            AdapterStack.of(root).forget(self.name)
        hooks.forget_compiled()
        return model

    def link(self, model: nn.Module, path: str, action: hooks.Action, *, slot: str = "", folds: bool = True) -> None:
        """Let `action` take part in every call of the module at `path`.

        Args:
            slot: distinguishes several actions of one adapter at one module.
            folds: whether a merge makes the action superfluous; `False` stays on the model.
        """
        module = hooks.get_module(model, path)
        for inner in action.modules:  # dropout must not become live because it is new
            inner.train(module.training)
        link = hooks.Link(self, f"{path}|{slot}" if slot else path, action, folds=folds, axis=row_axis(model, path))
        action.bind(hooks.Under(link))
        self.links.append(link)
        hooks.add_link(module, link)

    def make_explicit(self, model: nn.Module) -> None:
        """Have every `nn.MultiheadAttention` of `model` call its projections, as `<path>.in_proj` and `<path>.out_proj`."""
        self._explicit = True
        make_explicit(model, self)

    def _refuse_shadowed(self, model: nn.Module) -> None:
        """Two adapters must not meet where one replaces a module whole and the other acts inside it."""
        for path in self.saved_paths:
            for name, inner in hooks.get_module(model, path).named_modules():
                if name and any(link.owner is not self and link.key for link in hooks.links_at(inner)):
                    raise InputError(
                        f"modules_to_save {path!r} would replace {name!r} inside it, where another adapter acts: merge or detach "
                        "that one first."
                    )
        for path in self.site_paths:
            for above in ancestors(path):
                for link in hooks.links_at(hooks.get_module(model, above)):
                    if isinstance(link.action, hooks.SavedAction) and link.owner is not self:
                        raise InputError(
                            f"{path!r} lies inside {above!r}, which adapter {link.owner.name!r} answers with a trained copy: merge "
                            "that adapter first, or leave the module out of `targets`."
                        )

    # --- acting -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the model behaves as if the adapter were not there, merged or not.

        Raises `InputError` when it is merged and a later adapter was merged on top of it.
        """
        enabled, merged = self.enabled, self.merged
        if merged:
            self.unmerge()
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = enabled
            if merged and self.attached:  # not when the block detached or merged it
                self._fold(self._plan(self._scale))

    @property
    def scale(self) -> float:
        """Strength: 0 is the base, 1 the trained adapter; in between and beyond, outputs (and merged weights) are interpolated."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        value, merged = strength(value), self.merged
        if merged:
            self.unmerge()
        self._scale = value
        if merged:
            self._fold(self._plan(self._scale))

    @contextlib.contextmanager
    def registered(self) -> Iterator[nn.Module]:
        """Inside the block the parameters are also a submodule of the model, so that DDP, FSDP and EMA see them.

        The submodule is called `mmkit_adapter_<name>`; the model's other keys stay as they are.
        """
        key = f"mmkit_adapter_{self.name}".replace(".", "_")
        self.model.add_module(key, nn.ModuleList([self.sites, self.saved]))
        try:
            yield self.model
        finally:
            self.model._modules.pop(key, None)

    def check(self, *inputs: Any, **kwargs: Any) -> None:
        """Run the model once in eval mode and make sure that every site is reached.

        Without arguments the backbone's own example input is used. Raises `InputError` naming the sites whose module is never
        called (its weights are read directly instead), where training would silently do nothing.
        """
        model = self.model
        if not inputs and not kwargs:
            from mmkit.backbones import example_input

            example = example_input(model, self.rows_at_once)
            if example is None:
                raise InputError(
                    f"Adapter {self.name!r} has not been seen at work yet: run the model once, or call adapter.check(*inputs)."
                )
            inputs, kwargs = example
        with eval_mode(model), torch.no_grad():
            model(*inputs, **kwargs)
        self.require_reached(model)

    def unreached(self, root: nn.Module) -> list[str]:
        """Sites inside `root` whose module was not called since the adapter was attached."""
        prefix = next((p for p, r in roots_of(self.model) if r is root), "")
        return [link.key for link in self.links if not link.reached and link.key.startswith(prefix)]

    def require_reached(self, root: nn.Module) -> None:
        """Raise `InputError` unless all sites inside `root` were reached."""
        missed = [k for k in self.unreached(root) if not is_routed(k)]
        if missed:
            paths = {k.partition("|")[0] for k in missed}
            endings = shortest_endings(paths, set(self.site_paths) - paths)
            raise InputError(
                f"Adapter {self.name!r} ({self.method}) has no effect at {len(missed)} of its modules, such as {missed[:4]}: the model "
                f"never calls them, it reads their weights or skips them. Attach with other targets, or exclude={tuple(endings)!r}."
            )

    # --- parameters ---------------------------------------------------------------------------------------------------

    def add_site(self, path: str, module: nn.Module, slot: str = "") -> None:
        """Own `module`'s parameters for the module at `path` of the model (and `slot`, when it has several)."""
        key = _key(path, slot)
        if key in self.sites:
            raise InputError(f"{self.method!r} has two sites at {path!r}; give them slots.")
        self.sites[key] = module

    def site(self, path: str, slot: str = "") -> nn.Module:
        """The parameters of the site at `path`."""
        key = _key(path, slot)
        return self.sites[key] if key in self.sites else self.saved[key]

    @property
    def own_paths(self) -> list[str]:
        """Model paths of the method's own sites."""
        return list(dict.fromkeys(k.partition("|")[0].replace("/", ".") for k in self.sites))

    @property
    def saved_paths(self) -> list[str]:
        """Model paths of the modules that are trained whole."""
        return [k.replace("/", ".") for k in self.saved]

    @property
    def site_paths(self) -> list[str]:
        """Model paths this adapter acts at."""
        return list(dict.fromkeys([*self.own_paths, *self.saved_paths]))

    def inside_saved(self, path: str) -> bool:
        """Whether `path` is, or lies in, a module that is trained whole."""
        return any(f"{path}.".startswith(f"{s}.") for s in self.saved_paths)

    def _build_saved(self, model: nn.Module) -> None:
        paths = saved_paths_of(model, self.config.modules_to_save)
        for path in paths:
            original = hooks.unwrap(hooks.get_module(model, path))
            if not any(True for _ in original.parameters()):
                raise InputError(f"modules_to_save: {path!r} has no parameters; build the model with num_classes=N.")
            self.saved[_key(path)] = hooks.trained_copy(original)

    @staticmethod
    def _plain(key: str) -> str:
        holder, _, rest = key.partition(".")
        return (rest if holder in ("sites", "saved") else key).replace("/", ".").replace("|", ".")

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters to optimise, named `<module path>.<parameter>`."""
        return [(self._plain(k), p) for k, p in self.named_parameters() if p.requires_grad]

    def own_parameters(self) -> list[nn.Parameter]:
        """The method's own parameters, without the trained copies of whole modules (`modules_to_save`)."""
        return list(self.sites.parameters())

    def num_parameters(self) -> int:
        """Number of trainable values, saved modules included."""
        return sum(p.numel() for _, p in self.trainable_parameters())

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:  # type: ignore[override]
        """Tensors by `<module path>.<parameter>`, without any infix."""
        plain = super().state_dict(keep_vars=keep_vars)
        out = destination if destination is not None else {}
        out.update({prefix + self._plain(k): v for k, v in plain.items()})
        return out

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned; all or nothing.

        Raises `InputError` while merged (the weights would keep the old values), `CheckpointError` when keys or shapes differ.
        """
        if self.merged:
            raise InputError(f"Adapter {self.name!r} is merged: call unmerge() before loading other values.")
        names, own = self._names(), self.state_dict()
        shapes = [k for k, v in state_dict.items() if k in own and own[k].shape != v.shape]
        missing, unexpected = sorted(set(own) - set(state_dict)), sorted(set(state_dict) - set(own))
        if shapes or (strict and (missing or unexpected)):
            raise CheckpointError(
                f"These tensors do not fit adapter {self.name!r}: {len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected "
                f"{unexpected[:3]}, {len(shapes)} of another shape {shapes[:3]}."
            )
        return super().load_state_dict({names.get(k, k): v for k, v in state_dict.items()}, strict, assign)

    def _names(self) -> dict[str, str]:
        """The name that a tensor has in `state_dict` -> the one it has in this module."""
        return {self._plain(k): k for k in nn.Module.state_dict(self)}

    def digest(self) -> str:
        """Identifies names and shapes of all tensors."""
        shapes = {k: list(v.shape) for k, v in sorted(self.state_dict().items())}
        return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()

    def extra_repr(self) -> str:
        state = "merged" if self.merged else "attached" if self.attached else "detached"
        return f"method={self.method!r}, name={self.name!r}, {state}, sites={len(self.sites)}"


def _key(path: str, slot: str = "") -> str:
    """The name of a site among `Adapter.sites`."""
    if set(path) & set("/|"):
        raise InputError(
            f"The module {path!r} has '/' or '|' in its name, which adapters use themselves: exclude it or rename it."
        )
    return path.replace(".", "/") + (f"|{slot}" if slot else "")
