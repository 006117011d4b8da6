"""LoRA and its relatives: Hugging Face peft's layers under the mmkit contract, in peft's own file format.

peft would replace modules by wrappers. Here its layers are made on a skeleton that holds stand-ins for the chosen modules (same
class, same parameters) and take part in the calls of the real ones like any other adapter: keys, types and whatever others put on
the model stay as they are, and attaching, switching, merging and detaching are the same as everywhere.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import re
import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmkit.adapters import hooks
from mmkit.adapters.attention import is_fused_attention
from mmkit.adapters.config import AdapterConfig
from mmkit.adapters.core import Adapter
from mmkit.adapters.files import CONFIG_NAME, TENSORS_NAME
from mmkit.adapters.peft_keys import from_peft, into_projection, repeated, sites_of, times_out_proj, to_peft
from mmkit.adapters.sites import SiteAdapter
from mmkit.adapters.targets import match_targets, shortest_endings
from mmkit.adapters.trial import double_copy
from mmkit.errors import CheckpointError, InputError, NotMergeableError
from mmkit.storage import read_json, write_json, write_safetensors

logger = logging.getLogger(__name__)

KEY = "default"
METHODS: dict[str, dict[str, Any]] = {  # settings that differ from peft's defaults
    "lora": {"lora_alpha": 16},
    "dora": {"lora_alpha": 16, "use_dora": True},
    "beft": {},
    "boft": {},
    "c3a": {"init_weights": True},  # zero, as every other method starts; peft's default is not the identity
    "delora": {},
    "fourierft": {"init_weights": True},
    "gralora": {},
    "hira": {},
    "hra": {},
    "ia3": {"feedforward_modules": []},
    "ln_tuning": {},
    "loha": {},
    "lokr": {},
    "miss": {},
    "oft": {},
    "psoft": {},
    "randlora": {},
    "road": {},
    "shira": {},
    "waveft": {},
}
"""The methods of peft that act at single modules, by mmkit's name, which is peft's in lower case ("dora" is a setting of LoRA)."""

_RESOLVED = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "inference_mode",
)
_FACTS = ("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type")
_ATTENTION = (
    "qkv", "q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v", "to_out.0", "query", "key", "value", "attn.proj", "in_proj", "out_proj",
)  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")


@dataclass(frozen=True)
class PeftMethodConfig(AdapterConfig):
    """Settings of a peft method.

    Attributes:
        targets: `None`: the projections of the attention blocks, or all linear layers where there are none (norms for
            "ln_tuning").
        settings: fields of the method's peft config, for example {"r": 8, "lora_alpha": 16}. In `apply_adapter` they are
            keywords of their own; `alpha` and `dropout` stand for `lora_alpha` and `lora_dropout`.
    """

    settings: dict[str, Any] = field(default_factory=dict)


class PeftAction(hooks.Action):
    """A peft layer answers for its module; it calls what lies below as its base layer."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.modules = (layer,)

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is None or not isinstance(self.layer.__dict__["base_layer"], nn.Linear):
            return self.layer(*args, **kwargs)
        if x.numel() == 0:  # some layers of peft cannot compute on nothing; the base's answer to nothing is right
            return below(*args, **kwargs)
        if x.ndim <= 3:
            return self.layer(*args, **kwargs)
        rows = self.layer(x.flatten(1, -2), *args[1:], **kwargs)  # and some take (batch, tokens, channels) only
        return rows.unflatten(1, x.shape[1:-1])

    def bind(self, below: hooks.Below) -> None:
        self.layer.__dict__["base_layer"].__dict__["forward"] = below

    def on(self, host: nn.Module) -> PeftAction:
        layer = _copied(self.layer)
        layer.__dict__["base_layer"] = _stand_in(hooks.unwrap(host))
        return PeftAction(layer)


