"""Gaussian mixture masks on attention logits: a learned notion of distance for vision transformers.

Source: "Toward a Deeper Understanding: RetNet Viewed through Convolution", Li and Zhang, arXiv 2309.05375, section 3.
The logits of head h are multiplied, before the softmax, by

    M[h, i, j] = offset + sum_k alpha[k, h] * exp(-d2[i, j] / (2 * (sigma[k, h]^2 + 1e-5)))

where d2 is the squared distance of two patches on the patch grid. `offset` is 0 in the paper; our adapter form uses 1
and alpha = 0, so that a pretrained model starts unchanged. Multiply first, add biases and padding masks afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.errors import InputError

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
    y, x = torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu")  # numbers, also of a model without any
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
