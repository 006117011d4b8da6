"""The Mamba-1 block (arXiv 2312.00752, section 3.4), with the parameter names of `mamba_ssm.Mamba`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.ops.selective_scan import selective_scan


class Mamba(nn.Module):
    """Selective state-space block on (B, L, d_model); state dicts of `mamba_ssm.Mamba` and transformers' mixer load as they are.

    Args:
        d_model: channels of input and output.
        d_state: state size N per inner channel.
        d_conv: width of the causal depthwise convolution.
        expand: inner channels = `expand * d_model`.
        dt_rank: rank of the step-size projection; "auto" is ceil(d_model / 16).
        backend: see `mmkit.ops.selective_scan`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        backend: str = "auto",
    ):
        super().__init__()
        inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.d_state, self.backend = d_state, backend
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self._init_dt()

    def _init_dt(self, low: float = 1e-3, high: float = 1e-1) -> None:
        """Step sizes start log-uniform in [low, high] after the softplus (section 3.6 of the paper)."""
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        dt = torch.exp(torch.empty_like(self.dt_proj.bias).uniform_(math.log(low), math.log(high))).clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone."""
        return {"A_log", "D"}

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, d_model) -> (B, L, d_model)."""
        length = x.shape[1]
        inner, gate = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        inner = F.silu(self.conv1d(inner)[..., :length])
        dt, b, c = self.x_proj(inner.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan(
            inner,
            F.linear(dt, self.dt_proj.weight).transpose(1, 2),
            -torch.exp(self.A_log.float() if self.A_log.dtype != torch.float64 else self.A_log),
            b.transpose(1, 2),
            c.transpose(1, 2),
            self.D,
            z=gate,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            backend=self.backend,
        )
        assert isinstance(y, Tensor)  # no last state was asked for
        return self.out_proj(y.transpose(1, 2))