class PeftAdapter(SiteAdapter):
    """Any method of `METHODS`; see the module docstring. `peft_config` is what peft was given."""

    config_class: ClassVar[type[PeftMethodConfig]] = PeftMethodConfig
    peft_config: Any = None

    @classmethod
    def configure(cls, settings: dict[str, Any]) -> PeftMethodConfig:
        """The config of keywords: mmkit's own fields, the rest are peft's. Raises `InputError` listing the known ones."""
        own = {f.name for f in dataclasses.fields(AdapterConfig)}
        fields = {f.name for f in dataclasses.fields(_peft_class(cls.method))} - set(_RESOLVED)
        theirs = {}
        for key, value in settings.items():
            if key in own:
                continue
            name = key if key in fields else f"lora_{key}"
            if name not in fields:
                raise InputError(f"{cls.method!r} has no setting {key!r}. Settings: {sorted(own | fields)}.")
            theirs[name] = value
        return cls.config_class(**{k: v for k, v in settings.items() if k in own}, settings=theirs)

    # --- attaching ------------------------------------------------------------------------------------------------------

    def is_site(self, path: str, module: nn.Module) -> bool:
        if self.method == "ln_tuning":
            return isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm)
        return isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)

    def default_sites(self, model: nn.Module, candidates: dict[str, nn.Module]) -> list[str]:
        paths = super().default_sites(model, candidates)
        if self.method == "ln_tuning":
            return paths
        layers = [
            p for p in paths if not isinstance(candidates[p], nn.Embedding) and getattr(candidates[p], "groups", 1) == 1
        ]
        return match_targets(_ATTENTION, [p for p in layers if isinstance(candidates[p], nn.Linear)]) or layers

    def match(self, candidates: dict[str, nn.Module], plain: dict[str, nn.Module]) -> list[str]:
        if isinstance(self.config.targets, _Regex):
            return [p for p in candidates if re.fullmatch(self.config.targets, p)]
        fused = {p for p, m in plain.items() if is_fused_attention(m)}  # naming an attention means its two projections
        every, targets = [*candidates, *fused], self.config.targets
        named = [p for p in every if p in targets] if isinstance(targets, _Exact) else match_targets(targets, every)
        chosen = {q for p in named for q in ((f"{p}.in_proj", f"{p}.out_proj") if p in fused else (p,))}
        return [p for p in candidates if p in chosen]

    def build(self, model: nn.Module) -> None:
        from peft import inject_adapter_in_model

        self.make_explicit(model)
        chosen = self.choose_sites(model)
        self.peft_config = self._make_config(list(chosen))
        tree = nn.Module()
        device = next((m.weight.device for m in chosen.values() if isinstance(m.weight, Tensor)), None)
        tree.device = nn.Parameter(
            torch.empty(0, device=device), requires_grad=False
        )  # peft asks the first parameter for it
        for path, module in chosen.items():
            _plant(tree, path, _stand_in(module))
        flags = [(p, p.requires_grad) for m in chosen.values() for p in m.parameters()]
        try:
            inject_adapter_in_model(copy.deepcopy(self.peft_config), tree, adapter_name=KEY)
        except Exception as error:
            raise InputError(
                f"peft cannot put {self.method!r} on these modules of {type(model).__name__}: {error} "
                "Choose others with targets= or exclude=, or other settings."
            ) from error
        finally:  # whether the base is frozen is not peft's to decide
            hooks.restore_grads(flags)
        for path in chosen:
            layer = _without_base(tree.get_submodule(path), path)
            for p in layer.parameters():  # as get_peft_model does: half-precision weights swallow small steps
                if p.dtype in (torch.float16, torch.bfloat16) and self.method != "delora":  # which does not cast
                    p.data = p.data.float()
            self.add_site(path, layer)
        self.__dict__["_tree"] = tree

    def _make_config(self, paths: list[str]) -> Any:
        settings = {**METHODS[self.method], **self.config.settings}
        if settings.get("bias", "none") != "none":
            raise InputError(
                f"bias={settings['bias']!r} would train biases of the base: put a 'bitfit' adapter beside this one."
            )
        patterns = [p for k, v in settings.items() if k.endswith("_pattern") for p in v or ()]
        if wrong := [
            p for p in patterns if not re.fullmatch(r"[\w.]{1,300}", str(p))
        ]:  # peft takes them as regular expressions
            raise InputError(f"{str(wrong[0])[:60]!r} is not a plain module name.")
        init = settings.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
            raise InputError(
                f"init_lora_weights={init!r} would change the base weights, which an adapter leaves alone."
            )
        try:
            return _peft_class(self.method)(**settings, target_modules=list(paths), modules_to_save=None)
        except (ValueError, TypeError) as error:
            raise InputError(f"peft refuses the settings {settings} of {self.method!r}: {error}") from error

    def install(self, model: nn.Module) -> None:
        for path in self.own_paths:
            plain = hooks.unwrap(hooks.get_module(model, path))
            layer = self.site(path)
            layer.__dict__["base_layer"] = _stand_in(plain)
            self.link(model, path, PeftAction(layer))

    def starts_as_identity(self) -> bool:
        return not any(k.startswith("init_") for k in self.config.settings)  # a start that the caller chose

    def fold(self, site: nn.Module, module: nn.Module) -> dict[str, Tensor]:
        layer, base = _copied(site), double_copy(module)
        added = getattr(base, "bias", 0) is None
        if added:  # so that what a method adds has a place to go
            base.bias = nn.Parameter(base.weight.new_zeros(module.weight.shape[0]))  # type: ignore[operator, union-attr, index]
        layer.base_layer = base
        try:
            layer.double().merge(adapter_names=[KEY])  # type: ignore[operator]
        except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError, KeyError) as error:
            raise NotMergeableError(f"peft: {error}") from error
        merged = layer.get_base_layer()  # type: ignore[operator]
        folded = {k: v.detach() for k, v in merged.named_parameters() if k in ("weight", "bias")}
        if added and not folded.get("bias", torch.zeros(1)).any():
            folded.pop("bias", None)
        return folded

    # --- tensors and files ------------------------------------------------------------------------------------------------

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:  # type: ignore[override]
        """Tensors as peft names them in its files, less "base_model.model."; saved modules under their own keys."""
        out = destination if destination is not None else {}
        out.update({prefix + short: value for short, (_, value) in self._tensors(keep_vars).items()})
        return out

    def _tensors(self, keep_vars: bool = False) -> dict[str, tuple[str, Tensor]]:
        """peft's name of each tensor, with the name it has in this module and its value."""
        found = {}
        for name, value in nn.Module.state_dict(self, keep_vars=keep_vars).items():
            plain = self._plain(name)
            if name.startswith("sites."):
                holder, site, inner = name.split(".", 2)
                plain = self._plain(".".join([holder, site, *(part for part in inner.split(".") if part != KEY)]))
            found[plain] = (name, value)
        return found

    def _names(self) -> dict[str, str]:
        return {short: name for short, (name, _) in self._tensors().items()}

    def write_files(self, folder: Path) -> None:
        """The files peft's `save_pretrained` would write."""
        attentions = self._whole_attentions()
        state = {f"base_model.model.{to_peft(k, attentions)}": v for k, v in self.state_dict().items()}
        for key in repeated(state):
            state[key] = state[key] / times_out_proj()
        write_safetensors(folder / TENSORS_NAME, state)
        config = copy.deepcopy(self.peft_config)
        inside = tuple(f"{a}." for a in attentions)
        paths = [p for p in self.own_paths if not p.startswith(inside)] + attentions
        others = {p for p, _ in hooks.named_plain_modules(self.model) if not p.startswith(inside)} - set(paths)
        config.target_modules = shortest_endings(paths, others)
        config.modules_to_save = self.saved_paths or None
        config.inference_mode = True
        config.save_pretrained(folder)
        write_json(folder / CONFIG_NAME, read_json(folder / CONFIG_NAME))

    def _whole_attentions(self) -> list[str]:
        """Attention modules of which both projections are adapted: peft knows them as one target."""
        if self.method != "lora":  # peft has no other method for such a module
            return []
        paths = set(self.own_paths)
        roots = [p.removesuffix(".in_proj") for p in paths if p.endswith(".in_proj")]
        fused = [r for r in roots if f"{r}.out_proj" in paths and is_fused_attention(hooks.get_module(self.model, r))]
        return sorted(fused)

    @classmethod
    def from_files(
        cls: Any,
        model: nn.Module,
        folder: Path,
        saved: dict[str, Any],
        tensors: dict[str, Tensor],
        name: str,
        strict: bool,
    ) -> Adapter:
        """Load a folder written by peft or `save_adapter`. Which modules it adapts is read from its tensors, not from patterns."""
        from peft import PeftConfig

        if "peft_type" not in saved:
            return super().from_files(model, folder, saved, tensors, name, strict)
        try:
            theirs = PeftConfig.from_pretrained(str(folder))
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise CheckpointError(f"{folder}/{CONFIG_NAME} cannot be read by peft: {error}") from error
        for setting in ("rank_pattern", "alpha_pattern", "modules_to_save"):
            given = getattr(theirs, setting, None) or ()
            names = list(given) if isinstance(given, (dict, list, tuple, set)) else [given]
            wrong = [str(n)[:60] for n in names if not isinstance(n, str) or not re.fullmatch(r"[\w.]{1,300}", n)]
            if wrong:
                raise CheckpointError(
                    f"{folder}/{CONFIG_NAME}: {setting} holds {wrong[0]!r}, which is not a plain module name."
                )
        for setting in ("target_modules", "exclude_modules"):
            given = getattr(theirs, setting, None) or ()
            if not isinstance(given, str | list | tuple | set) or not all(isinstance(n, str) for n in given):
                raise CheckpointError(
                    f"{folder}/{CONFIG_NAME}: {setting} is {str(given)[:60]!r}, not names of modules."
                )
        tensors = tensors | {k: tensors[k] * times_out_proj() for k in repeated(tensors)}
        state = {from_peft(k.removeprefix("base_model.model.")): v for k, v in tensors.items()}
        sites, whole = sites_of(model, state, theirs.modules_to_save or ())
        method, config = _from_config(theirs, _Exact(sites), whole)
        try:
            adapter = method(config, name=name).attach(model)
        except InputError as error:
            raise CheckpointError(f"The peft adapter in {folder} does not fit this model: {error}") from error
        if more := adapter.also_meant(model, theirs):
            problem = f"its targets name {len(more)} more modules here, such as {more[:4]}, which it has no tensors for"
            if strict:
                adapter.detach()
                raise CheckpointError(f"The peft adapter in {folder} does not fit this model: {problem}.")
            logger.warning("The peft adapter in %s: %s. They are not adapted.", folder, problem)
        fused = {p for p, m in hooks.named_plain_modules(model) if is_fused_attention(m)}
        state = {into_projection(k, fused): v for k, v in state.items()}
        return adapter.fill(state, f"The peft adapter in {folder}", strict)

    def also_meant(self, model: nn.Module, theirs: Any) -> list[str]:
        """The modules of a deeper `model`: named by the targets of a peft file like those it has tensors for, but for numbers."""
        targets, exclude = theirs.target_modules, getattr(theirs, "exclude_modules", None) or ()
        if (
            isinstance(targets, str)
            or isinstance(exclude, str)
            or getattr(theirs, "layers_to_transform", None) is not None
        ):
            return []  # expressions of a file are not tried
        try:
            method, config = _from_config(theirs, tuple(targets or ()), (), tuple(exclude))
            named = method(config).choices(model)
        except InputError:
            return []
        own = set(self.own_paths)
        kinds = {re.sub(r"\d+", "N", p) for p in own}
        return [p for p in named if p not in own and re.sub(r"\d+", "N", p) in kinds and not self.inside_saved(p)]


