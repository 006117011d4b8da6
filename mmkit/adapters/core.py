"""The contract every adapter keeps: attach, train, disable, merge, unmerge, detach.

An adapter owns its own parameters and nothing else. While it is attached the model keeps its keys, module types and tensors;
after `detach` it is bit-equal to before. A method that changes a module's output subclasses `SiteAdapter` (see
`mmkit.adapters.sites`); a method that changes tokens, attention or the block graph subclasses `Adapter` and uses the primitives of
`mmkit.adapters.hooks`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from mmkit.adapters import hooks
from mmkit.errors import InputError, NotMergeableError, nearest
from mmkit.registry import ADAPTERS

T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class AdapterConfig:
    """What is needed to rebuild an adapter on another copy of the model. Frozen; converts to and from JSON.

    Attributes:
        targets: which modules to adapt: names, name endings ("qkv") or wildcards ("blocks.[0-5].*"); `None` lets the method choose.
        modules_to_save: modules trained whole and stored beside the adapter, usually the head; "head" stands for the model's classifier.
    """

    method: ClassVar[str] = ""
    targets: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.modules_to_save, str):
            object.__setattr__(self, "modules_to_save", (self.modules_to_save,))

    def to_dict(self) -> dict[str, Any]:
        """JSON-friendly fields, with the method's name."""
        return {"method": self.method, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild from `to_dict`; a key this version does not know is dropped with a warning."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = set(values) - known - {"method"}
        if unknown:
            warnings.warn(f"{cls.__name__}: ignoring unknown settings {sorted(unknown)}", stacklevel=2)
        return cls(**{k: _tuples(v) for k, v in values.items() if k in known})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


class Edit(NamedTuple):
    """One tensor a merge writes: `value` becomes parameter `name` of the module at `path`."""

    path: str
    name: str
    value: Tensor


class AdapterStack:
    """What mmkit remembers on a model: its adapters in the order of attachment, and which parameters were trainable."""

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.trainable: dict[str, bool] | None = None

    def live(self) -> list[str]:
        """Names of the adapters that act through hooks: attached and not merged."""
        return [name for name, adapter in self.adapters.items() if adapter.attached]

    @staticmethod
    def of(model: nn.Module) -> AdapterStack:
        """The stack of `model`, created at first use (a plain attribute: it is not part of the state dict)."""
        return model.__dict__.setdefault("_mmkit_adapters", AdapterStack())

    def freeze(self, model: nn.Module) -> None:
        """Stop gradients of the base; remembers the flags for `detach`."""
        if self.trainable is None:
            self.trainable = {k: p.requires_grad for k, p in model.named_parameters()}
        own = {id(p) for a in self.adapters.values() for _, p in a.trainable_parameters()}
        for p in model.parameters():
            if id(p) not in own:
                p.requires_grad_(False)

    def forget(self, model: nn.Module, name: str) -> None:
        """Drop an adapter; with the last one the model is as it was found."""
        self.adapters.pop(name, None)
        if not self.adapters:
            for k, p in model.named_parameters():
                if self.trainable and k in self.trainable:
                    p.requires_grad_(self.trainable[k])
            model.__dict__.pop("_mmkit_adapters", None)


def attached_adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on `model` (attached or merged), by name, in the order of attachment."""
    stack = model.__dict__.get("_mmkit_adapters")
    return dict(stack.adapters) if stack else {}


class Adapter(nn.Module):
    """Base class of all methods.

    Subclasses set `config_class`, create their parameters in `build(model)` with `add_site`, place hooks or overrides in
    `install(model)`, and return what a merge writes from `merge_edits(model)`.

    Attributes:
        config: the frozen settings.
        sites: module path -> the `nn.Module` that holds that site's parameters (keys with "/" for ".").
        enabled: `False` inside `disabled()`.
    """

    method: ClassVar[str] = ""
    config_class: ClassVar[type[AdapterConfig]] = AdapterConfig
    lr_scale: ClassVar[float] = 1.0
    """Learning rate of the method's own parameters over the one `fit` is given, which heads and norms keep."""
    decays: ClassVar[bool] = True
    """Whether weight decay applies to the method's own parameters."""

    def __init__(self, config: AdapterConfig | None = None, name: str = "default"):
        super().__init__()
        self.config: Any = config if config is not None else self.config_class()
        self.name = name
        self.enabled = True
        self.merged = False
        self.sites = nn.ModuleDict()
        self._saved: list[str] = []  # paths in `sites` that are trained copies of whole modules
        self._backup: list[tuple[str, str, Tensor | None]] = []
        self.__dict__["_model"] = None

    # --- what a method implements -----------------------------------------------------------------------------------

    def build(self, model: nn.Module) -> None:
        """Create this method's parameters for `model` with `add_site`."""

    def install(self, model: nn.Module) -> None:
        """Place hooks and overrides into `model`."""

    def merge_edits(self, model: nn.Module) -> list[Edit]:
        """The tensors a merge writes, computed without changing anything. Raises `NotMergeableError`."""
        raise NotMergeableError(f"{self.method!r} cannot be folded into weights; keep it attached.")

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
        """Whether the adapter acts on a model through hooks (not when merged)."""
        return self.__dict__["_model"] is not None and not self.merged

    def attach(self, model: nn.Module) -> Self:
        """Place the adapter on `model`. On any error the model is left as it was.

        Raises:
            InputError: already attached, the name is taken, or no module matches.
        """
        if self.__dict__["_model"] is not None:
            raise InputError(f"Adapter {self.name!r} is already attached; detach it first.")
        stack = AdapterStack.of(model)
        if self.name in stack.adapters:
            raise InputError(f"The model already has an adapter called {self.name!r}; pass another name=.")
        try:
            if not len(self.sites):
                self.build(model)
                self._build_saved(model)
            self._install_saved(model)
            self.install(model)
        except BaseException:
            hooks.remove(model, self)
            stack.forget(model, "")
            raise
        self.__dict__["_model"] = model
        stack.adapters[self.name] = self
        return self

    def detach(self) -> nn.Module:
        """Take the adapter off; the model is bit-equal to before. A merged adapter is unmerged first."""
        model = self.model
        if self.merged:
            self.unmerge()
        self._remove(model)
        AdapterStack.of(model).forget(model, self.name)
        self.__dict__["_model"] = None
        return model

    def _remove(self, model: nn.Module) -> None:
        hooks.remove(model, self)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the model behaves as if the adapter were not there."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextlib.contextmanager
    def registered(self) -> Iterator[nn.Module]:
        """Inside the block the parameters are also a submodule of the model, so that DDP, FSDP and EMA see them.

        The submodule is called `mmkit_adapter_<name>`; the model's other keys stay as they are.
        """
        key = f"mmkit_adapter_{self.name}"
        self.model.add_module(key, self.sites)
        try:
            yield self.model
        finally:
            self.model._modules.pop(key, None)

    def check(self, *inputs: Any, **kwargs: Any) -> None:
        """Run the model once and make sure that every site was reached.

        Raises `InputError` naming the sites whose module is never called (its weights are read directly instead), where
        training would silently do nothing.
        """
        reached: set[str] = set()
        handles = [
            hooks.get_module(self.model, path).register_forward_hook(lambda *_, path=path: reached.add(path))
            for path in self.site_paths
        ]
        training = self.model.training
        try:
            with torch.no_grad():
                self.model.eval()(*inputs, **kwargs)
        finally:
            self.model.train(training)
            for handle in handles:
                handle.remove()
        missed = sorted(set(self.site_paths) - reached)
        if missed:
            raise InputError(
                f"Adapter {self.name!r} has no effect at {missed[:6]}: the model reads these weights without calling the "
                "modules. Choose other `targets`."
            )

    # --- parameters ---------------------------------------------------------------------------------------------------

    def add_site(self, path: str, module: nn.Module) -> None:
        """Own `module`'s parameters under the model path `path`."""
        self.sites[path.replace(".", "/")] = module

    def site(self, path: str) -> nn.Module:
        """The parameters of the site at `path`."""
        return self.sites[path.replace(".", "/")]

    @property
    def site_paths(self) -> list[str]:
        """Model paths this adapter acts at."""
        return [k.replace("/", ".") for k in self.sites]

    @staticmethod
    def _plain(key: str) -> str:
        return key.removeprefix("sites.").replace("/", ".")

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters to optimise, named `<module path>.<parameter>`."""
        return [(self._plain(k), p) for k, p in self.named_parameters() if p.requires_grad]

    def own_parameters(self) -> list[nn.Parameter]:
        """The method's own parameters, without the trained copies of whole modules (`modules_to_save`)."""
        saved = {path.replace(".", "/") for path in self._saved}
        return [p for key, site in self.sites.items() if key not in saved for p in site.parameters()]

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
        """Load what `state_dict` returned."""
        keys = {self._plain(k): k for k in super().state_dict()}
        return super().load_state_dict({keys.get(k, k): v for k, v in state_dict.items()}, strict, assign)

    def digest(self) -> str:
        """Fingerprint of the sites and their tensor shapes: equal for two models an adapter file can move between."""
        shapes = {k: list(v.shape) for k, v in sorted(self.state_dict().items())}
        return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()

    # --- modules trained whole ----------------------------------------------------------------------------------------

    def _build_saved(self, model: nn.Module) -> None:
        for path in self.config.modules_to_save:
            if path == "head":
                from mmkit.backbones import head_name

                path = head_name(model)
            try:
                original = hooks.unwrap(hooks.get_module(model, path))
            except AttributeError:
                names = [n for n, _ in hooks.named_plain_modules(model) if n]
                raise InputError(f"modules_to_save: the model has no {path!r}. {nearest(path, names)}") from None
            if not any(True for _ in original.parameters()):
                raise InputError(f"modules_to_save: {path!r} has no parameters; build the model with num_classes=N.")
            self._saved.append(path)
            self.add_site(path, copy.deepcopy(original).requires_grad_(True))

    def _install_saved(self, model: nn.Module) -> None:
        for path in self._saved:
            hooks.add_hook(hooks.get_module(model, path), self, SavedModule(self.site(path)))

    def _saved_edits(self, model: nn.Module) -> list[Edit]:
        edits = []
        for path in self._saved:
            for name, value in self.site(path).state_dict().items():
                inner, _, leaf = name.rpartition(".")
                edits.append(Edit(f"{path}.{inner}" if inner else path, leaf, value))
        return edits

    # --- merging --------------------------------------------------------------------------------------------------------

    @property
    def mergeable(self) -> bool:
        """Whether `merge` would succeed now."""
        try:
            self._plan()
        except NotMergeableError:
            return False
        return True

    def _plan(self) -> list[Edit]:
        model = self.model
        if self.merged:
            raise NotMergeableError(f"Adapter {self.name!r} is already merged.")
        for other in attached_adapters(model).values():
            if other is self:
                break
            shared = set(other.site_paths) & set(self.site_paths)
            if shared and not other.merged:
                raise NotMergeableError(
                    f"Adapter {other.name!r} was attached before {self.name!r} and acts at the same modules; merge it first.",
                    sorted(shared),
                )
        edits = self.merge_edits(model) + self._saved_edits(model)
        for edit in edits:
            if edit.value.is_floating_point() and not torch.isfinite(edit.value).all():
                raise NotMergeableError(f"Merging would write NaN or infinite values to {edit.path}.", [edit.path])
        _refuse_shared(model, edits)
        return edits

    def merge(self) -> nn.Module:
        """Fold the adapter into the weights and take the hooks off. Returns the model. All or nothing.

        Raises:
            NotMergeableError: a site cannot absorb the change (`.sites` names it), or an earlier adapter on the same modules
                is not merged yet. The model is unchanged.
        """
        edits = self._plan()
        model = self.model
        self._remove(model)
        self._backup = [_write(model, edit) for edit in edits]
        self.merged = True
        return model

    def unmerge(self) -> Self:
        """Undo `merge` bit-exactly (from a copy, never by dividing) and attach again.

        Raises:
            InputError: not merged, or a later adapter on the same modules is still there.
        """
        model = self.model
        if not self.merged:
            raise InputError(f"Adapter {self.name!r} is not merged.")
        adapters = list(attached_adapters(model).values())
        for other in adapters[adapters.index(self) + 1 :]:
            if set(other.site_paths) & set(self.site_paths):
                raise InputError(
                    f"Adapter {other.name!r} came after {self.name!r} on the same modules; detach it first."
                )
        for path, name, value in reversed(self._backup):
            _restore(model, path, name, value)
        self._backup = []
        self.merged = False
        self._install_saved(model)
        self.install(model)
        return self

    def extra_repr(self) -> str:
        state = "merged" if self.merged else "attached" if self.attached else "detached"
        return f"method={self.method!r}, name={self.name!r}, {state}, sites={len(self.sites)}"


class SavedModule:
    """Hook function: the trained copy of a module answers in its place."""

    def __init__(self, site: nn.Module):
        self.site = site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.site.training != module.training:
            self.site.train(module.training)
        dtype = next(self.site.parameters()).dtype
        if isinstance(output, Tensor) and output.dtype != dtype and not torch.is_autocast_enabled(output.device.type):
            args = tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
            return self.site(*args).to(output.dtype)  # a half-precision model with a float32 head
        return self.site(*args)


# --- helpers ------------------------------------------------------------------------------------------------------------


def _refuse_shared(model: nn.Module, edits: list[Edit]) -> None:
    """A tensor used by several modules must not be folded into: the other module would change too."""
    users: dict[int, set[int]] = {}
    for _, module in hooks.named_plain_modules(model):
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


def _write(model: nn.Module, edit: Edit) -> tuple[str, str, Tensor | None]:
    """Write one edit; returns what `_restore` needs."""
    module = hooks.unwrap(hooks.get_module(model, edit.path))
    current = getattr(module, edit.name, None)
    if current is None:
        like = next(module.parameters(), edit.value)
        value = edit.value.detach().to(device=like.device, dtype=like.dtype)
        module.register_parameter(edit.name, nn.Parameter(value, requires_grad=False))
        return edit.path, edit.name, None
    before = current.detach().clone()
    current.data.copy_(edit.value)
    return edit.path, edit.name, before


def _restore(model: nn.Module, path: str, name: str, value: Tensor | None) -> None:
    module = hooks.unwrap(hooks.get_module(model, path))
    if value is None:
        module._parameters[name] = None
    else:
        getattr(module, name).data.copy_(value)


def register_adapter(name: str) -> Callable[[T], T]:
    """Class decorator: make a method available as `apply_adapter(model, name)` and to `load_adapter`."""

    def add(cls: T) -> T:
        cls.method = name  # type: ignore[attr-defined]
        cls.config_class.method = name  # type: ignore[attr-defined]
        return ADAPTERS.register(name)(cls)

    return add


def list_adapters(pattern: str = "") -> list[str]:
    """Names of the adapter methods; `pattern` is a substring or wildcard."""
    return ADAPTERS.names(pattern)


def apply_adapter(
    model: nn.Module, config: Any = "ssf", *, name: str = "default", freeze: bool = True, **settings: Any
) -> Adapter:
    """Build the adapter of `config` and attach it to `model`.

    Args:
        model: any `nn.Module`.
        config: a method's name (with its settings as keywords), an `AdapterConfig`, or a peft config such as `peft.LoraConfig`.
        name: a model can carry several adapters under different names; they act in the order of attachment.
        freeze: stop the gradients of everything but adapters. `detach` restores the flags.

    Returns:
        The attached adapter; optimise `adapter.parameters()`.

    Raises:
        InputError: unknown method or setting, or no module matches; the model is unchanged.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
        >>> adapter = apply_adapter(model, "ssf", modules_to_save=("head",))
        >>> sorted(adapter.state_dict())[-1]
        'patch_embed.proj.shift'
    """
    if isinstance(config, str):
        cls = ADAPTERS.get(config)
        try:
            config = cls.config_class(**settings)
        except TypeError as error:
            raise InputError(
                f"{config!r}: {error}. Settings: {[f.name for f in dataclasses.fields(cls.config_class)]}"
            ) from None
    elif settings:
        raise InputError(f"Settings {sorted(settings)} belong into the config; give a method's name to pass them here.")
    elif isinstance(config, AdapterConfig):
        cls = ADAPTERS.get(config.method)
    elif hasattr(config, "peft_type"):
        cls = ADAPTERS.get("peft")
    else:
        raise InputError(
            f"config must be a method's name, an AdapterConfig or a peft config, not {type(config).__name__}."
        )
    adapter = cls(config, name=name).attach(model)
    if freeze:
        AdapterStack.of(model).freeze(model)
    return adapter
