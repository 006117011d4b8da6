"""How an adapter reaches into a model without changing its keys, types or tensors: links around the forward of modules.

Every module an adapter acts at gets a `Chain` in front of its own forward. The chain holds one `Link` per action, in the order in
which the adapters were attached; a link is given the call of everything below it and returns what the module answers. That is
the only primitive: changing an output, changing the arguments, or computing something else altogether are three uses of it
(`Action`). `remove(model, owner)` takes the links of one adapter out again, also in a deep copy or after unpickling.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.adapters.context import current_context, gate_values
from mmkit.errors import InputError

Below = Callable[..., Any]


class Action:
    """What an adapter does at one module. Subclasses implement `run`; plain classes, so that models can be copied and pickled.

    `modules` lists the `nn.Module`s whose train or eval mode follows the module's.
    """

    modules: tuple[nn.Module, ...] = ()

    def run(self, below: Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's answer; `below(*args, **kwargs)` is what it would be without this action."""
        raise NotImplementedError

    def blended(self, below: Below, args: tuple[Any, ...], kwargs: dict[str, Any], strength: Strength) -> Any:
        """Between the answer without (strength 0) and with this action (1), or beyond."""
        return blend(below(*args, **kwargs), self.run(below, args, kwargs), strength)

    def on(self, host: nn.Module) -> Action:
        """The same action with copied parameters, for `host`, a copy of its module; used to try a merge."""
        return copy.deepcopy(self)

    def needs_trial(self, scale: float) -> bool:
        """Whether a merge at strength `scale` has to be tried: not where the module computes with the very tensors it writes."""
        return True

    def bind(self, below: Below) -> None:
        """Told once what lies below, for actions whose modules call it themselves."""


