"""Settings of a run as TOML: written beside its result, read back by the command line."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from typing import Any

from mmkit.errors import InputError

MAX_BYTES = 1_000_000
"""A larger file holds no settings; a device that never ends would fill the memory."""


def settings_text(settings: Mapping[str, Any], heading: str = "") -> str:
    """TOML of plain values, lists and one level of tables, which come last; `None` is left out.

    Example:
        >>> print(settings_text({"lr": 0.001, "settings": {"r": 8}, "backbone": "tiny_vit", "val": None}), end="")
        lr = 0.001
        backbone = "tiny_vit"
        <BLANKLINE>
        [settings]
        r = 8
    """
    lines = [f"# {heading}"] if heading else []
    lines += [f"{_key(k)} = {_value(v)}" for k, v in settings.items() if v is not None and not isinstance(v, Mapping)]
    for name, table in settings.items():
        if isinstance(table, Mapping) and table:
            lines += ["", f"[{_key(name)}]"]
            lines += [f"{_key(k)} = {_value(v)}" for k, v in table.items() if v is not None]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _text(name)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
    return _text(str(value))


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a TOML file, with or without the mark that Windows puts first.

    Raises `InputError` when it is missing, not TOML or above `MAX_BYTES`.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > MAX_BYTES:
        raise InputError(f"{path} is above {MAX_BYTES / 1e6:g} MB, which no settings are. Give a run.toml.")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise InputError(f"{path} is no TOML of settings: it is nested too deeply.") from error
    except ValueError as error:  # not TOML, not UTF-8, or a number of thousands of digits
        raise InputError(
            f"{path} is no TOML: {error}. Settings are lines of NAME = VALUE, as in the run.toml of every result."
        ) from error
