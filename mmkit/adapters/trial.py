"""Trying instead of guessing: is a fresh adapter the identity, does a folded module equal the adapted one, where are channels?

Every answer comes from running a copy of one module on random input of its kind, in float64 where the module allows it. That
finds weight standardisation, weight and spectral norms, padding modes, adapters whose effect depends on the weights, and whatever
comes next, without knowing their names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.adapters import hooks
from mmkit.adapters.attention import InProjection
from mmkit.adapters.config import Edit
from mmkit.adapters.targets import shortest_endings
from mmkit.errors import InputError, NotMergeableError

_CONV = nn.modules.conv._ConvNd
_CANNOT_RUN = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


# --- writing -------------------------------------------------------------------------------------------------------------


def write(model: nn.Module, edit: Edit) -> tuple[str, str, Tensor | None]:
    """Write one edit; returns what `restore` needs."""
    module = hooks.unwrap(hooks.get_module(model, edit.path))
    current = getattr(module, edit.name, None)
    if current is None:
        _put(module, edit.name, edit.value, like=_nearest_parameter(model, module))
        return edit.path, edit.name, None
    before = current.detach().clone()
    _put(module, edit.name, edit.value)
    return edit.path, edit.name, before


def restore(model: nn.Module, path: str, name: str, value: Tensor | None) -> None:
    """Undo a `write`."""
    module = hooks.unwrap(hooks.get_module(model, path))
    if value is None:
        module._parameters[name] = None
    else:
        getattr(module, name).data.copy_(value)


def _put(module: nn.Module, name: str, value: Tensor, like: Tensor | None = None) -> None:
    current = getattr(module, name, None)
    if current is None:
        value = value.detach() if like is None else value.detach().to(like.device, like.dtype)
        module.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))
    else:
        current.data.copy_(value)


def _nearest_parameter(model: nn.Module, module: nn.Module) -> Tensor | None:
    """A floating-point parameter whose type and device a new one beside it should have."""
    for owner in (module, model):
        for p in owner.parameters():
            if p.is_floating_point():
                return p
    return None


# --- merged equals adapted ------------------------------------------------------------------------------------------------


def require_equal_folds(adapter: Any, model: nn.Module, edits: list[Edit], scale: float) -> None:
    """Raise `NotMergeableError` unless every folded module answers as the adapted one does, later adapters included."""
    refused = {}
    for path, links in _folding(adapter, scale).items():
        host = hooks.get_module(model, path)
        try:
            problem = _fold_problem(host, path, links, edits, scale)
        except _CANNOT_RUN as error:
            problem = f"could not be tried: {str(error).splitlines()[0][:100] if str(error) else type(error).__name__}"
        if problem:
            refused[path] = f"{path} ({type(hooks.unwrap(host)).__name__}: {problem})"
    if refused:
        raise NotMergeableError(
            f"{adapter.method!r} cannot be folded at {len(refused)} modules, where the weights would not do what the adapter does: "
            f"{list(refused.values())[:4]}. Keep the adapter attached, or exclude them.",
            refused,
        )


def _folding(adapter: Any, scale: float) -> dict[str, list[hooks.Link]]:
    """The links a merge takes away and that have to be tried, by module."""
    found: dict[str, list[hooks.Link]] = {}
    for link in adapter.links:
        if link.folds and link.action.needs_trial(scale):
            found.setdefault(link.key.partition("|")[0], []).append(link)
    return found


@torch.no_grad()
def _fold_problem(host: nn.Module, path: str, mine: list[hooks.Link], edits: list[Edit], scale: float) -> str:
    links = hooks.links_at(host)
    last = max(links.index(link) for link in mine)
    later = [link for link in links[last + 1 :] if link.owner.enabled and link.key]
    base = double_copy(host)
    folded = copy.deepcopy(base)
    for inner, name, value in _edits_of(host, path, edits):
        target = hooks.unwrap(hooks.get_module(folded, inner) if inner else folded)
        like = _nearest_parameter(folded, target)
        _put(target, name, value.to(torch.float64 if like is None else like.dtype), like)
    x = _input_like(host, mine[0].shape)
    want = _answer(base, [(link, scale) for link in mine] + [(link, link.owner.scale) for link in later], x)
    got = _answer(folded, [(link, link.owner.scale) for link in later], x)
    return _difference(want, got, _answer(base, [(link, link.owner.scale) for link in later], x))


def _edits_of(host: nn.Module, path: str, edits: list[Edit]) -> list[tuple[str, str, Tensor]]:
    if isinstance(host, InProjection):  # its tensors belong to the attention around it
        parent = path.rpartition(".")[0]
        return [
            ("", e.name.removeprefix("in_proj_"), e.value) for e in edits if e.path == parent and "in_proj" in e.name
        ]
    return [
        (e.path.removeprefix(path).lstrip("."), e.name, e.value) for e in edits if f"{e.path}.".startswith(f"{path}.")
    ]


def _difference(want: Tensor, got: Tensor, base: Tensor) -> str:
    if want.shape != got.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    error, effect = float((want - got).abs().max()), float((want - base).abs().max())
    if not error <= 1e-6 * float(want.abs().max()) + 1e-3 * effect:
        return f"off by {error:.1e} where the adapter changes the output by {effect:.1e}"
    return ""


def double_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode and float64, without what adapters placed in it."""
    if isinstance(module, InProjection):
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        plain.weight = nn.Parameter(module.weight.detach().clone())
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.detach().clone())
        return plain.eval().double()
    return hooks.plain_copy(module).eval().double()


