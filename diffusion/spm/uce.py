"""UCE: concepts edited in closed form, by one linear solve for the projections that read the text. arXiv 2308.14761 (WACV 2024).

A projection W shall answer concept rows `c` as it answers guide rows `g`, and kept rows `k` as before:

    W* = argmin  lamb |W* - W|^2 + erase_scale sum |W* c - W g|^2 + preserve_scale sum |W* k - W k|^2

The change has the rank of the concept rows: `W* - W = up @ down` with `up = W g - W c` and one `down` for all projections of a width. So an
edit is held as an adapter, a membrane of that rank on each projection: strength, gates, merging, files and LoRA export come with it.

Differences to rohitgandikota/unified-concept-editing: solved in float64, whatever the model's type. The two versions of the official code
are two settings: `UCEConfig()` the present one, `UCEConfig.legacy(...)` the one of the paper's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkit.adapters import hooks
from mmkit.diffusion.spm.adapter import SPM, SPMConfig
from mmkit.errors import InputError
from mmkit.storage import write_safetensors


@dataclass(frozen=True)
class UCEConfig:
    """Settings of an edit.

    Attributes:
        lamb: weight of staying near the original weights, above 0.
        erase_scale, preserve_scale: weights of concepts and of what is kept.
        technique: "replace" maps a concept onto its guide; "tensor" takes from the guide's answer its part along the concept's.
        tokens: "last" edits the last word of a concept (it has seen those before it), "aligned" all tokens from the last word on,
            end marks and padding included, against the guide's.
        kept_tokens: "last" or "all" tokens of what is kept.
        with_to_k: edit keys, too; else values alone.
    """

    lamb: float = 0.5
    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    technique: str = "replace"
    tokens: str = "last"
    kept_tokens: str = "last"
    with_to_k: bool = True

    def __post_init__(self) -> None:
        if not self.lamb > 0 or not self.erase_scale >= 0 or not self.preserve_scale >= 0:
            raise InputError(
                f"lamb must be above 0, erase_scale and preserve_scale at least 0; found {self.lamb!r}, {self.erase_scale!r}, "
                f"{self.preserve_scale!r}."
            )
        for name, known in {
            "technique": ("replace", "tensor"),
            "tokens": ("last", "aligned"),
            "kept_tokens": ("last", "all"),
        }.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} is one of {known}, not {getattr(self, name)!r}.")

    @classmethod
    def legacy(cls, kept: int, **settings: Any) -> UCEConfig:
        """The settings of the official script of the paper's time for `kept` kept texts, the empty one included."""
        scale = max(0.1, 1 / max(kept, 1))
        return cls(**{"tokens": "aligned", "kept_tokens": "all", "preserve_scale": scale, **settings})


class Text(NamedTuple):
    """The text encoder's rows of one phrase (L, C), padded, and how many of them are tokens, the marks of begin and end included."""

    rows: Tensor
    tokens: int

    @property
    def last(self) -> int:
        """Index of the last word; 0 for the empty phrase, where that is the begin mark (or, without one, the end mark)."""
        return min(max(self.tokens - 2, 0), len(self.rows) - 1)


class Pair(NamedTuple):
    """Rows of a concept and of what takes its place, both (n, C)."""

    concept: Tensor
    guide: Tensor


def pair_of(concept: Text, guide: Text, config: UCEConfig) -> Pair:
    """The rows of a concept and its guide that an edit maps onto each other."""
    if config.tokens == "last":
        return Pair(concept.rows[concept.last, None], guide.rows[guide.last, None])
    count = len(concept.rows) - max(concept.last, guide.last)
    return Pair(concept.rows[concept.last :][:count], guide.rows[guide.last :][:count])


def kept_rows(kept: Sequence[Text], config: UCEConfig) -> list[Tensor]:
    """The rows that an edit leaves where they are, each (n, C)."""
    return [text.rows if config.kept_tokens == "all" else text.rows[text.last, None] for text in kept]


def directions(pairs: Sequence[Pair], kept: Sequence[Tensor], config: UCEConfig) -> Tensor:
    """`down` (n, C) in float64: `e c^T B^-1` with `B = lamb I + e sum c c^T + p sum k k^T`, through a system as large as there are rows."""
    concepts = torch.cat([p.concept for p in pairs]).double()
    rows = torch.cat([config.erase_scale**0.5 * concepts, *(config.preserve_scale**0.5 * k.double() for k in kept)])
    system = rows @ rows.T + config.lamb * torch.eye(len(rows), dtype=torch.float64, device=rows.device)
    solved = torch.cholesky_solve(rows, torch.linalg.cholesky(system))
    return config.erase_scale**0.5 * solved[: len(concepts)]


def differences(weight: Tensor, pairs: Sequence[Pair], config: UCEConfig) -> Tensor:
    """`up` (out, n) in float64: how far the wanted answers of `weight` (out, C) to all concept rows lie from its present ones."""
    w = weight.detach().double()
    parts = []
    for concept, guide in pairs:
        now, wanted = concept.double() @ w.T, guide.double() @ w.T
        if config.technique == "tensor":  # one direction for the block of rows
            along = now / now.norm()
            wanted = wanted - (along * wanted).sum() * along
        parts.append(wanted - now)
    return torch.cat(parts).T


