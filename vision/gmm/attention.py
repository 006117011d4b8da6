"""Gaussian mixture masks on attention logits: a learned notion of distance for vision transformers.

Source: "Toward a Deeper Understanding: RetNet Viewed through Convolution", Li and Zhang, arXiv 2309.05375, section 3.
The logits of head h are multiplied, before the softmax, by

    M[h, i, j] = offset + sum_k alpha[k, h] * exp(-d2[i, j] / (2 * (sigma[k, h]^2 + 1e-5)))

where d2 is the squared distance of two patches on the patch grid. `offset` is 0 in the paper; our adapter form uses 1
and alpha = 0, so that a pretrained model starts unchanged. Multiply first, add biases and padding masks afterwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.adapters import hooks
from mmkit.adapters.core import Adapter, AdapterConfig, register_adapter
from mmkit.adapters.sites import match_targets
from mmkit.errors import InputError, nearest
from mmkit.ops.backends import choose_backend

VARIANCE_FLOOR = 1e-5
"""Added to sigma^2, in squared patches, as in the official code."""


def check_grid(grid: Sequence[int]) -> tuple[int, int]:
    """`grid` as `(rows, columns)` of patches; raises `InputError` unless both are positive integers."""
    if isinstance(grid, str) or not isinstance(grid, Sequence) or len(grid) != 2:
        raise InputError(f"grid must be (rows, columns) of patches, not {grid!r}.")
    if not all(isinstance(n, Integral) and n > 0 for n in grid):
        raise InputError(f"grid must hold two positive integers, not {tuple(grid)!r}.")
    return int(grid[0]), int(grid[1])


def check_count(name: str, value: Any, least: int) -> int:
    """`value` as an int; raises `InputError` unless it is a whole number of at least `least`."""
    if not isinstance(value, Integral) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}.")
    return int(value)


def distance_table(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Distinct squared patch distances of a grid and where each pair of patches finds its own.

    Returns:
        values `(U,)` int32, ascending, and index `(N, N)` int32: `values[index[i, j]]` is the squared distance of
        patches i, j.
    """
    rows, columns = grid
    y, x = torch.arange(rows), torch.arange(columns)
    values, place = torch.unique(y[:, None] ** 2 + x[None, :] ** 2, return_inverse=True)
    ty, tx = y.repeat_interleave(columns), x.repeat(rows)
    index = place[(ty[:, None] - ty[None, :]).abs(), (tx[:, None] - tx[None, :]).abs()]
    return values.int(), index.int()


