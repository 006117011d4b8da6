"""What mmkit keeps on an adapted model: its adapters, the context of each call, and what freezing changed."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.adapters import hooks
from mmkit.adapters.context import Call
from mmkit.errors import InputError

KEY = "_mmkit_adapters"


class ModuleGroup(nn.Module):
    """Several modules that are called on their own, such as the UNet and the text encoder of a pipeline, adapted as one.

    Paths start with the name given here: `ModuleGroup({"unet": pipe.unet, "text_encoder": pipe.text_encoder})`.
    """

    def __init__(self, modules: dict[str, nn.Module]):
        super().__init__()
        if not modules or not all(isinstance(m, nn.Module) for m in modules.values()):
            raise InputError("A ModuleGroup needs at least one named nn.Module.")
        if wrong := [n for n in modules if not isinstance(n, str) or not n.isidentifier()]:
            raise InputError(f"The modules of a ModuleGroup need names such as 'unet', not {wrong[0]!r}.")
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError(f"A ModuleGroup is not called; call its modules {sorted(self._modules)}.")


def roots_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules whose calls are outermost, with the prefix of their paths."""
    if isinstance(model, ModuleGroup):
        return [(f"{name}.", child) for name, child in model.named_children()]
    return [("", model)]


class AdapterStack:
    """The adapters of one outermost module, kept as a plain attribute: it is not part of the state dict."""

    order = math.inf  # the context is opened around all adapters
    enabled = True
    scale = 1.0
    name = ""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.adapters: dict[str, Any] = {}
        self.trainable: dict[str, bool] | None = None
        self.watching = False
        self._buffers = {k: b.detach().clone() for k, b in _own_buffers(root)}
        self._entry = _Entry(self, Call(root))

    @staticmethod
    def of(root: nn.Module) -> AdapterStack:
        """The stack of `root`, made at first use."""
        if KEY not in root.__dict__:
            root.__dict__[KEY] = AdapterStack(root)
        return root.__dict__[KEY]

    def live(self) -> list[str]:
        """Names of the adapters that act through the model's calls, so that its weights alone are not the whole model."""
        return [name for name, adapter in self.adapters.items() if adapter.placed]

    def settle(self) -> None:
        """Open a context in each call as long as an adapter acts through calls; merged ones cost nothing."""
        chain = hooks.chain_of(self.root)
        present = any(link.owner is self for link in chain.links)
        if self.live() and not present:
            chain.rebuild([*chain.links, hooks.Link(self, "", self._entry)])
            for method in _entry_methods(self.root):
                self.root.__dict__[method] = _EntryMethod(self._entry, method)
        elif present and not self.live():
            chain.rebuild([link for link in chain.links if link.owner is not self])
            for method in [k for k, v in self.root.__dict__.items() if isinstance(v, _EntryMethod)]:
                del self.root.__dict__[method]
        chain.drop()

    def freeze(self) -> None:
        """Stop the gradients of everything but adapters, and the running statistics of what is frozen."""
        if self.trainable is None:
            self.trainable = {k: p.requires_grad for k, p in self.root.named_parameters()}
        for p in self.root.parameters():
            p.requires_grad_(False)
        for module in self.root.modules():
            if getattr(module, "running_mean", None) is not None and "train" not in module.__dict__:
                module.__dict__["train"] = StaysInEval(module)

    def forget(self, name: str | None = None) -> None:
        """Drop an adapter; with the last one the model is as it was found."""
        if name is not None:
            self.adapters.pop(name, None)
        self.settle()
        if self.adapters:
            return
        before = self.trainable or {}
        hooks.restore_grads((p, before[k]) for k, p in self.root.named_parameters() if k in before)
        for module in self.root.modules():
            if isinstance(module.__dict__.get("train"), StaysInEval):
                module.__dict__.pop("train").release()
        for key, buffer in _own_buffers(self.root):
            kept = self._buffers.get(key)
            if self.trainable is not None and kept is not None and kept.shape == buffer.shape:
                buffer.copy_(kept)
        self.root.__dict__.pop(KEY, None)


def attached_adapters(model: nn.Module) -> dict[str, Any]:
    """The adapters on `model` (attached or merged) by name, in the order of attachment.

    Adapters that were put on a module inside `model` are listed as "<its path>.<name>".
    """
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        stack = module.__dict__.get(KEY)
        for name, adapter in stack.adapters.items() if stack else ():
            if adapter not in found.values():
                found[f"{path}.{name}" if path and not isinstance(model, ModuleGroup) else name] = adapter
    return dict(sorted(found.items(), key=lambda item: item[1].order))


def _own_buffers(root: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that `state_dict` writes."""
    found = []
    for path, module in root.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.append((f"{path}.{name}", buffer))
    return found


class StaysInEval:
    """Stands in for `train` of a frozen module with running statistics: they stay as they are while the model trains."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.wanted = module.training
        module.training = False

    def __call__(self, mode: bool = True) -> nn.Module:
        self.wanted = mode
        for child in self.module.children():
            child.train(mode)
        return self.module

    def release(self) -> None:
        """The mode the module would have."""
        self.module.training = self.wanted


# --- the outermost call -------------------------------------------------------------------------------------------------


class _Entry(hooks.Action):
    """Opens the context of a call; in the first one, names the sites that were not reached."""

    def __init__(self, stack: AdapterStack, call: Call):
        self.stack, self.call = stack, call

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = self.inside(below, args, kwargs)
        if self.stack.watching:
            self.stack.watching = False
            self._watch(below, args, kwargs)
        return out

    def inside(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`below` with a context; a call that comes from the model's own methods has one already."""
        if self.call.is_open():
            return below(*args, **kwargs)
        before = self.call.open(args, kwargs)
        try:
            return below(*args, **kwargs)
        finally:
            self.call.close(before)

    def _watch(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        root = self.stack.root
        waiting = [a for a in self.stack.adapters.values() if a.placed and a.enabled and a.unreached(root)]
        if waiting and root.training and not torch.compiler.is_compiling():
            with eval_mode(root), torch.no_grad():  # what a training call may skip by chance, an evaluation reaches
                self.inside(below, args, kwargs)
        for adapter in waiting:
            adapter.require_reached(root)


class _EntryMethod:
    """Stands in for a method such as `forward_features` that people call directly: the context is open inside it, too."""

    def __init__(self, entry: _Entry, name: str):
        self.entry, self.name = entry, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        root = self.entry.stack.root
        return self.entry.inside(_Method(root, self.name), args, kwargs)


class _Method:
    def __init__(self, root: nn.Module, name: str):
        self.root, self.name = root, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self.root), self.name)(self.root, *args, **kwargs)


def _entry_methods(root: nn.Module) -> list[str]:
    named = [n for n in dir(type(root)) if n.startswith(("forward_", "encode_", "get_intermediate_"))]
    return [n for n in named if inspect.isfunction(inspect.getattr_static(type(root), n)) and n not in root.__dict__]


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module gets its own mode back."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
