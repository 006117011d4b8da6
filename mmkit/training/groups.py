"""Parameter groups: which tensors are trained, at which rate, and which are decayed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from mmkit.errors import InputError

ParameterGroups = Sequence[dict[str, Any]] | Callable[[nn.Module], Iterable[dict[str, Any]]]


def parameter_groups(
    trainee: nn.Module,
    model: nn.Module,
    adapter: Any,
    weight_decay: float,
    given: ParameterGroups | None = None,
    lr: float = 1.0,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Optimiser groups by learning rate and decay, and the parameter names in their order; freezes what is not trained.

    Args:
        trainee: holds model and adapter; its names are those that checkpoints use.
        given: see `fit`; `lr` is the rate that a group's own "lr" is compared with.

    Raises:
        InputError: nothing to train, or groups that overlap, are empty or hold other tensors than model and adapter do.
    """
    if adapter is not None:
        _only_train(trainee, [p for _, p in adapter.trainable_parameters()], "the adapter's parameters")
    parts: list[tuple[dict[str, Any], list[nn.Parameter]]]
    if given is None:
        parts = [({}, [p for p in trainee.parameters() if p.requires_grad])]
        if not parts[0][1]:
            raise InputError(
                "There is nothing to train: no parameter has requires_grad. Unfreeze some, or pass adapter."
            )
    else:
        parts = _parts(given(model) if callable(given) else given, lr)
        members = [p for _, part in parts for p in part]
        if adapter is not None and not all(p.requires_grad for p in members):
            raise InputError("parameter_groups hold parameters the adapter does not train: they would not be saved.")
        _only_train(trainee, members, "parameters in parameter_groups")
    names = {id(p): k for k, p in trainee.named_parameters()}
    skip = {f"model.{k}" for k in getattr(model, "no_weight_decay", set)()}
    own = {id(p) for p in getattr(adapter, "own_parameters", list)()}
    groups: list[dict[str, Any]] = []
    for settings, part in parts:
        split: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for p in part:
            scale, decays = (adapter.lr_scale, adapter.decays) if id(p) in own else (1.0, True)
            plain = "weight_decay" not in settings and not (decays and p.ndim > 1 and names[id(p)] not in skip)
            split.setdefault((settings.get("lr_scale", scale), plain), []).append(p)
        for scale, plain in sorted(split):
            usual = {"weight_decay": 0.0 if plain else weight_decay}
            # `lr_scale` is timm's: its schedulers multiply by it
            groups.append({**usual, **settings, "lr_scale": scale, "params": split[scale, plain]})
    return groups, [names[id(p)] for group in groups for p in group["params"]]


def describe_groups(groups: list[dict[str, Any]], names: Mapping[int, str]) -> list[dict[str, Any]]:
    """What the groups are, for comparing two runs: settings, number of tensors and a digest of their `names` (by `id`)."""
    described = []
    for group in groups:
        own = [names[id(p)] for p in group["params"]]
        settings = {k: v for k, v in group.items() if k != "params"}
        digest = hashlib.sha256("\n".join(own).encode()).hexdigest()[:12]
        described.append({**settings, "tensors": len(own), "names": digest})
    return described


def _only_train(trainee: nn.Module, wanted: list[nn.Parameter], what: str) -> None:
    """Let `wanted` require gradients, and nothing else of `trainee`."""
    ids = {id(p) for p in wanted}
    unseen = ids - {id(p) for p in trainee.parameters()}
    if unseen:
        raise InputError(f"{len(unseen)} of {what} are neither in the model nor in the adapter.")
    for parameter in trainee.parameters():
        parameter.requires_grad_(id(parameter) in ids)


def _parts(given: Iterable[dict[str, Any]], lr: float) -> list[tuple[dict[str, Any], list[nn.Parameter]]]:
    """`(settings, parameters)` of the groups as the caller wrote them."""
    expected = 'parameter_groups must be a list of dicts such as {"params": [...], "lr": 1e-4}'
    if isinstance(given, (dict, str)) or not isinstance(given, Iterable):
        raise InputError(f"{expected}, or a function of the model that returns one, not {type(given).__name__}.")
    parts: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
    seen: set[int] = set()
    for number, group in enumerate(given):
        if not isinstance(group, dict) or "params" not in group:
            raise InputError(f"{expected}; number {number} is {group!r:.80}.")
        settings = {k: v for k, v in group.items() if k != "params"}
        if "lr" in settings:
            settings["lr_scale"] = settings.pop("lr") / lr * settings.get("lr_scale", 1.0)
        held = [group["params"]] if isinstance(group["params"], nn.Parameter) else list(group["params"])
        members = [p[1] if isinstance(p, tuple) else p for p in held]
        wrong = [p for p in members if not isinstance(p, nn.Parameter)]
        if wrong or not members:
            raise InputError(
                f"Group {number} of parameter_groups "
                + (f"holds {type(wrong[0]).__name__}, not parameters." if wrong else "is empty.")
            )
        ids = {id(p) for p in members}
        if len(ids) < len(members) or ids & seen:
            raise InputError(f"Group {number} of parameter_groups repeats a parameter; each may be in one group only.")
        seen |= ids
        parts.append((settings, members))
    if not parts:
        raise InputError("parameter_groups is empty: there is nothing to train.")
    return parts