class LogitMask(nn.Module):
    """Base of the masks: `mask(logits)` returns the changed logits; rows and columns of prefix tokens stay untouched.

    Args:
        num_heads: heads of the attention.
        grid: (rows, columns) of patches.
        num_prefix_tokens: class and register tokens in front of the patches.
        mode: "multiply" (the paper) or "bias" (added to the logits: not the paper's operator, but it runs fused).
    """

    def __init__(self, num_heads: int, grid: Sequence[int], num_prefix_tokens: int = 0, mode: str = "multiply"):
        super().__init__()
        if mode not in ("multiply", "bias"):
            raise InputError(f"mode must be 'multiply' or 'bias', not {mode!r}.")
        self.num_heads = check_count("num_heads", num_heads, 1)
        self.num_prefix_tokens = check_count("num_prefix_tokens", num_prefix_tokens, 0)
        self.mode = mode
        self.grid = check_grid(grid)

    @property
    def num_tokens(self) -> int:
        """Tokens the mask expects: prefix tokens plus rows * columns."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    def matrix(self) -> Tensor:
        """The mask `(num_heads or 1, N, N)`, prefix tokens included, in float32 or better."""
        raise NotImplementedError

    def forward(self, logits: Tensor) -> Tensor:
        """Apply the mask to logits `(B, num_heads, N, N)`; half precision logits come back in float32.

        Raises `InputError` when heads or tokens do not fit the grid.
        """
        if logits.dim() != 4:
            raise InputError(f"Attention logits must be (B, num_heads, N, N), not {tuple(logits.shape)}.")
        self.check(*logits.shape[1:])
        matrix = self.matrix()
        return logits * matrix if self.mode == "multiply" else logits + matrix

    def check(self, num_heads: int, *tokens: int) -> None:
        """Raise `InputError` unless an attention of this size fits the mask."""
        if any(n != self.num_tokens for n in tokens):
            raise InputError(
                f"The attention has {' x '.join(map(str, tokens))} tokens, but a {self.grid[0]} x {self.grid[1]} patch "
                f"grid with {self.num_prefix_tokens} prefix tokens has {self.num_tokens}. Call set_grid() for another "
                "image size."
            )
        if num_heads != self.num_heads:
            raise InputError(f"The attention has {num_heads} heads, the mask was built for {self.num_heads}.")

    def _with_prefix(self, matrix: Tensor) -> Tensor:
        p = self.num_prefix_tokens
        return F.pad(matrix, (p, 0, p, 0), value=1.0 if self.mode == "multiply" else 0.0) if p else matrix

    def extra_repr(self) -> str:
        size = f"num_heads={self.num_heads}, grid={self.grid}, num_prefix_tokens={self.num_prefix_tokens}"
        return f"{size}, mode={self.mode!r}"


class GaussianMixtureMask(LogitMask):
    """A mixture of K Gaussians of the patch distance per head: 2 * K * num_heads scalars; see the module's docstring.

    Args:
        num_heads, grid, num_prefix_tokens, mode: see `LogitMask`.
        num_kernels: K >= 1 Gaussians per head.
        init: "official" (sigma = 10 + 10 * randn patches, alpha = 2 * randn, offset 0) for training from scratch, or
            "identity" (alpha = 0, widths log-spaced from 0.5 patches to half the grid, offset 1) for pretrained models.
            The widths differ because kernels of equal width would receive equal gradients for ever.
        official_underflow: reproduce the official float32 base mask, which is exactly 0 beyond 10.2 patches whatever
            sigma is. Only needed for parity with official checkpoints on grids whose diagonal is longer than that.

    `alpha` and `sigma` (in patches) have shape `(num_kernels, num_heads, 1, 1)`. The mask is evaluated once per
    distinct distance and gathered, always in float32 or better, also under autocast. Without gradients and in eval
    mode it is cached until a value changes.
    """

    alpha: nn.Parameter
    sigma: nn.Parameter

    _values: Any
    _index: Any
    _baked: Any

    def __init__(
        self,
        num_heads: int,
        grid: Sequence[int],
        num_kernels: int = 5,
        *,
        num_prefix_tokens: int = 0,
        init: str = "official",
        mode: str = "multiply",
        official_underflow: bool = False,
    ):
        super().__init__(num_heads, grid, num_prefix_tokens, mode)
        if init not in ("official", "identity"):
            raise InputError(f"init must be 'official' or 'identity', not {init!r}.")
        self.num_kernels = num_kernels = check_count("num_kernels", num_kernels, 1)
        self.offset = 1.0 if init == "identity" and mode == "multiply" else 0.0
        self.official_underflow = official_underflow
        shape = (num_kernels, num_heads, 1, 1)
        if init == "official":
            self.sigma = nn.Parameter(10 + 10 * torch.randn(shape))
            self.alpha = nn.Parameter(2 * torch.randn(shape))
        else:
            widest = max(1.0, max(self.grid) / 2)
            widths = torch.logspace(math.log10(0.5), math.log10(widest), num_kernels)
            self.sigma = nn.Parameter(widths.view(-1, 1, 1, 1).repeat(1, num_heads, 1, 1))
            self.alpha = nn.Parameter(torch.zeros(shape))
        self.sigma_scale = 1.0
        self._cache: tuple[Tensor, Tensor, Tensor] | None = None
        self.register_buffer("_baked", None, persistent=False)
        self.register_buffer("_values", None, persistent=False)
        self.register_buffer("_index", None, persistent=False)
        self.set_grid(self.grid)

    def set_grid(self, grid: Sequence[int], *, sigma_scale: float | None = None) -> None:
        """Follow another image size: the distances are rebuilt, nothing is interpolated.

        Args:
            grid: the new (rows, columns).
            sigma_scale: factor on the learned widths, for example new rows / old rows to keep them constant relative
                to the picture; `None` keeps the present factor. The parameters themselves stay as they are.

        Raises:
            InputError: not a grid, a scale that is not positive, or the mask is baked.
        """
        grid = check_grid(grid)
        if self._baked is not None:
            raise InputError("The mask is baked for one grid; call unbake() before set_grid().")
        if sigma_scale is not None:
            if not 0 < sigma_scale < math.inf:
                raise InputError(f"sigma_scale must be positive, not {sigma_scale}.")
            self.sigma_scale = float(sigma_scale)
        with torch.inference_mode(False), torch.no_grad():
            values, index = distance_table(grid)
            self._values, self._index = values.to(self.alpha.device), index.to(self.alpha.device)
        self.grid, self._cache = grid, None

    def profile(self) -> tuple[Tensor, Tensor]:
        """The mask as a function of distance: distances `(U,)` in patches and values `(num_heads, U)`."""
        return self._values.float().sqrt(), self._lut()

    def _lut(self) -> Tensor:
        """Mask values `(num_heads, U)` at the distinct distances, differentiable in alpha and sigma."""
        with torch.autocast(self.alpha.device.type, enabled=False):
            dtype = torch.promote_types(self.alpha.dtype, torch.float32)
            alpha, sigma = self.alpha.to(dtype)[..., 0], self.sigma.to(dtype)[..., 0] * self.sigma_scale  # (K, H, 1)
            d2 = self._values.to(dtype)
            if self.official_underflow:
                kernels = torch.exp(-d2.float()).sqrt().to(dtype) ** (1 / (sigma.square() + VARIANCE_FLOOR))
            else:
                kernels = torch.exp(-d2 / (2 * (sigma.square() + VARIANCE_FLOOR)))
            return self.offset + (alpha * kernels).sum(0)

    def _build(self) -> Tensor:
        tokens = self._index.shape[0]
        gathered = self._lut().index_select(1, self._index.flatten())
        return self._with_prefix(gathered.view(self.num_heads, tokens, tokens))

    def matrix(self) -> Tensor:
        """The mask `(num_heads, N, N)`; see `LogitMask.matrix`."""
        if self._baked is not None:
            return self._baked
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._cache = None
            return self._build()
        if self._cache is not None:
            alpha, sigma, matrix = self._cache
            same_place = alpha.device == self.alpha.device and alpha.dtype == self.alpha.dtype
            if same_place and torch.equal(alpha, self.alpha) and torch.equal(sigma, self.sigma):
                return matrix
        matrix = self._build()
        self._cache = (self.alpha.detach().clone(), self.sigma.detach().clone(), matrix)
        return matrix

    def bake(self) -> None:
        """Freeze the mask at its present value, for export: alpha and sigma stop training, `matrix()` is a constant."""
        with torch.inference_mode(False), torch.no_grad():
            self._baked = self._build()
        self.alpha.requires_grad_(False)
        self.sigma.requires_grad_(False)

    def unbake(self) -> None:
        """Undo `bake()`: the parameters train again."""
        self._baked = None
        self.alpha.requires_grad_(True)
        self.sigma.requires_grad_(True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_kernels={self.num_kernels}"


class ElementwiseLearnableMask(LogitMask):
    """The paper's first step (ELM): one free factor per pair of patches, `(N, N)`, shared by all heads of a layer.

    Args:
        num_heads, grid, num_prefix_tokens: see `LogitMask`. The grid is fixed.
        init: "official" (zeros: attention starts uniform) or "identity" (ones).
    """

    def __init__(self, num_heads: int, grid: Sequence[int], *, num_prefix_tokens: int = 0, init: str = "official"):
        super().__init__(num_heads, grid, num_prefix_tokens)
        if init not in ("official", "identity"):
            raise InputError(f"init must be 'official' or 'identity', not {init!r}.")
        tokens = self.grid[0] * self.grid[1]
        self.weight = nn.Parameter(torch.full((tokens, tokens), 0.0 if init == "official" else 1.0))

    def matrix(self) -> Tensor:
        """The mask `(1, N, N)`; see `LogitMask.matrix`."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return self._with_prefix(self.weight.to(dtype)[None])