def from_peft_config(config: Any) -> tuple[type[PeftAdapter], PeftMethodConfig]:
    """The method and our config for a peft config that a user made.

    Its `target_modules` mean what they mean to peft: a list of names and endings, or one regular expression.
    """
    targets = config.target_modules
    if isinstance(targets, str):
        targets = "*" if targets == "all-linear" else _Regex(targets)
    exclude = getattr(config, "exclude_modules", None) or ()
    if isinstance(exclude, str) or getattr(config, "layers_to_transform", None) is not None:
        raise InputError(
            "exclude_modules as an expression and layers_to_transform are not taken from a peft config: pass the method's name with "
            'targets=("blocks.[0-5].*",) and exclude=(...).'
        )
    return _from_config(config, targets, config.modules_to_save or (), tuple(sorted(exclude)))


class _Regex(str):
    """A regular expression that a caller wrote (never one from a file) in place of target names."""


class _Exact(tuple[str, ...]):
    """Whole paths, read from a file: neither endings nor patterns."""


def _from_config(
    theirs: Any, targets: Any, saved: Any, exclude: tuple[str, ...] = ()
) -> tuple[type[PeftAdapter], PeftMethodConfig]:
    kind = str(getattr(theirs.peft_type, "value", theirs.peft_type)).lower()
    kind = "dora" if kind == "lora" and getattr(theirs, "use_dora", False) else kind
    if kind not in METHODS:
        raise InputError(f"peft's {kind.upper()} does not act at single modules; mmkit takes {sorted(METHODS)}.")
    defaults = type(theirs)()
    settings = {
        f.name: getattr(theirs, f.name)
        for f in dataclasses.fields(theirs)
        if f.init and f.name not in (*_RESOLVED, *_FACTS) and getattr(theirs, f.name) != getattr(defaults, f.name)
    }
    settings = {
        **{k: getattr(defaults, k) for k in METHODS[kind] if k not in settings and hasattr(defaults, k)},
        **settings,
    }
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    targets = targets if isinstance(targets, str | _Exact) or targets is None else tuple(sorted(targets))
    cls = _method_class(kind)
    return cls, cls.config_class(targets=targets, exclude=exclude, modules_to_save=tuple(saved), settings=settings)


