"""What decides the result of a run: its data, settings, functions and start. Only the same run may be continued.

A data set counts with every example: files by name and content, pictures and tensors in memory by their bytes, labels, order,
class names, transforms, the code that makes an example, and its other public attributes. A class of your own may say what counts
by a method `identity()`. A map-style data set that hides something (private attributes, or no public ones) counts also by
16 examples from its beginning, end and between, fetched with fixed seeds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from mmkit.errors import MMKitError
from mmkit.storage import read_json, write_json
from mmkit.training.digest import (
    PASSING,
    FileDigests,
    acts_on,
    code_digest,
    digest,
    is_file,
    short_name,
    shown,
    tensors_digest,
)
from mmkit.training.randomness import kept_rng, seed_everything

DETAILS = "data.json"
_LISTS = ("samples", "examples", "imgs")
_LABELS = ("labels", "targets")
_PICTURES = ("images", "data", "arrays")
_CLASSES = ("class_names", "classes")
_FETCHED = 16
_CONSEQUENCES = ("trained tensors", "parameter groups", "model")  # told only when nothing tells why

Row = list[str]  # name, digest of the content, label


# ---------------------------------------------------------------------------------------------------------- the facts


def run_identity(
    train: Any,
    val: Any,
    functions: Mapping[str, Any],
    settings: Mapping[str, Any],
    given: Mapping[str, Any] | None,
    trainee: nn.Module,
    adapter: Any,
    files: FileDigests,
) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """`(facts, rows)`: JSON-friendly facts that all must be equal, and the examples one by one for messages.

    Args:
        train, val: the data sets; `val` may be None.
        functions: loss, metrics and collate function by `fit`'s name for them, None for the default ones.
        settings: plain values by name.
        given: further facts of the caller, by the name the user knows them.
        trainee: holds model and adapter; its frozen tensors count.
        adapter: its configuration counts.
        files: content digests.
    """
    skip = list(trainee.modules())
    facts: dict[str, Any] = {k: _fact(v, files, skip) for k, v in (given or {}).items()}
    rows: dict[str, list[Row]] = {}
    for name, data in (("train", train), ("val", val)):
        if data is None:
            facts[name] = None
        else:
            facts[name], rows[name] = _data(data, files, skip)
    facts |= {name: None if f is None else _fact(f, files, skip) for name, f in functions.items()}
    config = getattr(adapter, "config", None)
    facts["adapter"] = None if adapter is None else _fact(config if config is not None else type(adapter), files, skip)
    facts["frozen weights"] = _frozen(trainee)
    modules = [
        [type(m).__module__, type(m).__qualname__, m.extra_repr()] for m in trainee.modules() if m is not trainee
    ]
    facts["model"] = digest(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(modules)), files)
    return facts | dict(settings), rows


def _fact(value: Any, files: FileDigests, skip: Sequence[Any]) -> Any:
    """Plain values as they are; others as their digest and what to show of them."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"shown": shown(value), "digest": digest(value, files, skip)}


def _frozen(trainee: nn.Module) -> str:
    """The digest of what training cannot change: frozen parameters, and the buffers of frozen modules."""
    tensors: dict[str, Tensor] = {k: p for k, p in trainee.named_parameters() if not p.requires_grad}
    for path, module in trainee.named_modules():
        own = list(module.parameters(recurse=False))
        if own and not any(p.requires_grad for p in own):
            kept = module.state_dict().keys()
            tensors |= {f"{path}.{k}": b for k, b in module.named_buffers(recurse=False) if k in kept}
    return tensors_digest(sorted(tensors.items()))