class SiteAction(Action):
    """Calls `site(output, args)` with what the module computed."""

    def __init__(self, site: nn.Module):
        self.site = site
        self.modules = (site,)

    def run(self, below: Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.site(below(*args, **kwargs), args)

    def blended(self, below: Below, args: tuple[Any, ...], kwargs: dict[str, Any], strength: Strength) -> Any:
        y = below(*args, **kwargs)  # computed once, unlike in general
        return blend(y, self.site(y, args), strength)


class SavedAction(Action):
    """A trained copy of the module answers in its place; the module itself is not computed."""

    def __init__(self, site: nn.Module):
        self.site = site
        self.modules = (site,)

    def needs_trial(self, scale: float) -> bool:
        return scale != 1.0

    def run(self, below: Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()), None)
        dtype = next((p.dtype for p in self.site.parameters() if p.is_floating_point()), None)
        if given is None or dtype in (None, given.dtype) or torch.is_autocast_enabled(given.device.type):
            return self.site(*args, **kwargs)
        args, kwargs = _cast((args, kwargs), dtype)  # a half-precision model with a float32 head
        return _cast(self.site(*args, **kwargs), given.dtype)


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """The floating-point tensors in tuples, lists and dicts in another type."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return type(value)({k: _cast(v, dtype) for k, v in value.items()})
    return type(value)([_cast(v, dtype) for v in value]) if type(value) in (tuple, list) else value


Strength = Any  # a float, or `RowGate`


class RowGate:
    """A strength per row of the batch: `scale * gate`, shaped for an output when it is known."""

    def __init__(self, gate: Tensor, scale: float, rows: int | None, axis: int):
        self.gate, self.scale, self.rows, self.axis = gate, scale, rows, axis

    def for_output(self, y: Tensor) -> Any:
        """What multiplies a change of `y`."""
        return gate_values(self.gate, y, self.rows, self.axis) * self.scale


def blend(without: Any, within: Any, strength: Strength) -> Any:
    """`without + strength * (within - without)` for tensors and the tuples, lists and dicts that hold them."""
    if isinstance(without, Tensor) and isinstance(within, Tensor):
        factor = strength.for_output(without) if isinstance(strength, RowGate) else strength
        return without + factor * (within - without)
    if isinstance(without, tuple | list) and isinstance(within, tuple | list):
        return type(without)([blend(a, b, strength) for a, b in zip(without, within, strict=True)])
    if isinstance(without, dict) and isinstance(within, dict):
        return type(without)({k: blend(v, within[k], strength) for k, v in without.items()})
    return within


class Link:
    """One action in a chain.

    Attributes:
        owner: the adapter: its `order` sorts the chain, `acting` and `scale` decide what happens.
        key: name of the site, "<module path>" or "<module path>|<slot>".
        folds: whether a merge replaces the link (a link that stays after a merge does not).
        reached: whether the module has been called since the adapter was attached.
        shape: shape of the first tensor it was called with.
    """

    def __init__(self, owner: Any, key: str, action: Action, *, folds: bool = True, axis: int = 0):
        self.owner, self.key, self.action, self.folds, self.axis = owner, key, action, folds, axis
        self.reached = False
        self.shape: tuple[int, ...] | None = None
        self.below: Below = _nothing

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner = self.owner
        if not owner.enabled:
            return self.below(*args, **kwargs)
        if not self.reached:
            self.reached = True
            self.shape = next((tuple(a.shape) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        strength = self._strength()
        if isinstance(strength, float) and strength == 0.0:
            return self.below(*args, **kwargs)
        for inner in self.action.modules:
            if inner.training != module.training:
                inner.train(module.training)
        if isinstance(strength, float) and strength == 1.0:
            return self.action.run(self.below, args, kwargs)
        return self.action.blended(self.below, args, kwargs, strength)

    def _strength(self) -> Strength:
        scale = self.owner.scale
        context = current_context()
        gate = context.gates.get(self.owner.name) if context is not None and context.gates else None
        if gate is None:
            return scale
        if isinstance(gate, Tensor) and gate.dim():
            return RowGate(gate, scale, context.rows, self.axis)  # type: ignore[union-attr]
        return scale * float(gate) if not isinstance(gate, Tensor) else scale * gate


def _nothing(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("this link is not part of a chain")


class Under:
    """What lies below a link at the time of the call; adapters that come and go change it."""

    def __init__(self, link: Link):
        self.link = link

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.link.below(*args, **kwargs)


class _Base:
    """The module's own forward, or what another library had put in its place."""

    def __init__(self, module: nn.Module, found: Any):
        self.module, self.found = module, found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.found is not None:
            return self.found(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


class _Step:
    """Calls a link as a function of the module's arguments."""

    def __init__(self, module: nn.Module, link: Link):
        self.module, self.link = module, link

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.link(self.module, args, kwargs)


class Chain:
    """Stands in for `module.forward`: the links of all adapters, the first attached innermost.

    Attributes:
        base: what lies below all links: the module's own forward, or one that `needed_by` owners have put there.
        needed_by: owners that need another base than the module's own (see `mmkit.adapters.attention`).
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.found = module.__dict__.get("forward")
        self.base: Below = _Base(module, self.found)
        self.needed_by: list[Any] = []
        self.links: list[Link] = []
        self.top: Below = self.base

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.top(*args, **kwargs)

    def rebuild(self, links: list[Link]) -> None:
        """Take `links` as the chain, sorted by the order of attachment (links of one owner keep theirs)."""
        self.links = sorted(links, key=lambda link: link.owner.order)
        self.top = self.base
        for link in self.links:
            link.below = self.top
            self.top = _Step(self.module, link)

    def drop(self) -> None:
        """Leave the module when nobody needs the chain any more."""
        if not self.links and not self.needed_by and self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]
            if self.found is not None:
                self.module.__dict__["forward"] = self.found


def chain_of(module: nn.Module) -> Chain:
    """The chain in front of `module`, made at first use."""
    chain = module.__dict__.get("forward")
    if not isinstance(chain, Chain):
        chain = Chain(module)
        module.__dict__["forward"] = chain
    return chain


def add_link(module: nn.Module, link: Link) -> None:
    """Put `link` into the chain of `module`."""
    chain = chain_of(module)
    chain.rebuild([*chain.links, link])


def links_at(module: nn.Module) -> list[Link]:
    """The links of all adapters at `module`, innermost first."""
    chain = module.__dict__.get("forward")
    return list(chain.links) if isinstance(chain, Chain) else []


class _NoFastPath:
    """A pre-hook that does nothing: in eval mode torch's transformer layers read their weights directly unless one is there.

    An encoder would also pack padded batches into nested tensors, which only that fast path understands: `nested` keeps its
    setting until the last hook goes.
    """

    def __init__(self, owner: Any, nested: bool | None):
        self.owner, self.nested = owner, nested

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        return None


def call_all_modules(model: nn.Module, owner: Any) -> None:
    """Make torch's transformer layers call the modules inside them, for as long as `owner` is there."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            present = [h.nested for h in module._forward_pre_hooks.values() if isinstance(h, _NoFastPath)]
            nested = present[0] if present else getattr(module, "use_nested_tensor", None)
            module.register_forward_pre_hook(_NoFastPath(owner, nested))
            if nested is not None:
                module.use_nested_tensor = False


def _leave_fast_path(module: nn.Module, owner: Any) -> None:
    found = {k: h for k, h in module._forward_pre_hooks.items() if isinstance(h, _NoFastPath)}
    mine = [k for k, h in found.items() if h.owner is owner]
    for key in mine:
        hook = module._forward_pre_hooks.pop(key)
        if len(mine) == len(found) and hook.nested is not None:  # type: ignore[attr-defined]
            module.use_nested_tensor = hook.nested  # type: ignore[attr-defined, assignment]


class _NoLoading:
    """Refuses `load_state_dict` into weights that hold a merged adapter: a later unmerge would undo a part of it."""

    def __init__(self, owner: Any):
        self.owner = owner

    def __call__(self, *args: Any) -> None:
        raise InputError(
            f"Adapter {self.owner.name!r} is merged into these weights: call its unmerge() or detach() before loading others."
        )


def refuse_loading(model: nn.Module, owner: Any, paths: Iterable[str]) -> None:
    """Refuse `load_state_dict` of the modules at `paths` and of all around them, for as long as `owner` is there."""
    parts = [p.split(".") if p else [] for p in paths]
    for path in {".".join(p[:n]) for p in parts for n in range(len(p) + 1)}:
        get_module(model, path)._register_load_state_dict_pre_hook(_NoLoading(owner))


def _loading_refusals(module: nn.Module) -> dict[int, Any]:
    hooks: dict[int, Any] = module._load_state_dict_pre_hooks
    return {k: h for k, h in hooks.items() if isinstance(getattr(h, "hook", h), _NoLoading)}


def remove(model: nn.Module, owner: Any) -> None:
    """Take everything `owner` placed in `model` out again."""
    for module in list(model.modules()):
        _leave_fast_path(module, owner)
        for key, hook in _loading_refusals(module).items():
            if getattr(hook, "hook", hook).owner is owner:
                del module._load_state_dict_pre_hooks[key]
        chain = module.__dict__.get("forward")
        if not isinstance(chain, Chain):
            continue
        if any(link.owner is owner for link in chain.links):
            chain.rebuild([link for link in chain.links if link.owner is not owner])
        if any(o is owner for o in chain.needed_by):
            chain.needed_by = [o for o in chain.needed_by if o is not owner]
            if not chain.needed_by:
                chain.base.release()  # type: ignore[attr-defined]
                chain.base = _Base(module, chain.found)
                chain.rebuild(chain.links)
        chain.drop()


def restore_grads(flags: Iterable[tuple[Tensor, bool]]) -> None:
    """Set `requires_grad` of each tensor; torch lets those made in inference mode change theirs only inside it."""
    for tensor, flag in flags:
        if tensor.requires_grad != flag:
            with torch.inference_mode(tensor.is_inference()):
                tensor.requires_grad_(flag)


def trained_copy(module: nn.Module) -> nn.Module:
    """A plain copy to be trained: half-precision weights swallow small steps, and gradient scalers refuse them, so it is float32."""
    copied = plain_copy(module).requires_grad_(True)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in copied.parameters())
    return copied.float() if half else copied


