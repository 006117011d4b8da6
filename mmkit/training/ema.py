"""A moving average of what training changes, with timm's formula (`timm.utils.ModelEmaV3`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mmkit.storage import runs as ckpt


class MovingAverage:
    """Averages of the trained parameters and the buffers of `module`, by name.

    Unlike `ModelEmaV3` nothing frozen is copied and the module may be sharded by FSDP. After step `t` (1-based) the decay
    is `min(decay, 1 - t ** (-2 / 3))`, so that a short run is averaged over what it has and not stuck at its start: 0.96
    after 120 steps, 0.999 after 31600. Integer buffers are copied; half-precision tensors are averaged in float32.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.average = {k: self._wide(v.detach().clone()) for k, v in ckpt.trained_tensors(module).items()}

    @staticmethod
    def _wide(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step`, counted from 1."""
        weight = 1 - min(self.decay, 1 - step ** (-2 / 3))
        for key, now in ckpt.trained_tensors(self.module).items():
            if now.is_floating_point():
                self.average[key].lerp_(self._wide(now.detach()), weight)
            else:
                self.average[key].copy_(now)

    @torch.no_grad()
    def apply(self) -> None:
        """Write the averages into the module."""
        for key, now in ckpt.trained_tensors(self.module).items():
            now.copy_(self.average[key])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in place of the module's own tensors."""
        own = {k: v.detach().clone() for k, v in ckpt.trained_tensors(self.module).items()}
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for key, now in ckpt.trained_tensors(self.module).items():
                    now.copy_(own[key])

    def tensors(self) -> dict[str, Tensor]:
        """The averages on the CPU, whole; all processes must call it."""
        return {k: ckpt.whole(v) for k, v in self.average.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        for key, value in self.average.items():
            value.copy_(ckpt.shard_like(value, tensors[key]))
