"""Doors: packages whose public names are resolved on first use, from the one list that editors and type checkers read; and large
libraries that are imported when they are needed."""

from __future__ import annotations

import ast
import importlib
import sys
import threading
from collections.abc import Callable
from typing import Any


def door(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package that lists its public names as imports under `if TYPE_CHECKING:`.

    Nothing is imported before a name is asked for, so a package can list what is slow to load.

    Example:
        >>> import mmkit.vision.medical
        >>> mmkit.vision.medical.Volume.__module__
        'mmkit.vision.medical.volumes'
    """
    module = sys.modules[package]
    source = module.__spec__.loader.get_source(package)  # type: ignore[union-attr]
    homes: dict[str, tuple[str, str]] = {}
    for block in ast.parse(source).body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for line in block.body:
                assert isinstance(line, ast.ImportFrom), f"{package}: only `from ... import ...` belongs in its list"
                homes |= {alias.asname or alias.name: (line.module or "", alias.name) for alias in line.names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home, attribute = homes[name]
        return getattr(importlib.import_module(home), attribute)

    return get, lambda: sorted({*vars(module), *homes}), sorted(homes)


_importing = threading.RLock()


def library(name: str) -> Any:
    """The library of that name, imported now if need be, by one thread at a time.

    diffusers and transformers put another module in their place when they have been imported. A thread that imports them meanwhile is
    given the one from before, which has no names: "cannot import name".
    """
    with _importing:
        return importlib.import_module(name)