def _data(data: Any, files: FileDigests, skip: Sequence[Any]) -> tuple[dict[str, Any], list[Row]]:
    if callable(getattr(data, "identity", None)) or isinstance(data, Mapping):
        return {"identity": _fact(data, files, skip)}, []
    if isinstance(data, (list, tuple)):
        rows = [_example(f"example {i}", item, files, skip) for i, item in enumerate(data)]
        return {"examples": len(rows), "content": _content(rows)}, rows
    if hasattr(data, "dataset") and hasattr(data, "indices"):  # torch's Subset
        whole, rows = _data(data.dataset, files, skip)
        rows = [rows[i] for i in data.indices] if rows else []
        chosen = _content(rows or [[whole.get("content", "")], [str(i) for i in data.indices]])
        return whole | {"examples": len(data.indices), "content": chosen}, rows
    attributes = {k: v for k, v in getattr(data, "__dict__", {}).items() if not k.startswith("_") and k not in PASSING}
    names = next((attributes[k] for k in _CLASSES if k in attributes), None)
    rows, covered = _rows(data, attributes, names, files, skip)
    facts: dict[str, Any] = {}
    if rows:
        facts = {"examples": len(rows), "content": _content(rows)}
    elif hasattr(data, "__len__"):
        facts["examples"] = len(data)
        if not attributes or any(k.startswith("_") for k in vars(data)):
            facts["content"] = digest(_fetched(data), files, skip)
    if isinstance(names, (list, tuple)):
        facts["class names"] = [str(n) for n in names]
    rest = {k: v for k, v in attributes.items() if k not in covered and k not in _CLASSES and k not in acts_on(data)}
    facts |= {k: _fact(v, files, [*skip, data]) for k, v in rest.items()}
    return facts | {"code": code_digest(type(data), files, [*skip, data])}, rows


def _rows(
    data: Any, attributes: Mapping[str, Any], names: Any, files: FileDigests, skip: Sequence[Any]
) -> tuple[list[Row], set[str]]:
    """The examples of a data set one by one, as far as it shows them, and the attributes they came from."""
    length = len(data) if hasattr(data, "__len__") else -1

    def column(*choices: str) -> str | None:
        return next(
            (k for k in choices if isinstance(attributes.get(k), _COLUMN) and len(attributes[k]) == length), None
        )

    whole, paths, labels, pictures = column(*_LISTS), column("paths", "files"), column(*_LABELS), column(*_PICTURES)
    label_names = names if isinstance(names, (list, tuple)) else ()
    if whole is not None:
        items = attributes[whole]
        files.warm(p for item in items for p in _parts(item) if is_file(p))
        rows = [_example(f"example {i}", item, files, skip, label_names) for i, item in enumerate(items)]
        return rows, {whole, *(k for k in (*_LISTS, *_LABELS) if k in attributes)}
    if labels is None or (paths is None and pictures is None):
        return [], set()
    if paths is not None:
        files.warm(attributes[paths])
    rows = []
    for i in range(length):
        path = attributes[paths][i] if paths is not None else f"example {i}"
        content = files.seen.get(str(path)) if pictures is None else None
        if content is None:
            content = digest(attributes[pictures][i] if pictures is not None else path, files, skip)
        rows.append([short_name(path), content, _label(attributes[labels][i], label_names)])
    return rows, {k for k in (paths, labels, pictures) if k is not None}