def plain_copy(module: nn.Module) -> nn.Module:
    """A deep copy without anything that adapters placed in it."""
    memo: dict[int, Any] = {}
    for m in module.modules():
        own = (m.__dict__.get("forward"), m.__dict__.get("_mmkit_adapters"), m._modules.get("in_proj"))
        for placed in (*own, *m._forward_pre_hooks.values()):
            if isinstance(placed, Chain | _NoFastPath) or type(placed).__name__ in ("AdapterStack", "InProjection"):
                memo[id(placed)] = None
        memo |= {id(hook): None for hook in _loading_refusals(m).values()}
    copied = copy.deepcopy(module, memo)
    for m in copied.modules():
        for name in [k for k in ("forward", "_mmkit_adapters") if k in m.__dict__ and m.__dict__[k] is None]:
            del m.__dict__[name]
        if "in_proj" in m._modules and m._modules["in_proj"] is None:
            del m._modules["in_proj"]
        for key in [k for k, hook in m._forward_pre_hooks.items() if hook is None]:
            del m._forward_pre_hooks[key]
        for key in [k for k, hook in m._load_state_dict_pre_hooks.items() if hook is None]:
            del m._load_state_dict_pre_hooks[key]
    return copied


def forget_compiled() -> None:
    """Let torch compile again: a graph made before an adapter came, went or was folded must never answer for it."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


# --- finding modules by path, also through peft's wrappers ------------------------------------------------------------


def inner_module(module: nn.Module) -> nn.Module | None:
    """What a peft wrapper wraps, or `None` when `module` is not one."""
    inner = module._modules.get("base_layer")
    return module._modules.get("original_module") if inner is None else inner


def unwrap(module: nn.Module) -> nn.Module:
    """The library's own module inside peft wrappers."""
    while (inner := inner_module(module)) is not None:
        module = inner
    return module


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The outermost module at `path`, where `path` is written as in the plain model. Raises `AttributeError`."""
    module = model
    for part in path.split(".") if path else []:
        while part not in module._modules and (inner := inner_module(module)) is not None:
            module = inner
        child = module._modules.get(part)
        if child is None:
            raise AttributeError(f"{type(model).__name__} has no module {path!r}")
        module = child
    return module


def named_plain_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """`model.named_modules()` as the plain model would list it: others' peft wrappers are passed through, adapters left out.

    A module under two names is listed once, under its first.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        plain = unwrap(module)
        if id(plain) in seen:
            continue
        seen.add(id(plain))
        found.append((path, plain))
        prefix = f"{path}." if path else ""
        children = [(prefix + k, c) for k, c in plain._modules.items() if c is not None and k[:14] != "mmkit_adapter_"]
        pending += reversed(children)
    return found
