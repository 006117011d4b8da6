"""What a denoiser is trained to predict: noise, velocity, the clean sample or the flow, as its diffusers scheduler says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkit.errors import InputError

KINDS = ("epsilon", "v_prediction", "sample", "flow")


@dataclass(frozen=True)
class Objective:
    """How clean samples are noised and what the denoiser answers.

    Attributes:
        kind: one of `KINDS`. "flow" is rectified flow as in diffusers: `x_t = (1 - s) x + s n`, answer `n - x`, `t = 1000 s`.
        alphas: cumulative products of the noise schedule `(T,)`; None for flow.
        steps: training timesteps T.
        shift: of flow schedules for high resolutions: `s -> shift s / (1 + (shift - 1) s)`.
    """

    kind: str
    alphas: Tensor | None
    steps: int
    shift: float = 1.0

    @classmethod
    def of(cls, scheduler: Any) -> Objective:
        """The objective that a diffusers scheduler belongs to.

        Raises:
            InputError: a scheduler with another kind of prediction.
        """
        config = scheduler.config
        steps = int(config.get("num_train_timesteps", 1000))
        kind = config.get("prediction_type", "epsilon")
        if "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas") or kind == "flow_prediction":
            return cls("flow", None, steps, float(config.get("shift") or config.get("flow_shift") or 1.0))
        if kind not in KINDS or not hasattr(scheduler, "alphas_cumprod"):
            raise InputError(
                f"{type(scheduler).__name__} with prediction_type={kind!r} cannot be trained; give a scheduler that predicts "
                f"{', '.join(KINDS[:3])}, or a flow-matching one."
            )
        return cls(kind, scheduler.alphas_cumprod.float(), steps)

    def timesteps(self, batch: int, device: torch.device | None = None) -> Tensor:
        """Random timesteps `(B,)`: whole numbers below T, or for flow `1000 * s` with a logit-normal `s` (arXiv 2403.03206)."""
        if self.kind != "flow":
            return torch.randint(self.steps, (batch,), device=device)
        s = torch.randn(batch, device=device).sigmoid()
        return self.shift * s / (1 + (self.shift - 1) * s) * self.steps

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of sample and noise at `t`, shaped to multiply `like`."""
        shape = (-1, *[1] * (like.dim() - 1))
        if self.kind == "flow":
            s = (t.to(like) / self.steps).view(shape)
            return 1 - s, s
        assert self.alphas is not None
        alpha = self.alphas.to(like)[t.long()].view(shape)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser sees."""
        a, b = self.coefficients(t, clean)
        return a * clean + b * noise

    def weight(self, t: Tensor) -> Tensor:
        """Weight of the squared error at `t` (B,): 1, except that the clean sample is weighted as its velocity would be.

        That is `1 / sigma^2`, up to 10 (arXiv 2511.13720 bounds it likewise).
        """
        if self.kind != "sample":
            return torch.ones_like(t, dtype=torch.float32)
        assert self.alphas is not None
        return (1 / (1 - self.alphas.to(t.device)[t.long()])).clamp(max=10.0)

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What it should answer."""
        if self.kind == "epsilon":
            return noise
        if self.kind == "sample":
            return clean
        if self.kind == "flow":
            return noise - clean
        a, b = self.coefficients(t, clean)
        return a * noise - b * clean
