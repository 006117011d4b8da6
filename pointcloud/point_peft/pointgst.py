"""PointGST: a low-rank adapter that works in the graph spectrum of the group centres. arXiv 2410.08114.

In every block the attention's output goes down to a few channels, is transformed to the spectrum of the graph of all centres and to
those of runs of neighbouring centres (along a z-order curve), changed there by one shared small layer, transformed back and added
beside the MLP. It starts as nothing at all.

Deviations from the official code (jerryfeng2003/PointGST), each undone by a setting: `basis="official"` multiplies the matrix of
eigenvectors where its transpose is meant, so that the eigenvectors' arbitrary signs change the result; `sign="raw"` leaves these
signs to the linear algebra library (ours: the largest component is positive); `scale="batch"` divides distances by the smallest one
of the whole batch, as `torch.cdist` rounds it, so that a sample depends on its neighbours in the batch (ours: of each graph). Any
number of groups is cut into runs, the last one shorter; equal centres count as near ones rather than fail.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.adapters import Adapter, AdapterConfig, Edit, current_context, hooks, register_adapter
from mmkit.errors import InputError, NotMergeableError
from mmkit.pointcloud.point_peft.adapter import require_point_model

BASIS = "graph_basis"
"""What a caller may give in `forward_context(store={...})`: the two matrices (B, G, G) of `analysis_matrices`."""


@dataclass(frozen=True)
class PointGSTConfig(AdapterConfig):
    """Settings of PointGST.

    Attributes:
        rank: channels of the adapters. local: centres per run.
        basis: "transposed" (the graph Fourier transform) or "official".
        sign: of eigenvectors: "canonical" or "raw".
        scale: smallest distance of each graph ("sample") or of all together ("batch").
    """

    rank: int = 36
    local: int = 32
    basis: str = "transposed"
    sign: str = "canonical"
    scale: str = "sample"
    modules_to_save: tuple[str, ...] = ("cls", "head")

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"basis": ("transposed", "official"), "sign": ("canonical", "raw"), "scale": ("sample", "batch")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"PointGSTConfig: {name} is one of {known}, not {getattr(self, name)!r}.")
        if min(self.rank, self.local) < 1:
            raise InputError("PointGSTConfig: rank and local are at least 1.")


def eigenbasis(center: Tensor, sign: str = "canonical", scale: str = "sample") -> tuple[Tensor, Tensor]:
    """Eigenvectors (in columns) and eigenvalues, ascending, of the graph Laplacians of points (B, n, 3): (B, n, n) and (B, n)."""
    n = center.shape[1]
    own = torch.eye(n, device=center.device, dtype=torch.bool)
    if scale == "batch":
        d = torch.cdist(center, center)
        d = d / d[d > 0].min() + own  # as published; equal centres are an error there
        affinity = 1 / d
    else:
        center = center.double()
        d = (center.unsqueeze(2) - center.unsqueeze(1)).square().sum(-1).sqrt()
        least = d.masked_fill(own | (d <= 0), torch.inf).flatten(1).amin(1)
        least = torch.where(least.isinf(), 1.0, least)[:, None, None]
        affinity = torch.where(own, 1.0, least / d.clamp(min=least))
    root = (affinity.sum(-1) + 1e-6).rsqrt()
    laplacian = own.to(affinity.dtype) - root.unsqueeze(-1) * affinity * root.unsqueeze(-2)
    values, vectors = torch.linalg.eigh(laplacian)
    if sign == "canonical":
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)
    return vectors, values


def z_order_keys(center: Tensor) -> Tensor:
    """(B, G) int64 along a z-order curve with cells of 0.01; the axes y, x, z in falling weight, negative cells last."""
    cells = (100 * center[..., [1, 0, 2]]).to(torch.int64) & 0xFFFF
    key = torch.zeros_like(cells[..., 0])
    for bit in range(16):
        for axis in range(3):
            key |= (cells[..., axis] >> bit & 1) << (3 * bit + 2 - axis)
    return key


def analysis_matrices(whole: Tensor, runs: list[Tensor], order: Tensor, basis: str) -> tuple[Tensor, Tensor]:
    """The two transforms as matrices that multiply tokens (B, G, r) from the left; their transposes transform back.

    Args:
        whole: eigenvectors of all centres (B, G, G).
        runs: those of each run (B, n, n), in the order of the curve.
        order: (B, G), the centres along the curve.
    """
    if basis == "transposed":
        whole, runs = whole.transpose(1, 2), [u.transpose(1, 2) for u in runs]
    local = torch.zeros_like(whole)
    start = 0
    for u in runs:
        end = start + u.shape[1]
        local[:, start:end, start:end] = u
        start = end
    back = order.argsort(1).unsqueeze(1).expand_as(local)  # column g of the sorted tokens is column back[g]
    return whole, local.gather(2, back)


@torch.no_grad()
def graph_basis(center: Tensor, config: PointGSTConfig) -> tuple[Tensor, Tensor]:
    """`analysis_matrices` of centres (B, G, 3)."""
    with torch.autocast(center.device.type, enabled=False):
        center = center.float()
        batch, g = center.shape[:2]
        order = z_order_keys(center).argsort(dim=1, stable=True)
        along = center.gather(1, order.unsqueeze(-1).expand(-1, -1, 3))
        settings = config.sign, config.scale
        full = g // config.local * config.local
        runs: list[Tensor] = []
        if full:
            cut = along[:, :full].reshape(-1, config.local, 3)
            runs += eigenbasis(cut, *settings)[0].unflatten(0, (batch, -1)).unbind(1)
        if full < g:
            runs.append(eigenbasis(along[:, full:], *settings)[0])
        return analysis_matrices(
            eigenbasis(center, *settings)[0].float(), [r.float() for r in runs], order, config.basis
        )


class SpectralAdapter(nn.Module):
    """Tokens (B, 1 + G, D) -> what is added to them; zero at the start."""

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.down, self.up, self.adapt1 = nn.Linear(dim, rank), nn.Linear(rank, dim), nn.Linear(rank, rank)
        self.norm_ly1, self.norm_ly2 = nn.LayerNorm(rank), nn.LayerNorm(rank)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        for layer in (self.up, self.adapt1):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def spectral(self, t: Tensor, matrix: Tensor, norm: nn.Module) -> Tensor:
        """Transform, change, transform back: (B, G, r)."""
        z = matrix.to(t.dtype) @ t
        return matrix.to(t.dtype).transpose(1, 2) @ (z + F.silu(self.adapt1(norm(z))))

    def forward(self, x: Tensor, whole: Tensor, local: Tensor) -> Tensor:
        h = self.down(x.to(self.down.weight.dtype))
        t = h[:, -whole.shape[1] :]
        both = self.spectral(t, whole, self.norm_ly1) + self.spectral(t, local, self.norm_ly2)
        return self.up(F.silu(h) + F.pad(both, (0, 0, h.shape[1] - t.shape[1], 0))).to(x.dtype)


class _Basis(hooks.Action):
    """On the grouping: the transforms of this call's centres go into its context."""

    def __init__(self, adapter: PointGST):
        self.adapter = adapter

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out, context = below(*args, **kwargs), current_context()
        if context is not None:
            given = context.store.get(BASIS)
            context.store[self.adapter.key] = given if given is not None else graph_basis(out[1], self.adapter.config)
        return out

    def blended(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any], strength: Any) -> Any:
        return self.run(below, args, kwargs)


