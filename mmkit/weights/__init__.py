"""Bundled weights: small models trained or converted by scripts in this repository, listed with how they were made.

`manifest.json` holds one entry per file: what it is, its sha256, license, and the command, data, seed and measured score
that produced it. All files together stay under 40 MB.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkit.errors import CheckpointError, InputError, nearest
from mmkit.storage import read_json, read_tensors, sha256_file, write_json, write_safetensors

FOLDER = Path(__file__).parent
MANIFEST = FOLDER / "manifest.json"


@dataclass(frozen=True)
class WeightEntry:
    """One bundled file and its provenance.

    Attributes:
        name: what `mmkit.load_weights` takes.
        model: how the module is built: a name of `list_models()`, or a `create_backbone` name such as "timm:vit_...".
        config: keyword arguments for it.
        summary: what the weights can and cannot do, in one or two sentences.
        license: license of the weights.
        command, data, seed: what made them.
        score: measured figures, by name.
        file, sha256: the tensor file beside the manifest.
        extra: anything else a pipeline needs (class labels, preprocessing).
        aliases: other names that mean the same: of a timm architecture whose weights these are.
    """

    name: str
    model: str
    config: dict[str, Any]
    summary: str
    license: str
    command: str
    data: str
    seed: int
    score: dict[str, float]
    file: str = ""
    sha256: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    aliases: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """Where the tensor file lies."""
        return FOLDER / self.file


@functools.cache
def _manifest() -> dict[str, WeightEntry]:
    try:
        return {row["name"]: WeightEntry(**row) for row in read_json(MANIFEST)} if MANIFEST.exists() else {}
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged ({error!r}): reinstall mmkit.") from error


def list_weights() -> list[str]:
    """Names of the bundled weights."""
    return sorted(_manifest())


def bundled_name(name: str) -> str | None:
    """The name of the bundled weights that `name` or an alias stands for; `None` when there are none."""
    return name if name in _manifest() else next((e.name for e in _manifest().values() if name in e.aliases), None)


def weight_entry(name: str) -> WeightEntry:
    """The manifest entry of `name` or an alias; raises `InputError` with the nearest names."""
    known = bundled_name(name)
    if known is None:
        raise InputError(f"No bundled weights are called {name!r}. {nearest(name, _manifest())}")
    return _manifest()[known]


def load_tensors(name: str) -> dict[str, Tensor]:
    """The tensors of `name` in float32, after checking the file against the manifest's sha256."""
    entry = weight_entry(name)
    if not entry.path.is_file():
        raise CheckpointError(f"{entry.path} is missing: reinstall mmkit, or run `{entry.command}`.")
    found = sha256_file(entry.path)
    if found != entry.sha256:
        raise CheckpointError(f"{entry.path} is damaged: sha256 {found[:12]}, manifest says {entry.sha256[:12]}.")
    return {
        k: v.float() if v.dtype == torch.float16 else v
        for k, v in read_tensors(entry.path, allow_pickle_format=False).items()
    }


def bundle(entry: WeightEntry, state: dict[str, Tensor], *, half: bool = True) -> WeightEntry:
    """Write `state` beside the manifest and record `entry` in it; what the training scripts call at their end.

    Args:
        entry: provenance; `file` and `sha256` are filled in here.
        state: the tensors. Every value must be finite.
        half: store floating tensors as float16 (measure the score with the rounded weights).
    """
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise InputError(f"Refusing to bundle {entry.name!r}: non-finite values in {bad[:4]}.")
    stored = {k: v.half() if half and v.is_floating_point() else v for k, v in state.items()}
    file = f"{entry.name}.safetensors"
    write_safetensors(FOLDER / file, stored)
    entry = dataclasses.replace(entry, file=file, sha256=sha256_file(FOLDER / file))
    record(entry)
    return entry


def record(entry: WeightEntry) -> None:
    """Put `entry` into the manifest in place of the one of its name; the file stays as it is."""
    _manifest.cache_clear()  # another script may have added its entry meanwhile
    rows = {**_manifest(), entry.name: entry}
    write_json(MANIFEST, [dataclasses.asdict(rows[k]) for k in sorted(rows)])
    _manifest.cache_clear()