def _answer(host: nn.Module, links: list[tuple[hooks.Link, float]], x: Tensor) -> Tensor:
    """What `host` answers through copies of the actions of `links`, as one float64 tensor."""
    below: Callable[..., Any] = host
    for link, strength in links:
        action = link.action.on(host)
        for inner in action.modules:
            inner.eval().double()
        below = _Bound(action, below, strength)
    out = below(x)
    tensors = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
    return torch.cat([t.double().flatten() for t in tensors]) if len(tensors) != 1 else tensors[0].double()


class _Bound:
    def __init__(self, action: hooks.Action, below: Callable[..., Any], strength: float):
        self.action, self.below, self.strength = action, below, strength
        action.bind(below)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.strength == 1.0:
            return self.action.run(self.below, args, kwargs)
        return self.action.blended(self.below, args, kwargs, self.strength)


def _input_like(host: nn.Module, seen: tuple[int, ...] | None) -> Tensor:
    """A few rows of random input for `host`, on its device. Raises `ValueError` when its kind is not known and it was never called."""
    m: Any = hooks.unwrap(host)
    device = next((p.device for p in m.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    if isinstance(m, nn.Embedding):
        return torch.arange(min(m.num_embeddings, 5), device=device)
    if isinstance(m, nn.Linear):
        shape: tuple[int, ...] = (3, m.in_features)
    elif isinstance(m, _CONV):
        pads = m.padding if isinstance(m.padding, tuple) else (0,) * len(m.kernel_size)
        field = [max(d * (k - 1) + 3, p + 1) for k, d, p in zip(m.kernel_size, m.dilation, pads, strict=True)]
        shape = (2, m.in_channels, *field)
    elif seen is not None:
        shape = (min(seen[0], 2), *seen[1:])
    elif isinstance(m, _BATCH_NORM):
        dims = {nn.BatchNorm1d: 0, nn.BatchNorm3d: 3}
        shape = (2, m.num_features, *(3,) * next((n for c, n in dims.items() if isinstance(m, c)), 2))
    elif isinstance(m, nn.GroupNorm):
        shape = (2, m.num_channels, 3, 3)
    elif isinstance(m, nn.LayerNorm | nn.RMSNorm) and (found := channel_axis(m)):
        shape = (2, found[0], 3, 5) if found[1] == 1 else (2, 3, found[0])
    else:
        raise ValueError("its input is not known")
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device)


# --- a fresh adapter is the identity ----------------------------------------------------------------------------------------


@torch.no_grad()
def require_identity(adapter: Any, model: nn.Module) -> None:
    """Raise `InputError` when a fresh site changes its module's answer; one module of each kind is tried.

    An answer may differ by 1e-5 of its size, or by what the weights' type rounds off.
    """
    kinds: dict[Any, list[str]] = {}
    problems: dict[Any, str] = {}
    for link in adapter.links:
        path = link.key.partition("|")[0]
        host = hooks.get_module(model, path)
        kind = _kind(host, link.action)
        if isinstance(link.action, hooks.SavedAction) or any(t.is_meta for t in _own_weights(host)):
            continue
        if kind not in kinds and (problem := _identity_problem(host, link)):
            problems[kind] = f"{path} ({type(hooks.unwrap(host)).__name__}, {problem})"
        kinds.setdefault(kind, []).append(path)
    if problems:
        wrong = {path for kind in problems for path in kinds[kind]}
        endings = tuple(shortest_endings(wrong, {p for paths in kinds.values() for p in paths} - wrong))
        raise InputError(
            f"A fresh {adapter.method!r} adapter must leave the model as it is, but it changes the answer of "
            f"{list(problems.values())[:4]}. Leave such modules out: exclude={endings!r}."
        )


def _identity_problem(host: nn.Module, link: hooks.Link) -> str:
    try:
        base, x = double_copy(host), _input_like(host, None)
        want = _answer(base, [], x)
    except _CANNOT_RUN:
        return ""  # takes other input than one tensor of its kind
    try:
        got = _answer(base, [(link, 1.0)], x)
    except (
        RuntimeError
    ) as error:  # a convolution that pads in its own way, where the adapter's own has another output size
        return f"cannot act: {str(error).splitlines()[0][:100]}"
    except _CANNOT_RUN:
        return ""  # acts on what a call carries
    tolerance = max([1e-5, *(4 * torch.finfo(t.dtype).eps for t in _own_weights(host) if t.is_floating_point())])
    limit = tolerance * max(1.0, float(want.abs().max()))
    if want.shape != got.shape:
        return f"from shape {tuple(want.shape)} to {tuple(got.shape)}"
    if not float((want - got).abs().max()) <= limit:  # NaN is no identity either
        return f"by {float((want - got).abs().max()):.1e}"
    return ""


def _own_weights(host: nn.Module) -> list[Tensor]:
    found = (getattr(hooks.unwrap(host), name, None) for name in ("weight", "bias"))
    return [t for t in found if isinstance(t, Tensor)]


def _kind(host: nn.Module, action: hooks.Action) -> tuple[Any, ...]:
    m: Any = hooks.unwrap(host)
    facts = tuple(str(getattr(m, k, None)) for k in ("kernel_size", "stride", "groups", "padding_mode"))
    return type(m), type(action), tuple(type(i) for i in action.modules), getattr(m, "bias", None) is None, *facts


# --- where channels are -------------------------------------------------------------------------------------------------------


def channel_axis(module: nn.Module) -> tuple[int, int] | None:
    """Output channels and channel axis of an affine layer, or `None` when the module is not (only) affine.

    The axis counts from the right for layers that also take unbatched input. Norms with a forward of their own (channels first
    or last) are asked: a change of one weight moves one channel.
    """
    m: Any = module
    if isinstance(m, nn.Linear):
        return m.out_features, -1
    if isinstance(m, _CONV):
        return m.out_channels, -(len(m.kernel_size) + 1)
    if not isinstance(getattr(m, "act", None) or nn.Identity(), nn.Identity):
        return None  # timm's fused norm + activation: what comes out is no longer affine
    if isinstance(m, _BATCH_NORM):
        return m.num_features, 1
    if isinstance(m, nn.GroupNorm):
        return m.num_channels, 1
    if isinstance(m, nn.LayerNorm | nn.RMSNorm):
        if len(m.normalized_shape) != 1:
            return None  # a weight per position: there is no channel to scale
        plain = type(m).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
        axis = -1 if plain else _asked_axis(m, m.normalized_shape[0])
        return None if axis is None else (m.normalized_shape[0], axis)
    return None


@torch.no_grad()
def _asked_axis(module: nn.Module, channels: int) -> int | None:
    height, columns = [size for size in (3, 5, 7) if size != channels][:2]
    for axis, shape in ((1, (2, channels, height, columns)), (-1, (2, height, columns, channels))):
        probe = hooks.plain_copy(module).eval()
        if any(p.is_meta for p in probe.parameters()):
            probe = probe.to_empty(device="cpu")
        probe = probe.float()
        for p in probe.parameters():
            nn.init.normal_(p)
        device = next((p.device for p in probe.parameters()), torch.device("cpu"))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
        try:
            before = probe(x)
            if getattr(probe, "weight", None) is None:
                return axis
            probe.weight.data[0] += 1.0  # type: ignore[index, union-attr]
            moved = (probe(x) - before).abs()
        except _CANNOT_RUN:
            continue
        if moved.shape == shape and moved.select(axis, 0).max() > 0 and moved.narrow(axis, 1, channels - 1).max() == 0:
            return axis
    return None
