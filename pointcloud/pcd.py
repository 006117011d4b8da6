"""PCD files of the Point Cloud Library, version 0.7: ascii, binary and LZF-compressed."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmkit.errors import InputError

_KINDS = {"F": "f", "U": "u", "I": "i"}


def read_pcd(content: bytes) -> dict[str, np.ndarray]:
    """Columns by name; a packed color becomes red, green and blue. Raises `InputError` for a damaged file."""
    header, data = _header(content)
    names, counts = header["FIELDS"], [int(c) for c in header.get("COUNT", ["1"] * len(header["FIELDS"]))]
    types = [np.dtype(f"<{_KINDS[k]}{s}") for k, s in zip(header["TYPE"], header["SIZE"], strict=True)]
    rows = int(header["POINTS"][0]) if "POINTS" in header else int(header["WIDTH"][0]) * int(header["HEIGHT"][0])
    row = np.dtype([(f"{n}#{i}", t, (c,)) for i, (n, t, c) in enumerate(zip(names, types, counts, strict=True))])
    kind = header["DATA"][0]
    if rows < 0 or row.itemsize * rows > 1 << 34:
        raise InputError(f"A PCD file cannot hold {rows} points.")
    if kind == "ascii":
        table = np.loadtxt(data.decode(errors="replace").splitlines()[:rows], ndmin=2)
        if len(table) != rows:
            raise InputError(f"The PCD file holds {len(table)} points; its header says {rows}.")
        starts = np.cumsum([0, *counts])
        found = {n: table[:, starts[i]].astype(t) for i, (n, t) in enumerate(zip(names, types, strict=True))}
    else:
        if kind == "binary_compressed":
            packed, full = np.frombuffer(data[:8], "<u4")
            if full != rows * row.itemsize:
                raise InputError("The compressed data of the PCD file do not fit its header.")
            data = _lzf(data[8 : 8 + int(packed)], int(full))
            found, start = {}, 0  # one column after the other
            for name, t, c in zip(names, types, counts, strict=True):
                found[name] = np.frombuffer(data, t, rows * c, start).reshape(rows, c)[:, 0]
                start += rows * c * t.itemsize
        elif kind == "binary":
            records: Any = np.frombuffer(data, row, rows)
            found = {n: records[f"{n}#{i}"][:, 0] for i, n in enumerate(names)}
        else:
            raise InputError(f"PCD data are ascii, binary or binary_compressed, not {kind!r}.")
    return _with_colors({n: a for n, a in found.items() if n != "_"})


def _header(content: bytes) -> tuple[dict[str, list[str]], bytes]:
    header: dict[str, list[str]] = {}
    position = 0
    while "DATA" not in header:
        end = content.find(b"\n", position)
        if end < 0 or end > 65536:
            raise InputError("The file has no PCD header.")
        words = content[position:end].decode(errors="replace").split("#")[0].split()
        if words:
            header[words[0].upper()] = words[1:]
        position = end + 1
    if missing := [k for k in ("FIELDS", "SIZE", "TYPE") if k not in header]:
        raise InputError(f"The PCD header lacks {', '.join(missing)}.")
    return header, content[position:]


def _with_colors(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    packed = columns.pop("rgb", columns.pop("rgba", None))
    if packed is not None and packed.dtype.itemsize == 4:
        bits = np.ascontiguousarray(packed).view("<u4")
        columns |= {n: (bits >> s & 255).astype(np.uint8) for n, s in (("red", 16), ("green", 8), ("blue", 0))}
    return columns


def _lzf(data: bytes, size: int) -> bytes:
    """Decompress LZF."""
    out = bytearray()
    i = 0
    while i < len(data):
        control = data[i]
        i += 1
        if control < 32:  # a run of plain bytes
            out += data[i : i + control + 1]
            i += control + 1
            continue
        length = control >> 5
        if length == 7:
            length += data[i]
            i += 1
        start = len(out) - ((control & 31) << 8) - data[i] - 1
        i += 1
        if start < 0:
            raise InputError("The compressed data of the PCD file are damaged.")
        for j in range(start, start + length + 2):
            out.append(out[j])
    if len(out) != size:
        raise InputError("The compressed data of the PCD file are damaged.")
    return bytes(out)
