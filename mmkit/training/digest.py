"""One digest for whatever decides a training run: tensors, files, functions with their code and closures, objects.

Two values have the same digest when they would do the same in a new process: memory addresses, the place of the data on the
disk and the state of random generators do not count.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import inspect
import os
import random
import re
import time
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

WHOLE_FILE = 32 << 20
"""Files up to this many bytes are digested whole; of larger ones (videos, volumes) 32 blocks of 1 MiB, ends included."""
_BLOCK, _BLOCKS = 1 << 20, 32
_RECENT = 2_000_000_000  # nanoseconds: a file changed so lately may change again without another time stamp
PASSING = {"epoch", "root", "skipped", "missing", "broken"}
"""Attributes of data sets that do not count: where the data lie, and what happened while they were read."""
_CALLS = ("__call__", "forward", "__getitem__", "__iter__")
_SIMPLE = (type(None), bool, int, float, complex, str, bytes)


_STREAMS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)  # fit seeds per example


def acts_on(value: Any) -> tuple[str, ...]:
    """The settings of `FitConfig` that a loss or data set acts on itself, by its class's `acts_on`: they count as settings of the run."""
    return tuple(getattr(type(value), "acts_on", ()))


class FileDigests:
    """Content digests of files, remembered by path, size and both time stamps, so that a resume reads no file again.

    50,000 pictures take some seconds the first time (the disk decides) and two afterwards.
    """

    def __init__(self, known: Mapping[str, list[Any]] | None = None) -> None:
        self.known = dict(known or {})
        self.used: dict[str, list[Any]] = {}
        self.seen: dict[str, str] = {}  # by the path as given: one run looks at each file once

    def __call__(self, path: str) -> str:
        """The digest, 32 hexadecimal digits; raises `OSError`."""
        if path not in self.seen:
            self.seen[path] = self._look(os.path.abspath(path))
        return self.seen[path]

    def _look(self, path: str) -> str:
        facts = os.stat(path)
        stamp = [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
        found = self.known.get(path)
        if found is None or found[:3] != stamp:
            found = [*stamp, _file_digest(path, facts.st_size)]
        if time.time_ns() - facts.st_ctime_ns > _RECENT:
            self.used[path] = found
        return found[3]

    def warm(self, paths: Iterable[Any]) -> None:
        """Digest the files among `paths`, several at once; `seen` holds them then."""

        def look(path: str) -> None:
            with contextlib.suppress(OSError, ValueError):  # no file, or none that can be read: training will name it
                self(path)

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(look, map(str, paths), chunksize=64))