def create_mask(
    kind: str, num_heads: int, grid: Sequence[int], num_kernels: int = 5, **options: Any
) -> LogitMask | None:
    """A mask by name: "gmm", "elm" or "none" (returns `None`). Options are those of the classes.

    Raises `InputError` for another name.
    """
    if kind == "gmm":
        return GaussianMixtureMask(num_heads, grid, num_kernels, **options)
    if kind == "elm":
        options.pop("official_underflow", None)
        return ElementwiseLearnableMask(num_heads, grid, **options)
    if kind == "none":
        return None
    raise InputError(f"mask must be 'gmm', 'elm' or 'none', not {kind!r}.")


def _flex_problem(device: torch.device) -> str | None:
    return (
        None if device.type == "cuda" else f"flex_attention needs CUDA, the tensors are on {device.type}; use 'eager'."
    )


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LogitMask | Tensor | None,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "eager",
) -> Tensor:
    """Attention whose logits pass through `mask` before the softmax; `attn_mask` is applied after it.

    Args:
        q, k, v: `(B, H, N, D)`.
        mask: a `LogitMask`, a multiplicative matrix `(H, N, N)` or `(1, N, N)`, or `None` for plain attention.
        scale: factor on the logits; `None` is `D ** -0.5`.
        attn_mask: boolean (`True` = attend) or additive, broadcastable to `(B, H, N, N)`.
        dropout_p: dropout on the attention weights.
        backend: "eager" (exact, any device) or "flex" (fused on CUDA through `torch.nn.attention.flex_attention`,
            without dropout and `attn_mask`). An additive mask (`mode="bias"`) always runs in
            `scaled_dot_product_attention`.

    Returns:
        `(B, H, N, D)` in v's dtype.

    Raises:
        InputError: a mask that does not fit, or options the backend cannot serve.
        BackendUnavailableError: "flex" away from CUDA.
    """
    if backend not in ("eager", "flex"):
        raise InputError(f"backend must be 'eager' or 'flex', not {backend!r}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(mask, LogitMask):
        mask.check(q.shape[1], q.shape[2], k.shape[2])
    elif mask is not None and (
        mask.shape[-2:] != (q.shape[2], k.shape[2]) or mask.shape[:-2] not in ((1,), q.shape[1:2])
    ):
        raise InputError(
            f"mask must be {(q.shape[1], q.shape[2], k.shape[2])} or one matrix (1, N, N), not {tuple(mask.shape)}."
        )
    if mask is None or (isinstance(mask, LogitMask) and mask.mode == "bias"):
        bias = None if mask is None else mask.matrix().to(q.dtype)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=_sum_masks(bias, attn_mask, q.dtype), dropout_p=dropout_p, scale=scale
        )
    if backend == "flex":
        choose_backend("masked_attention", "flex", q.device, {"cpu": ("flex",)}, {"flex": _flex_problem})
        if attn_mask is not None or dropout_p:
            raise InputError("backend='flex' takes neither attn_mask nor dropout; use backend='eager'.")
        matrix = (mask.matrix() if isinstance(mask, LogitMask) else mask).expand(q.shape[1], -1, -1).contiguous()

        def score(logit: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return logit * matrix[head, i, j]

        return _compiled_flex()(q, k, v, score_mod=score, scale=scale)
    logits = (q * scale) @ k.transpose(-2, -1)
    if isinstance(mask, LogitMask):
        logits = mask(logits)
    elif torch.is_grad_enabled() or mask.dtype != logits.dtype:
        logits = logits * mask
    else:
        logits.mul_(mask)  # without gradients nothing needs the largest tensor twice
    additive = _sum_masks(None, attn_mask, logits.dtype)
    if additive is not None:
        logits = logits + additive
    weights = F.dropout(logits.softmax(-1).to(v.dtype), dropout_p)
    return weights @ v


def _sum_masks(bias: Tensor | None, attn_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One additive mask from a bias and a boolean or additive mask."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=dtype).masked_fill(~attn_mask, -math.inf)
    if bias is None or attn_mask is None:
        return attn_mask if bias is None else bias
    return bias + attn_mask


@dataclass(frozen=True)
class GMMConfig(AdapterConfig):
    """Settings of the `gmm` adapter.

    Attributes:
        num_kernels: Gaussians per head; the adapter has `2 * num_kernels * num_heads` scalars per attention.
        mode: "multiply" (the paper's operator) or "bias" (the Gaussians are added to the logits; keeps fused
        attention). attn_backend: "eager" or "flex" (CUDA), see `masked_attention`.
        targets: attention modules, for example "blocks.[0-5].attn"; `None` is all of them.
    """

    num_kernels: int = 5
    mode: str = "multiply"
    attn_backend: str = "eager"


@register_adapter("gmm")
class GMMAdapter(Adapter):
    """Gaussian mixture masks on the attention of a pretrained timm ViT; the output is unchanged until alpha is trained.

    Rows and columns of class and register tokens are never masked. The patch grid is read at every forward pass, so
    `dynamic_img_size` and `set_input_size` work. Masks multiply attention logits, which no weight can absorb:
    `merge()` raises, `bake()` turns them into constants. A model that classifies from its class token ignores the last
    layer's mask, since only patches are masked. `fit` trains alpha and sigma without weight decay at ten times its
    learning rate.
    """

    config_class = GMMConfig
    lr_scale = 10.0
    decays = False

    def build(self, model: nn.Module) -> None:
        config = self.config
        if config.attn_backend not in ("eager", "flex"):
            raise InputError(f"attn_backend must be 'eager' or 'flex', not {config.attn_backend!r}.")
        path, backbone = _find_backbone(model)
        prefix = f"{path}." if path else ""
        candidates = {
            p: m for p, m in hooks.named_plain_modules(model) if p.startswith(prefix) and _is_timm_attention(m)
        }
        names = list(candidates) if config.targets is None else match_targets(config.targets, list(candidates))
        if not names:
            hint = (
                nearest(str(config.targets), candidates) if candidates else NO_ATTENTION.format(type(backbone).__name__)
            )
            raise InputError(f"'gmm' matches no attention with targets={config.targets!r}. {hint}")
        for name in names:
            attention: Any = candidates[name]
            mask = GaussianMixtureMask(
                attention.num_heads,
                _grid_size(backbone),
                config.num_kernels,
                num_prefix_tokens=int(getattr(backbone, "num_prefix_tokens", 0)),
                init="identity",
                mode=config.mode,
            )
            self.add_site(name, mask.to(next(attention.parameters()).device))

    def install(self, model: nn.Module) -> None:
        _, backbone = _find_backbone(model)
        reader = GridReader()
        hooks.add_hook(backbone.patch_embed, self, reader)
        for path in self.mask_paths:
            module = hooks.unwrap(hooks.get_module(model, path))
            present = module.__dict__.get("forward")
            if present is not None and not isinstance(present, MaskedForward):
                raise InputError(
                    f"The attention at {path!r} is already replaced by another adapter; detach that one first."
                )
            hooks.override_forward(MaskedForward(self, module, self.mask(path), reader, self.config.attn_backend))

    @property
    def mask_paths(self) -> list[str]:
        """Paths of the masked attention modules."""
        return [p for p in self.site_paths if p not in self._saved]

    def mask(self, path: str) -> GaussianMixtureMask:
        """The mask of the attention at `path`."""
        return self.site(path)  # type: ignore[return-value]

    def bake(self) -> None:
        """Freeze all masks for the present grid; see `GaussianMixtureMask.bake`."""
        for path in self.mask_paths:
            self.mask(path).bake()

    def unbake(self) -> None:
        """Undo `bake()`."""
        for path in self.mask_paths:
            self.mask(path).unbake()


NO_ATTENTION = (
    "The {} has no timm ViT attention (timm.layers.Attention); Swin, BEiT, EVA and rope models have attention of their own. "
    "Use a 'vit_*' or 'deit_*' model."
)


def _is_timm_attention(module: nn.Module) -> bool:
    from timm.models.vision_transformer import Attention

    return type(module).forward is Attention.forward


def _find_backbone(model: nn.Module) -> tuple[str, Any]:
    for path, module in hooks.named_plain_modules(model):
        if hasattr(getattr(module, "patch_embed", None), "grid_size"):
            return path, module
    raise InputError(
        f"'gmm' needs a timm vision transformer with a patch grid (`patch_embed.grid_size`), which a "
        f"{type(model).__name__} has not."
    )


def _grid_size(backbone: Any) -> tuple[int, int]:
    grid = backbone.patch_embed.grid_size
    if grid is None:
        raise InputError(
            "The backbone was built without img_size, so its patch grid is unknown; pass img_size= to create it."
        )
    return check_grid(tuple(grid))


class GridReader:
    """Hook on the patch embedding: remembers the patch grid of the batch that is passing through."""

    def __init__(self) -> None:
        self.grid: tuple[int, int] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """timm gives `(B, rows, columns, C)` with `dynamic_img_size`, else `(B, N, C)` on the fixed grid."""
        self.grid = (output.shape[1], output.shape[2]) if output.dim() == 4 else tuple(module.grid_size)  # type: ignore[arg-type]


class MaskedForward(hooks.ForwardOverride):
    """timm's attention with masked logits, computed by calling the module's own layers."""

    def __init__(self, owner: Any, module: nn.Module, mask: GaussianMixtureMask, reader: GridReader, backend: str):
        super().__init__(owner, module)
        self.mask, self.reader, self.backend = mask, reader, backend

    def run(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`(B, N, C)` -> `(B, N, C)`; several gmm adapters on one attention multiply."""
        m: Any = self.module
        if is_causal:
            raise InputError("'gmm' masks act in both directions and cannot be combined with is_causal=True.")
        factor: Tensor | None = None
        layer: hooks.ForwardOverride | None = self
        while isinstance(layer, MaskedForward):
            if layer.owner.enabled:
                matrix = layer.current_matrix(x.shape[1])
                if layer.mask.mode == "bias":
                    attn_mask = _sum_masks(matrix.to(x.dtype), attn_mask, x.dtype)
                else:
                    factor = matrix if factor is None else factor * matrix
            layer = layer.previous
        if factor is None:
            return type(m).forward(m, x, attn_mask=attn_mask)
        B, N, _ = x.shape
        q, k, v = m.qkv(x).reshape(B, N, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = m.attn_drop.p if m.training else 0.0
        out = masked_attention(
            m.q_norm(q),
            m.k_norm(k),
            v,
            factor,
            scale=m.scale,
            attn_mask=attn_mask,
            dropout_p=dropout,
            backend=self.backend,
        )
        out = out.transpose(1, 2).reshape(B, N, -1)
        out = m.norm(out) if getattr(m, "norm", None) is not None else out
        if getattr(m, "gate", None) is not None:
            out = out * m.gate(x).sigmoid()
        return m.proj_drop(m.proj(out))

    def current_matrix(self, tokens: int) -> Tensor:
        """The mask `(num_heads, N, N)` for the batch that is passing through."""
        m: Any = self.module
        if self.mask.training != m.training:
            self.mask.train(m.training)
        if self.reader.grid is not None and self.reader.grid != self.mask.grid:
            self.mask.set_grid(self.reader.grid)
        self.mask.check(m.num_heads, tokens)
        return self.mask.matrix()
