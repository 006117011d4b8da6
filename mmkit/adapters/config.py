"""The settings every adapter shares, and the record of a merge."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor

from mmkit.errors import InputError


@dataclass(frozen=True)
class AdapterConfig:
    """What is needed to rebuild an adapter on another copy of the model. Frozen; converts to and from JSON.

    Attributes:
        targets: which modules to adapt: names, name endings ("qkv") or wildcards ("blocks.[0-5].*"); `None` lets the method choose.
        exclude: modules to leave out of these, in the same grammar.
        modules_to_save: modules trained whole and stored beside the adapter, usually the head; "head" stands for the model's
            classifiers. Nothing inside them is adapted.
    """

    method: ClassVar[str] = ""
    targets: tuple[str, ...] | str | None = None
    exclude: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("modules_to_save", "exclude"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        for name in ("targets", "modules_to_save", "exclude"):
            given = getattr(self, name)
            kinds = str | tuple | list | None if name == "targets" else tuple | list
            if not isinstance(given, kinds) or any(not isinstance(n, str) for n in given or ()):
                raise InputError(f"{name} takes names of modules, not {given!r}.")

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
    """One tensor a merge writes: `value` becomes parameter or buffer `name` of the module at `path`."""

    path: str
    name: str
    value: Tensor