def _content(rows: list[Row]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


_COLUMN = (Sequence, np.ndarray, Tensor)


def _parts(item: Any) -> list[Any]:
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return [getattr(item, f.name) for f in dataclasses.fields(item)]
    return list(item) if isinstance(item, (list, tuple)) else [item]


def _example(name: str, item: Any, files: FileDigests, skip: Sequence[Any], label_names: Sequence[Any] = ()) -> Row:
    """One example: `(content, label)`, or an object with `label`, or anything whole."""
    parts = _parts(item)
    path = next((p for p in parts if is_file(p)), None)
    label: Any = getattr(item, "label", None)
    if label is None and isinstance(item, (list, tuple)) and len(item) == 2 and _is_label(item[1]):
        parts, label = parts[:1], item[1]
    shown_label = "" if label is None else _label(label, label_names)
    return [short_name(path) if path is not None else name, digest(parts, files, skip), shown_label]


def _is_label(value: Any) -> bool:
    return isinstance(value, (int, np.integer, str)) or (isinstance(value, Tensor) and value.ndim == 0)


def _label(value: Any, names: Sequence[Any]) -> str:
    value = value.item() if isinstance(value, (Tensor, np.generic)) and value.ndim == 0 else value
    known = isinstance(value, int) and 0 <= value < len(names)
    return str(names[value]) if known else str(value)


def _fetched(data: Any) -> list[Any]:
    """Examples from the beginning, the end and between, with the random generators seeded alike."""
    count = len(data)
    found: list[Any] = []
    with kept_rng():
        for i in sorted({round(k * (count - 1) / (_FETCHED - 1)) for k in range(_FETCHED)}):
            seed_everything(i)
            try:
                found.append(data[i])
            except Exception as error:  # training will name it
                found.append(type(error).__name__)
    return found


# ------------------------------------------------------------------------------------------------- details in the folder


def read_details(folder: Path) -> tuple[dict[str, list[Row]], FileDigests]:
    """The examples of the run in `folder`, and the digests of files known there; empty when there are none."""
    with contextlib.suppress(MMKitError):
        details = read_json(folder / DETAILS)
        with contextlib.suppress(TypeError, KeyError, AttributeError, ValueError):
            files = {str(k): [int(v[0]), int(v[1]), int(v[2]), str(v[3])] for k, v in details["files"].items()}
            rows = {str(k): [[str(c) for c in row] for row in v] for k, v in details["rows"].items()}
            return rows, FileDigests(files)
    return {}, FileDigests()


def write_details(folder: Path, rows: Mapping[str, list[Row]], files: FileDigests) -> None:
    """Keep what `read_details` gives back."""
    write_json(folder / DETAILS, {"rows": rows, "files": files.used}, indent=None)


# --------------------------------------------------------------------------------------------------------- differences


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], old_rows: Mapping[str, Any], new_rows: Mapping[str, Any]
) -> dict[str, str]:
    """What differs, by the name of the setting or argument, each as a phrase; empty when the runs are the same."""
    changes = {}
    for key in [*new, *(k for k in old if k not in new)]:
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        if key in ("train", "val") and isinstance(before, Mapping) and isinstance(now, Mapping):
            changes[key] = _data_change(before, now, old_rows.get(key, []), new_rows.get(key, []))
        else:
            changes[key] = _change(before, now)
    causes = {k: v for k, v in changes.items() if k not in _CONSEQUENCES}
    return causes or changes


def _change(before: Any, now: Any) -> str:
    """`3 is now 4`."""
    if isinstance(before, str) and isinstance(now, str) and len(before) == len(now) == 32:
        return "they are others now"  # two digests
    first, second = (v["shown"] if isinstance(v, Mapping) and "shown" in v else shown(v) for v in (before, now))
    if first == second:
        return f"the code or settings of {first} changed"
    return f"{first} is now {second}"


def _data_change(old: Mapping[str, Any], new: Mapping[str, Any], old_rows: list[Row], new_rows: list[Row]) -> str:
    before, after = old.get("class names"), new.get("class names")
    if before and after and before != after:
        return _class_change(before, after)
    told = _row_change(old_rows, new_rows) if old.get("content") != new.get("content") else []
    if not told and old.get("examples") != new.get("examples"):
        told.append(f"{old.get('examples')} examples are now {new.get('examples')}")
    if not told and old.get("content") != new.get("content"):
        told.append("the examples are others")
    for key in [*new, *(k for k in old if k not in new)]:
        if key not in ("content", "examples", "class names") and old.get(key) != new.get(key):
            told.append("its code changed" if key == "code" else f"{key}: {_change(old.get(key), new.get(key))}")
    return "; ".join(told)


def _class_change(old: list[str], new: list[str]) -> str:
    gone, added = ([n for n in a if n not in b] for a, b in ((old, new), (new, old)))
    if not gone and not added:
        return f"the classes are in another order, now {_some(map(repr, new))}"
    if len(gone) == len(added):
        return _some([f"class {a!r} is now {b!r}" for a, b in zip(gone, added, strict=True)])
    told = [f"{n!r} is new" for n in added] + [f"{n!r} is gone" for n in gone]
    return f"{len(old)} classes are now {len(new)}: {_some(told)}"


def _row_change(old: list[Row], new: list[Row]) -> list[str]:
    if not old or not new:
        return []
    before, now = {r[0]: r for r in old}, {r[0]: r for r in new}
    told = [f"{len(old)} examples are now {len(new)}"] if len(old) != len(new) else []
    labels = [n for n in now if n in before and before[n][2] != now[n][2]]
    if labels:
        told.append(_some([f"{n} was {before[n][2]!r} and is now {now[n][2]!r}" for n in labels]))
    lists = {
        "new": [n for n in now if n not in before],
        "gone": [n for n in before if n not in now],
        "of another content": [n for n in now if n in before and before[n][1] != now[n][1]],
    }
    told += [f"{what}: {_some(names)}" for what, names in lists.items() if names]
    return told or ["the order of the examples is another"]


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
