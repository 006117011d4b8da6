"""LoRA and its relatives through Hugging Face peft, under the mmkit contract and in peft's own file format.

peft replaces the adapted modules by wrappers, so keys get its `base_layer` infix while such an adapter is attached; `detach`
and `merge` put the very same modules back. Anything `peft.inject_adapter_in_model` accepts works: LoRA, DoRA, LoHa, OFT, ...
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmkit.adapters import hooks
from mmkit.adapters.core import Adapter, AdapterConfig, AdapterStack, Edit, attached_adapters, register_adapter
from mmkit.errors import CheckpointError, InputError, NotMergeableError, nearest
from mmkit.storage import read_json, read_tensors, write_json, write_safetensors


@dataclass(frozen=True)
class PeftAdapterConfig(AdapterConfig):
    """LoRA with the settings vision users need; pass a `peft` config to `apply_adapter` for everything else.

    Attributes:
        targets: names or endings of modules; `None`: the query/key/value and output projections of the attention blocks, or
            all linear layers and convolutions when there are none.
        r: rank. alpha: scale numerator; the update is `alpha / r * B A x`. dropout: on the input of A.
        use_dora: weight-decomposed LoRA (DoRA).
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    use_dora: bool = False


_ATTENTION = (
    "qkv",
    "q_proj",
    "k_proj",
    "v_proj",
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "query",
    "key",
    "value",
    "attn.proj",
)


def lora_config(config: PeftAdapterConfig, model: nn.Module) -> Any:
    """The `peft.LoraConfig` of our settings for `model`."""
    from peft import LoraConfig

    from mmkit.backbones import head_name, head_scopes

    plain = {p: m for p, m in hooks.named_plain_modules(model) if p}
    heads = tuple(f"{path}." for path in head_scopes(model))
    layers = {
        p: m for p, m in plain.items()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and getattr(m, "groups", 1) == 1 and not f"{p}.".startswith(heads)
    }  # fmt: skip
    fused = [p for p, m in plain.items() if isinstance(m, nn.MultiheadAttention)]
    inside = tuple(f"{p}." for p in fused)
    if config.targets is not None:
        targets: Any = config.targets if isinstance(config.targets, str) else list(config.targets)
    else:
        linear = [p for p in layers if not (inside and p.startswith(inside))]
        targets = [p for p in linear if any(f".{p}".endswith(f".{t}") for t in _ATTENTION)] + fused or linear
    saved = [head_name(model) if m == "head" else m for m in config.modules_to_save] or None
    return LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, use_dora=config.use_dora,
        target_modules=targets, modules_to_save=saved,
    )  # fmt: skip