def _file_digest(path: str, size: int) -> str:
    with open(path, "rb") as file:
        if size <= WHOLE_FILE:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
        total = hashlib.sha256(str(size).encode())
        for i in range(_BLOCKS):
            file.seek((size - _BLOCK) * i // (_BLOCKS - 1))
            total.update(file.read(_BLOCK))
        return total.hexdigest()[:32]


def is_file(value: Any) -> TypeGuard[str | Path]:
    """Whether a value is the path of an existing file (a bare word such as a class name never is)."""
    if not isinstance(value, (str, Path)) or not (isinstance(value, Path) or os.sep in value or "/" in value):
        return False
    try:
        return os.path.isfile(value)
    except ValueError:  # a null byte
        return False


def short_name(path: str | Path) -> str:
    """The last two parts of a path: they stay when a data set is moved."""
    return "/".join(Path(path).parts[-2:])


def tensors_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """The digest of named tensors, 32 hexadecimal digits."""
    total = hashlib.sha256()
    for name, tensor in named:
        total.update(name.encode())
        _tensor(total.update, tensor)
    return total.hexdigest()[:32]


def code_digest(kind: type, files: FileDigests, skip: Iterable[Any] = ()) -> str:
    """The digest of the code with which objects of `kind` are called, indexed and iterated."""
    walk = _Walk(files, {id(s) for s in skip})
    walk.calls(kind)
    return walk.total.hexdigest()[:32]


def digest(value: Any, files: FileDigests, skip: Iterable[Any] = ()) -> str:
    """The digest of any value, 32 hexadecimal digits.

    Args:
        value: what an object offers as `identity()` counts; else its class, the code of its `__call__`, `forward`,
            `__getitem__` and `__iter__`, and its attributes. Functions count with their code, defaults, closure, and the
            numbers, strings, tensors and functions of their own module that they refer to.
        files: paths of existing files count by content.
        skip: objects that count by their place only, such as the model in training.
    """
    walk = _Walk(files, {id(s) for s in skip})
    walk.feed(value)
    return walk.total.hexdigest()[:32]


def _tensor(write: Callable[[Any], None], tensor: Tensor) -> None:
    tensor = tensor.detach().cpu()
    write(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized or tensor.is_complex():
        write(repr(tensor.tolist()).encode())
    elif tensor.numel():
        write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


class _Walk:
    """Writes a value into one hash, each part with its type."""

    def __init__(self, files: FileDigests, skip: set[int]) -> None:
        self.files, self.skip, self.total = files, skip, hashlib.sha256()
        self.inside: list[int] = []  # ids on the way here: a value that holds itself ends
        self.functions: set[Any] = set()

    def note(self, *parts: Any) -> None:
        self.total.update(repr(parts).encode())

    def feed(self, value: Any) -> None:
        if isinstance(value, _SIMPLE):
            if is_file(value):
                self.note("file", short_name(value), self.files(str(value)))
            else:
                self.note(type(value).__name__, value)
        elif id(value) in self.skip:
            self.note("the trained model")
        elif id(value) in self.inside:
            self.note("itself", len(self.inside) - self.inside.index(id(value)))
        else:
            self.inside.append(id(value))
            self._feed(value)
            self.inside.pop()

    def _feed(self, value: Any) -> None:
        if isinstance(value, Tensor):
            _tensor(self.total.update, value)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self.note("array", value.dtype.str, value.shape)
            self.total.update(value.tobytes())
        elif isinstance(value, Path):
            self.note(
                *(("file", short_name(value), self.files(str(value))) if is_file(value) else ("path", str(value)))
            )
        elif isinstance(value, Image.Image):
            self.note("picture", value.mode, value.size)
            self.total.update(value.tobytes())
        elif isinstance(value, (Sequence, deque, np.ndarray)) and not isinstance(value, range):
            self.note(type(value).__name__, len(value))
            for item in value:
                self.feed(item)
        elif isinstance(value, (set, frozenset)):
            self.note("set", sorted(digest(item, self.files) for item in value))
        elif isinstance(value, Mapping):
            self.note("mapping", len(value))
            for key in sorted(value, key=repr):
                self.feed(key)
                self.feed(value[key])
        elif isinstance(value, functools.partial):
            self.note("partial")
            self.feed([value.func, value.args, value.keywords])
        elif isinstance(value, types.MethodType):
            self.feed([value.__func__, value.__self__])
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
            self.note(getattr(value, "__module__", ""), getattr(value, "__qualname__", value.__name__))
        elif isinstance(value, enum.Enum):
            self.note(type(value).__qualname__, value.name)
        elif isinstance(value, (np.generic, np.dtype, torch.dtype, torch.device, torch.Size, range, slice)):
            self.note(type(value).__name__, str(value))
        else:
            self._object(value)

    def _object(self, value: Any) -> None:
        kind = type(value)
        self.note(kind.__module__, kind.__qualname__)
        if kind in _STREAMS:
            return
        identity = getattr(value, "identity", None)
        if callable(identity):
            self.feed(identity())
            return
        self.calls(kind)
        attributes = dict(vars(value)) if hasattr(value, "__dict__") else {}
        attributes |= {n: getattr(value, n) for n in getattr(kind, "__slots__", ()) if hasattr(value, n)}
        attributes = {k: v for k, v in attributes.items() if k not in acts_on(value)}
        if hasattr(kind, "__getitem__") or hasattr(kind, "__iter__"):
            attributes = {k: v for k, v in attributes.items() if k not in PASSING}
        if isinstance(value, nn.Module):
            attributes = {k: v for k, v in attributes.items() if k not in vars(nn.Module())}
            attributes |= {"state": value.state_dict(), "children": dict(value.named_children())}
        self.feed(attributes)

    def calls(self, kind: type) -> None:
        """The code with which objects of a class answer: that of its own package, with the methods it goes through."""
        package = kind.__module__.partition(".")[0]
        waiting, known = list(_CALLS), set(_CALLS)
        while waiting:
            found = inspect.getattr_static(kind, waiting.pop(), None)
            found = found.__func__ if isinstance(found, staticmethod | classmethod) else found
            if isinstance(found, types.FunctionType) and found.__module__.partition(".")[0] == package:
                self._function(found)
                further = sorted(_names(found.__code__) - known)
                known.update(further)
                waiting += further

    def _function(self, function: types.FunctionType) -> None:
        self.note(function.__module__, function.__qualname__)
        if function.__code__ in self.functions:
            return
        self.functions.add(function.__code__)
        self._code(function.__code__, function.__doc__)
        self.feed([function.__defaults__, function.__kwdefaults__])
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.note(name)
            try:
                self.feed(cell.cell_contents)
            except ValueError:  # not filled yet
                self.note("empty")
        for name in sorted(_names(function.__code__)):
            found = function.__globals__.get(name)
            own = isinstance(found, types.FunctionType) and found.__module__ == function.__module__
            if name in function.__globals__ and (own or isinstance(found, (*_SIMPLE, tuple, Tensor, np.ndarray))):
                self.note(name)
                self.feed(found)

    def _code(self, code: types.CodeType, doc: str | None = None) -> None:
        self.note(code.co_code, code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            elif doc is None or constant != doc:
                self.note(constant)


def _names(code: types.CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def shown(value: Any, limit: int = 120) -> str:
    """A value for a message: a function's name, else its repr without addresses, in one line."""
    if isinstance(value, (types.FunctionType, types.MethodType, type)):
        return value.__qualname__
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(repr(value).split()))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
