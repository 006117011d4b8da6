"""What an adapter asks about the places of a model: what is trained whole, what a module must look like, where rows lie."""

from __future__ import annotations

from torch import nn

from mmkit.adapters import hooks
from mmkit.adapters.attention import InProjection
from mmkit.errors import InputError, nearest


def saved_paths_of(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Paths of `modules_to_save`: "head" stands for the model's classifiers. None may lie in another."""
    from mmkit.backbones import head_names

    if not names:
        return []
    plain = dict(hooks.named_plain_modules(model))
    paths: list[str] = []
    for name in names:
        if name == "head":
            heads = list(head_names(model)) or ["head"] * ("head" in plain)
            if not heads:
                raise InputError(
                    f"{type(model).__name__} has no classifier that could be found. Build it with num_classes=N, or name the "
                    "module in modules_to_save."
                )
            paths += heads
        elif name not in plain or not name:
            raise InputError(
                f"modules_to_save: the model has no module {name!r}. {nearest(name, [k for k in plain if k])}"
            )
        else:
            paths.append(name)
    paths = list(dict.fromkeys(paths))
    nested = [(a, b) for a in paths for b in paths if a != b and f"{b}.".startswith(f"{a}.")]
    if nested:
        raise InputError(f"modules_to_save: {nested[0][1]!r} lies inside {nested[0][0]!r}; name one of them.")
    return paths


def signature(model: nn.Module, path: str) -> str:
    """What a host must look like for an adapter to fit it: its kind and the shapes of its own tensors."""
    try:
        module = hooks.unwrap(hooks.get_module(model, path))
    except AttributeError:
        return "missing"
    kind = "in_proj" if isinstance(module, InProjection) else type(module).__name__
    own = module.named_parameters() if module._modules else module._parameters.items()
    return f"{kind} {[(k, tuple(p.shape)) for k, p in own if p is not None]}"


def owner_and_leaf(path: str, key: str) -> tuple[str, str]:
    """The module that holds the tensor `key` of the module at `path`, and the tensor's name there."""
    inner, _, leaf = key.rpartition(".")
    return (f"{path}.{inner}" if inner else path), leaf


def ancestors(path: str) -> list[str]:
    """The paths of the modules around `path`, outermost first."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def is_routed(key: str) -> bool:
    """Whether a site sits in an expert that a router may not have chosen."""
    return any(part in ("experts", "expert") for part in key.split("."))


def row_axis(model: nn.Module, path: str) -> int:
    """Which axis of a module's output counts rows of the batch: 1 inside attention that is not batch-first."""
    for above in reversed(["", *ancestors(path), path]):
        batch_first = getattr(hooks.unwrap(hooks.get_module(model, above)), "batch_first", None)
        if batch_first is not None:
            return 0 if batch_first else 1
    return 0