@register_adapter("peft")
class PeftAdapter(Adapter):
    """Any injectable peft method as an mmkit adapter; see the module docstring."""

    config_class = PeftAdapterConfig

    def __init__(self, config: Any = None, name: str = "default"):
        super().__init__(config, name)
        self.key = f"mmkit_{name}".replace(".", "_")  # peft's module dicts refuse names such as "half"
        self.peft_config: Any = None
        self._tensors: dict[str, torch.Tensor] | None = None
        self._fused: list[tuple[nn.Module, str, nn.Parameter, torch.Tensor]] = []

    # --- attaching ------------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> PeftAdapter:
        """See `Adapter.attach`. peft injects its wrappers, mmkit remembers how to take them out."""
        from peft import inject_adapter_in_model, set_peft_model_state_dict

        if self.__dict__["_model"] is not None:
            raise InputError(f"Adapter {self.name!r} is already attached; detach it first.")
        if self.name in attached_adapters(model):
            raise InputError(f"The model already has an adapter called {self.name!r}; pass another name=.")
        if self.peft_config is None:
            own = isinstance(self.config, PeftAdapterConfig)
            self.peft_config = lora_config(self.config, model) if own else copy.deepcopy(self.config)
        flags = {k: p.requires_grad for k, p in model.named_parameters()}
        self._keep_fused(model)
        try:
            with _peft_config(model, {}):
                inject_adapter_in_model(self.peft_config, model, adapter_name=self.key)
            self.__dict__["_model"] = model
            self._refuse_silent()
            self._refuse_after_hooks()
            if self._tensors is not None:
                with _peft_config(model, {self.key: self.peft_config}):
                    set_peft_model_state_dict(model, self._tensors, adapter_name=self.key)
        except (ValueError, TypeError, RuntimeError) as error:
            self._unload(model)
            self.__dict__["_model"] = None
            self._reset_flags(model, flags)
            if isinstance(error, InputError):
                raise
            names = [n for n, _ in hooks.named_plain_modules(model) if n]
            wanted = self.peft_config.target_modules
            wanted = wanted if isinstance(wanted, str) else next(iter(wanted or [""]))
            endings = [n.rpartition(".")[2] for n in names]
            raise InputError(
                f"peft refused {type(self.peft_config).__name__}: {error} {nearest(wanted, endings)}"
            ) from error
        for _, layer in self._layers():  # peft activates the newest adapter only; here they act together
            layer.set_adapter(sorted(layer._get_available_adapters()))
        stack = AdapterStack.of(model)
        stack.trainable = stack.trainable if stack.trainable is not None else flags
        self._reset_flags(model, flags)
        stack.adapters[self.name] = self
        return self

    def _reset_flags(self, model: nn.Module, flags: dict[str, bool]) -> None:
        """peft freezes the base at injection; whether to freeze is `apply_adapter`'s decision."""
        for key, p in list(model.named_parameters()):  # peft's attention re-registers weights while it is walked
            key = key.replace(".base_layer", "").replace(".original_module", "")
            if key in flags and not self._is_mine(p):
                p.requires_grad_(flags[key])

    def _is_mine(self, p: nn.Parameter) -> bool:
        return self.__dict__["_model"] is not None and any(p is q for _, q in self.named_parameters())

    def _keep_fused(self, model: nn.Module) -> None:
        """peft adds and subtracts the update of an `nn.MultiheadAttention` at each call, which drifts: keep the originals."""
        self._fused = []
        for _, module in hooks.named_plain_modules(model):
            if isinstance(module, nn.MultiheadAttention):
                for owner, key in ((module, "in_proj_weight"), (module.out_proj, "weight")):
                    p = hooks.unwrap(owner)._parameters.get(key)
                    if p is not None:
                        self._fused.append((hooks.unwrap(owner), key, p, p.detach().clone()))

    def _restore_fused(self) -> None:
        for owner, key, p, value in self._fused:
            owner.__dict__.pop(key, None)
            p.data.copy_(value)
            others = {k: v for k, v in owner._parameters.items() if k != key}
            owner._parameters.clear()
            owner._parameters.update({key: p, **others})  # torch registers these weights first; the order of keys stays
        self._fused = []

    def _layers(self) -> list[tuple[str, nn.Module]]:
        """The wrappers that carry this adapter, by the plain path of what they wrap."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        found = []
        for path, module in self.__dict__["_model"].named_modules():
            if isinstance(module, BaseTunerLayer) and self.key in module._get_available_adapters():
                found.append((path.replace(".base_layer", ""), module))
            elif isinstance(module, AuxiliaryTrainingWrapper) and self.key in module._adapters:
                found.append((path, module))
        return found

    @property
    def site_paths(self) -> list[str]:
        if self.__dict__["_model"] is None or self.merged:
            return list(self._paths)
        paths = [p for p, _ in self._layers()]
        return [p for p in paths if p.rpartition(".")[0] not in paths]  # an attention's output projection belongs to it

    _paths: tuple[str, ...] = ()

    def _refuse_silent(self) -> None:
        model = self.model
        fused = {p for p, m in hooks.named_plain_modules(model) if isinstance(m, nn.MultiheadAttention)}
        wrapped = {p for p, _ in self._layers()}
        silent = [p for p in wrapped if (parent := p.rpartition(".")[0]) in fused and parent not in wrapped]
        if silent:
            raise InputError(
                f"LoRA at {silent[:3]} would have no effect: nn.MultiheadAttention reads that weight directly. "
                f"Target the attention itself instead, for example {silent[0].rpartition('.')[0]!r}."
            )

    def _refuse_after_hooks(self) -> None:
        """peft adds its update inside the fused weights, before what an earlier adapter does to the projection's output."""
        for path, layer in self._layers():
            if isinstance(hooks.unwrap(layer).__dict__.get("forward"), hooks.ExplicitAttention):
                raise InputError(
                    f"An adapter already acts inside the fused attention {path!r}, and peft would act before it instead of after: "
                    "detach it and attach the peft adapter first."
                )

    # --- parameters -----------------------------------------------------------------------------------------------------

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:  # type: ignore[override]
        """This adapter's parameters inside the model."""
        if self.__dict__["_model"] is None or self.merged:
            return
        for path, layer in self._layers():
            for key, p in layer.named_parameters():
                if (
                    self.key in key.split(".")
                    and "base_layer" not in key.split(".")
                    and "original_module" not in key.split(".")
                ):
                    yield f"{path}.{key}", p

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(k, p) for k, p in self.named_parameters() if p.requires_grad]

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:  # type: ignore[override]
        """Tensors as peft names them in its files."""
        from peft import get_peft_model_state_dict

        if self.__dict__["_model"] is None or self.merged:
            return {prefix + k: v for k, v in (self._tensors or {}).items()}
        with _peft_config(self.model, {self.key: self.peft_config}):
            state = get_peft_model_state_dict(self.model, adapter_name=self.key)
        return {prefix + k: v for k, v in state.items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned."""
        from peft import set_peft_model_state_dict

        own = self.state_dict()
        wrong = {k for k in state_dict if k not in own or own[k].shape != state_dict[k].shape}
        if strict and (wrong or set(own) - set(state_dict)):
            missing = sorted(set(own) - set(state_dict))
            raise CheckpointError(
                f"peft adapter does not fit: {len(missing)} missing {missing[:4]}, {len(wrong)} unexpected {sorted(wrong)[:4]}."
            )
        with _peft_config(self.model, {self.key: self.peft_config}):
            return set_peft_model_state_dict(self.model, dict(state_dict), adapter_name=self.key)

    @contextlib.contextmanager
    def registered(self) -> Iterator[nn.Module]:
        """peft's parameters already are submodules of the model."""
        yield self.model

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block this adapter is inactive; other adapters keep working."""
        layers = [layer for _, layer in self._layers()] if not self.merged else []
        flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
        self.enabled = False
        try:
            for layer in layers:
                others = sorted(layer._get_available_adapters() - {self.key})
                layer.set_adapter(others) if others else layer.enable_adapters(False)
            yield
        finally:
            self.enabled = True
            for layer in layers:
                layer.enable_adapters(True)
                layer.set_adapter(sorted(layer._get_available_adapters()))
            for p, flag in flags:
                p.requires_grad_(flag)

    def _remove(self, model: nn.Module) -> None:
        self._tensors = {k: v.detach().clone() for k, v in self.state_dict().items()}
        self._paths = tuple(self.site_paths)
        self._unload(model)

    def _unload(self, model: nn.Module) -> None:
        """Put the wrapped modules back; hooks that others placed on a wrapper move to the module inside."""
        self.__dict__["_model"] = model
        for path, layer in self._layers():
            others = sorted(layer._get_available_adapters() - {self.key})
            if others:  # the wrapper stays for them
                layer.delete_adapter(self.key)
                layer.set_adapter(others)
                continue
            inner = hooks.inner_module(layer)
            parent, leaf = _parent_of(model, path, layer)
            hooks.move_hooks(layer, inner)  # type: ignore[arg-type]
            parent._modules[leaf] = inner
        self._restore_fused()

    # --- merging --------------------------------------------------------------------------------------------------------

    def merge_edits(self, model: nn.Module) -> list[Any]:
        edits, refused = [], []
        inside: tuple[str, ...] = ()
        for path, layer in self._layers():
            plain = hooks.unwrap(layer)
            if inside and path.startswith(inside):
                continue  # the output projection of an attention that is merged as a whole
            if "original_module" in layer._modules:
                saved = layer.modules_to_save[self.key]  # type: ignore[index, union-attr]
                edits += [Edit(*_owner_and_leaf(path, key), value) for key, value in saved.state_dict().items()]
            elif isinstance(plain, nn.MultiheadAttention):
                inside += (f"{path}.",)
                edits += [
                    Edit(f"{path}.out_proj" if key == "weight" else path, key, v)
                    for key, v in self._fused_values(layer)
                ]
            else:
                trial = copy.deepcopy(layer).double()
                try:
                    trial.merge(adapter_names=[self.key])  # type: ignore[operator]
                except (ValueError, TypeError, RuntimeError, AttributeError) as error:
                    refused.append(f"{path} ({error})")
                    continue
                edits += [
                    Edit(*_owner_and_leaf(path, key), value) for key, value in hooks.unwrap(trial).named_parameters()
                ]
        if refused:
            raise NotMergeableError(f"peft cannot merge {refused[:3]}.", refused)
        return edits

    def _fused_values(self, layer: nn.Module) -> list[tuple[str, torch.Tensor]]:
        """The merged projections of an `nn.MultiheadAttention`: the kept originals plus what peft's own merge adds."""
        kept = {(id(owner), key): value for owner, key, _, value in self._fused}
        trial = copy.deepcopy(layer).double()
        plain, inner = hooks.unwrap(layer), hooks.unwrap(trial)
        pairs = [
            ("in_proj_weight", plain, inner),
            ("weight", hooks.unwrap(plain.out_proj), hooks.unwrap(inner.out_proj)),  # type: ignore[arg-type]
        ]
        before = [getattr(copied, key).detach().clone() for key, _, copied in pairs]
        trial.merge(adapter_names=[self.key])  # type: ignore[operator]
        return [
            (key, kept[id(own), key].double() + getattr(copied, key).detach() - old)
            for (key, own, copied), old in zip(pairs, before, strict=True)
        ]

    def install(self, model: nn.Module) -> None:
        """Called by `unmerge`: inject again with the same tensors."""
        stack = AdapterStack.of(model)
        stack.adapters.pop(self.name)
        flags = dict(stack.trainable or {})
        self.__dict__["_model"] = None
        try:
            self.attach(model)
        finally:
            stack.trainable = flags or None
        if stack.trainable is not None:
            stack.freeze(model)

    # --- files ----------------------------------------------------------------------------------------------------------

    def save_peft(self, folder: Path, extra: dict[str, Any]) -> Path:
        """Write the folder exactly as peft's `save_pretrained` does; `extra` goes to `mmkit_extra.json` when given."""
        state = {f"base_model.model.{k}": v for k, v in self.state_dict().items()}
        write_safetensors(folder / "adapter_model.safetensors", state)
        config = copy.deepcopy(self.peft_config)
        config.inference_mode = True
        config.save_pretrained(folder)
        saved = read_json(folder / "adapter_config.json")
        write_json(folder / "adapter_config.json", saved)  # the same content, atomically
        if extra:
            write_json(folder / "mmkit_extra.json", extra)
        return folder

    @classmethod
    def load_peft(cls, model: nn.Module, folder: str | os.PathLike[str], name: str) -> PeftAdapter:
        """Load a folder written by peft or `save_adapter`. Raises `CheckpointError`; the model is then unchanged."""
        from peft import PeftConfig

        folder = Path(folder)
        tensors = read_tensors(folder / "adapter_model.safetensors", allow_pickle_format=False)
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{folder}/adapter_config.json cannot be read by peft: {error}") from error
        config.inference_mode = False
        try:
            adapter = cls(config, name=name).attach(model)
        except InputError as error:
            raise CheckpointError(f"The peft adapter in {folder} does not fit this model: {error}") from error
        try:
            adapter.load_state_dict({k.removeprefix("base_model.model."): v for k, v in tensors.items()})
        except (CheckpointError, RuntimeError) as error:
            adapter.detach()
            raise CheckpointError(f"The peft adapter in {folder} does not fit this model: {error}") from error
        return adapter


def _owner_and_leaf(path: str, key: str) -> tuple[str, str]:
    inner, _, leaf = key.rpartition(".")
    return (f"{path}.{inner}" if inner else path), leaf


def _parent_of(model: nn.Module, path: str, layer: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds `layer` directly, and under which name; other wrappers may lie between."""
    for parent in model.modules():
        for leaf, child in parent._modules.items():
            if child is layer:
                return parent, leaf
    raise InputError(f"The wrapper at {path!r} is no longer part of the model.")


@contextlib.contextmanager
def _peft_config(model: nn.Module, configs: dict[str, Any]) -> Iterator[None]:
    """peft keeps the settings of its adapters on the model; mmkit leaves them there only while peft looks at them."""
    model.__dict__.pop("peft_config", None)
    if configs:
        model.__dict__["peft_config"] = configs
    try:
        yield
    finally:
        model.__dict__.pop("peft_config", None)