def factors(
    model: nn.Module, pairs: dict[str, list[Pair]], kept: dict[str, list[Tensor]], config: UCEConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """The change of every projection as `up` (out, n) and `down` (n, C), `W* - W = up @ down`, in float64; see `edit`."""
    plain = dict(hooks.named_plain_modules(model))
    found: dict[str, tuple[Tensor, Tensor]] = {}
    solved: dict[tuple[int, ...], Tensor] = {}  # projections that read the same rows share one solve
    for path, own in pairs.items():
        weight = getattr(plain.get(path), "weight", None)
        if not isinstance(plain.get(path), nn.Linear) or own[0].concept.shape[1] != weight.shape[1]:  # type: ignore[union-attr]
            raise InputError(f"{path!r} is no linear layer that reads rows of width {own[0].concept.shape[1]}.")
        key = (id(own), id(kept.get(path)))
        down = solved[key] if key in solved else solved.setdefault(key, directions(own, kept.get(path, []), config))
        found[path] = _smaller(differences(weight, own, config), down)  # type: ignore[arg-type]
    return found


def edit(
    model: nn.Module,
    pairs: dict[str, list[Pair]],
    kept: dict[str, list[Tensor]],
    config: UCEConfig | None = None,
    *,
    concepts: tuple[str, ...] = (),
    name: str = "default",
) -> SPM:
    """Edit the projections of `model` and attach the change as an adapter; its `merge` writes W*.

    Args:
        pairs, kept: rows by the path of the projection (a linear layer); its own input, as many rows for each.
        concepts: phrases the adapter carries along.

    Raises:
        InputError: no such projection, or rows of another width.
    """
    return attach(model, factors(model, pairs, kept, config or UCEConfig()), concepts=concepts, name=name)


def attach(
    model: nn.Module, change: dict[str, tuple[Tensor, Tensor]], *, concepts: tuple[str, ...] = (), name: str = "default"
) -> SPM:
    """The change of `factors` as an adapter of its own rank on `model`."""
    rank = max(len(down) for _, down in change.values())
    adapter = SPM(SPMConfig(rank=rank, alpha=float(rank), concepts=concepts, targets=tuple(change)), name=name).attach(
        model
    )
    fill(adapter, change)
    return adapter


def fill(adapter: SPM, change: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Let the membranes of `adapter` begin with the change of `factors`, each with the nearest of its own rank.

    Returns the paths that got one. A change of a higher rank than the membrane's is cut to its largest singular values.
    """
    reached = [p for p in adapter.own_paths if p in change]
    with torch.no_grad():
        for path in reached:
            site: Any = adapter.site(path)
            up, down = change[path]
            if len(down) > site.rank:
                u, s, v = torch.linalg.svd(up @ down, full_matrices=False)
                root = s[: site.rank].sqrt()
                up, down = u[:, : site.rank] * root, root[:, None] * v[: site.rank]
            site.lora_up.weight.zero_()
            site.lora_down.weight.zero_()
            site.lora_up.weight[:, : len(down)].copy_(up * (site.rank / site.alpha))
            site.lora_down.weight[: len(down)].copy_(down)
    return reached


def _smaller(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with a rank of at most the width."""
    width = down.shape[1]
    return (up, down) if len(down) <= width else (up @ down, torch.eye(width, dtype=down.dtype, device=down.device))


def save_edited_weights(adapter: SPM, path: Any) -> None:
    """Write the whole weights that `adapter` edits, as the official code does: `<module>.weight`, for `load_state_dict(strict=False)`."""
    edits = adapter.merge_edits(adapter.model)
    write_safetensors(path, {f"{e.path}.{e.name}": e.value.to(_own(adapter, e.path).weight.dtype) for e in edits})


def _own(adapter: SPM, path: str) -> Any:
    return hooks.unwrap(hooks.get_module(adapter.model, path))


def text_projections(model: nn.Module, with_to_k: bool = True) -> list[str]:
    """Paths of the projections that UCE edits: those of `cross_attention`, or where text and picture share their attention (Flux, SD3)
    the two that take the text in: `context_embedder` and `text_embedder.linear_1`, as the official code does for Flux."""
    ends = ("context_embedder", "text_embedder.linear_1")
    own = (p for p, m in hooks.named_plain_modules(model) if isinstance(m, nn.Linear) and p.endswith(ends))
    return cross_attention(model, with_to_k) or list(own)


def cross_attention(model: nn.Module, with_to_k: bool = True) -> list[str]:
    """Paths of the projections that make keys and values of a text: `attn2.to_k` and `attn2.to_v` of UNets and PixArt."""
    ends = ("attn2.to_k", "attn2.to_v") if with_to_k else ("attn2.to_v",)
    return [p for p, m in hooks.named_plain_modules(model) if isinstance(m, nn.Linear) and p.endswith(ends)]