# --- helpers ------------------------------------------------------------------------------------------------------------


def _peft_class(method: str) -> type:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    found = {str(getattr(k, "value", k)).lower(): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = "lora" if method == "dora" else method
    if kind not in found:
        raise InputError(f"The installed peft has no {method!r}: pip install -U peft")
    return found[kind]


def _stand_in(module: nn.Module) -> nn.Module:
    """A module of the same class with the same parameters (the same table of them) that calls nothing of the original's."""
    stand_in = object.__new__(type(module))  # not copy.copy: parametrised modules refuse it
    stand_in.__dict__.update(module.__dict__)
    for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        stand_in.__dict__[table] = OrderedDict()
    stand_in.__dict__.pop("forward", None)
    return stand_in


def _plant(tree: nn.Module, path: str, module: nn.Module) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        tree = tree._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    tree._modules[leaf] = module


def _without_base(layer: nn.Module, path: str) -> nn.Module:
    """The peft layer with its base layer as a plain attribute: the base's parameters are not the adapter's."""
    if "base_layer" not in layer._modules:
        raise InputError(f"peft left {path!r} as it is; leave it out of the targets.")
    layer.__dict__["base_layer"] = layer._modules.pop("base_layer")
    return layer


def _copied(layer: nn.Module) -> nn.Module:
    """A copy of a peft layer without its base layer."""
    copied = copy.deepcopy(layer, {id(layer.__dict__["base_layer"]): None})
    copied.__dict__.pop("base_layer", None)
    return copied


@functools.cache
def _method_class(name: str) -> type[PeftAdapter]:
    config = type(f"{name}Config", (PeftMethodConfig,), {"method": name, "__module__": __name__})
    body = {"method": name, "config_class": config, "__module__": __name__, "__qualname__": name}
    setattr(sys.modules[__name__], f"{name}Config", config)  # so that both can be pickled by name
    return type(name, (PeftAdapter,), body)


def __getattr__(name: str) -> Any:
    if name in METHODS:
        return _method_class(name)
    if name.removesuffix("Config") in METHODS:
        return _method_class(name.removesuffix("Config")).config_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
