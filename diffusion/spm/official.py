"""Files of SPMs: those of Con6924/SPM, which are also LoRA files in kohya's layout, and LoRA files as diffusers and peft write them.

An SPM file holds `<layer>.lora_down.weight`, `<layer>.lora_up.weight` and `<layer>.alpha` with `<layer>` = "lora_unet_" and the module's
path with "_" for ".", and the erased concepts in its metadata. `StableDiffusionPipeline.load_lora_weights` of diffusers reads it, too; for
transformers (Flux, SD3, Sana, ...) it reads what `export_lora` writes. The pipelines of PixArt and DiT have no `load_lora_weights`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.adapters import hooks
from mmkit.diffusion.spm.adapter import SPM, SPMConfig, phrases
from mmkit.errors import CheckpointError, InputError
from mmkit.storage import read_metadata, read_tensors, write_safetensors

PREFIX = "lora_unet_"
_ENDINGS = {  # how down, up and alpha are called in the layouts in circulation
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
}


class Factors(NamedTuple):
    """The change of one layer: `alpha / r * up @ down`, with r = the first size of `down`."""

    down: Tensor
    up: Tensor
    alpha: float


def load_official_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, name: str = "default", official_alpha: bool = False
) -> SPM:
    """Attach the SPM in a file of Con6924/SPM to `model`.

    Args:
        official_alpha: take alpha from the metadata and not from the tensors, as the official code does; diffusers does not. In a file
            that the official code has trained the two are equal.

    Raises:
        CheckpointError: unreadable, not finite, for another model, or a LoRA that names no concepts (see `load_lora`).
    """
    metadata = read_metadata(path)
    concepts = _concepts(metadata)
    if not concepts:
        raise CheckpointError(
            f"{path} does not say which concepts it erases (no `prompts` in its metadata): it is a LoRA, no SPM. If it is meant as an "
            "eraser, read it with load_lora(model, path, concepts=[...])."
        )
    factors = _read(model, path)
    if official_alpha:
        try:
            factors = {p: f._replace(alpha=float(metadata["alpha"])) for p, f in factors.items()}
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path} has no alpha in its metadata: {error}.") from error
    return _attach(model, factors, SPMConfig(concepts=concepts), name, str(path))


def load_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    concepts: str | tuple[str, ...] | list[str],
    *,
    name: str = "default",
) -> SPM:
    """Attach a LoRA file (kohya's, diffusers' or peft's layout) to `model` as an eraser of `concepts`.

    It acts at the layers of the file; layers of another rank than the largest are filled up with zeros, which changes nothing.

    Raises:
        CheckpointError: as above, or layers that the denoiser lacks, such as those of a text encoder.
    """
    factors = _read(model, path)
    config = SPMConfig(concepts=phrases(concepts), targets=tuple(factors))
    return _attach(model, factors, config, name, str(path))


def save_official_checkpoint(adapter: SPM, path: str | os.PathLike[str]) -> None:
    """Write `adapter` as Con6924/SPM does. Raises `InputError` when it trains whole modules beside membranes."""
    _require_plain(adapter)
    tensors = {}
    for site_path in adapter.own_paths:
        site: Any = adapter.site(site_path)
        layer = PREFIX + site_path.replace(".", "_")
        tensors[f"{layer}.lora_down.weight"] = site.lora_down.weight
        tensors[f"{layer}.lora_up.weight"] = site.lora_up.weight
        tensors[f"{layer}.alpha"] = torch.tensor(float(site.alpha))
    config = adapter.config
    facts = {"prompts": ",".join(config.concepts), "rank": str(config.rank), "alpha": str(float(config.alpha))}
    if any("," in c for c in config.concepts):
        facts["concepts"] = json.dumps(config.concepts)  # which `prompts` cannot tell apart
    write_safetensors(path, tensors, facts)


def export_lora(adapter: SPM, path: str | os.PathLike[str], *, strength: float = 1.0) -> None:
    """Write `adapter` at a fixed strength as a LoRA that `load_lora_weights` of diffusers reads; alpha is folded in.

    Pipelines of diffusers without `load_lora_weights` (PixArt, DiT) cannot read it; `load_lora` here can.

    Raises `InputError` when it trains whole modules beside membranes.
    """
    _require_plain(adapter)
    part = "unet" if "UNet" in type(adapter.model).__name__ else "transformer"
    tensors = {}
    for site_path in adapter.own_paths:
        site: Any = adapter.site(site_path)
        tensors[f"{part}.{site_path}.lora_A.weight"] = site.lora_down.weight
        tensors[f"{part}.{site_path}.lora_B.weight"] = site.lora_up.weight * (strength * site.alpha / site.rank)
    write_safetensors(path, tensors)


def _require_plain(adapter: SPM) -> None:
    if adapter.saved_paths:
        raise InputError(
            f"A LoRA file has no place for the modules trained whole {adapter.saved_paths}; use save_adapter."
        )


def _concepts(metadata: dict[str, str]) -> tuple[str, ...]:
    if "concepts" in metadata:
        return tuple(_parsed(metadata["concepts"]))
    return tuple(c.strip() for c in metadata.get("prompts", "").split(",") if c.strip())


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"The metadata of the file are damaged: {error}.") from error


def _read(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, Factors]:
    """What a LoRA file changes, by the path of the layer in `model`."""
    tensors = read_tensors(path, allow_pickle_format=False)
    paths = [p for p, _ in hooks.named_plain_modules(model) if p]
    known = {PREFIX + p.replace(".", "_"): p for p in paths}
    known |= {f"{part}{p}": p for p in paths for part in ("unet.", "transformer.", "")}
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        ending = next((e for e in _ENDINGS if key.endswith(e)), "")
        layer = key.removesuffix(ending)
        if not ending or layer not in known:
            unknown.append(key)
        elif not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path} holds NaN or infinite values in {key}.")
        else:
            found.setdefault(known[layer], {})[_ENDINGS[ending]] = tensor
    if unknown:
        raise CheckpointError(
            f"{path} has {len(unknown)} of {len(tensors)} tensors without a place in {type(model).__name__}, such as {unknown[:3]}: it is "
            "for another model, or a LoRA that changes more than the denoiser."
        )
    halves = [p for p, parts in found.items() if not {"down", "up"} <= set(parts)]
    if halves or not found:
        raise CheckpointError(f"{path} is no LoRA file: 'down' or 'up' is missing at {halves[:3] or 'every layer'}.")
    facts = _parsed(read_metadata(path).get("lora_adapter_metadata", "{}"))
    return {p: Factors(f["down"], f["up"], _alpha(f, facts, p, str(path))) for p, f in found.items()}


def _alpha(parts: dict[str, Tensor], facts: dict[str, Any], path: str, source: str) -> float:
    """The layer's alpha: its own tensor, else what diffusers noted in the metadata, else the rank."""
    if "alpha" in parts:
        return float(parts["alpha"])
    for part in ("unet.", "transformer.", ""):
        if facts.get(f"{part}use_rslora"):
            raise CheckpointError(f"{source} is scaled by the root of its rank (rsLoRA), which is not read here.")
        if f"{part}lora_alpha" in facts:
            own = (facts.get(f"{part}alpha_pattern") or {}).items()
            return float(next((v for k, v in own if f".{path}".endswith(f".{k}")), facts[f"{part}lora_alpha"]))
    return float(parts["down"].shape[0])


def _attach(model: nn.Module, factors: dict[str, Factors], config: SPMConfig, name: str, source: str) -> SPM:
    rank = max(f.down.shape[0] for f in factors.values())
    alpha = Counter(f.alpha for f in factors.values()).most_common(1)[0][0]
    try:
        settings = config.to_dict() | {"rank": rank, "alpha": alpha}
        adapter = SPM(SPMConfig.from_dict(settings), name=name).attach(model)
    except InputError as error:
        raise CheckpointError(f"{source} does not fit this model: {error}") from error
    tensors: dict[str, Tensor] = {}
    for path, (down, up, own_alpha) in factors.items():
        site: Any = adapter.site(path) if path in adapter.own_paths else None
        wide = rank if site is None else site.rank
        factor = own_alpha / down.shape[0] / (alpha / wide)
        tensors[f"{path}.lora_down.weight"] = _wider(down, 0, wide - down.shape[0])
        tensors[f"{path}.lora_up.weight"] = _wider(up if factor == 1 else up * factor, 1, wide - down.shape[0])
    filled: SPM = adapter.fill(tensors, source, strict=True)
    return filled


def _wider(tensor: Tensor, axis: int, more: int) -> Tensor:
    """`tensor` with `more` zeros at the end of an axis; as it is when that is not possible."""
    if more <= 0:
        return tensor
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - axis) + [0, more])


def composed(gates: dict[SPM, float]) -> dict[str, Tensor]:
    """The tensors of the one adapter that official inference makes of several SPMs, each at its gate.

    It adds up `gate * U` and `gate * D` apart, so that a single SPM acts with the square of its gate and several mix: the change is
    `sum(g_i U_i) sum(g_j D_j)`. Load them into one of the adapters (or a fresh one) at scale 1 to get what the official demo draws.

    Raises `InputError` for SPMs of different ranks, alphas or layers.
    """
    first = next(iter(gates))
    for other in gates:
        if other.digest() != first.digest() or other.config.alpha != first.config.alpha:
            raise InputError(
                f"{first.name!r} and {other.name!r} differ in rank, alpha or layers and cannot be composed."
            )
    return {k: torch.stack([g * a.state_dict()[k] for a, g in gates.items()]).sum(0) for k in first.state_dict()}