class _Read(hooks.Action):
    """On the norm before the MLP: the adapter reads what the norm is given."""

    def __init__(self, adapter: PointGST, site: SpectralAdapter, block: str):
        self.adapter, self.site, self.block = adapter, site, block
        self.modules = (site,)

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = current_context()
        basis = None if context is None else context.store.get(self.adapter.key)
        if basis is None or args[0].shape[1] < basis[0].shape[1]:
            raise InputError("PointGST acts on whole clouds: call the model, not its blocks, and hide no groups.")
        context.store[(self.adapter.key, self.block)] = self.site(args[0], *basis)  # type: ignore[union-attr]
        return below(*args, **kwargs)


class _Add(hooks.Action):
    """Behind the MLP: what the adapter made is added."""

    def __init__(self, adapter: PointGST, block: str):
        self.adapter, self.block = adapter, block

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = current_context()
        y = below(*args, **kwargs)
        return y if context is None else y + context.store.pop((self.adapter.key, self.block))


@register_adapter("pointgst")
class PointGST(Adapter):
    """The adapter; see the module. It goes on a `PointMAE` (or Point-BERT) classifier, or a segmenter."""

    config_class = PointGSTConfig
    tasks = ("point-cloud-classification", "point-cloud-segmentation")

    @property
    def key(self) -> tuple[str, str]:
        """Where this adapter's transforms lie in the context's store."""
        return self.method, self.name

    def build(self, model: nn.Module) -> None:
        root = require_point_model(model, self.method)
        for i in range(len(root.blocks)):
            self.add_site(f"blocks.{i}.norm2", SpectralAdapter(root.embed_dim, self.config.rank))
        self.to(next(model.parameters()).device)

    def install(self, model: nn.Module) -> None:
        self.link(model, "group", _Basis(self))
        for path in self.own_paths:
            block = path.removesuffix(".norm2")
            self.link(model, path, _Read(self, self.site(path), block))  # type: ignore[arg-type]
            self.link(model, f"{block}.drop_path2", _Add(self, block), slot="add")

    def merge_edits(self, model: nn.Module) -> list[Edit]:
        raise NotMergeableError("PointGST has non-linear layers that know the cloud: keep the adapter attached.")

    def official_keys(self, keys: Iterable[str]) -> dict[str, str]:
        """What tensors of an official file (as `official.plain_keys` names them) are called in this adapter."""
        return {key: key.replace(".gft_adapter.", ".norm2.") for key in keys if ".gft_adapter." in key}
