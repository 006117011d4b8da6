"""Training with clouds: losses that augment, the bank's own entries left out, and few-shot adaptation in seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from mmkit.adapters import Adapter, apply_adapter, forward_context
from mmkit.errors import InputError
from mmkit.pointcloud.point_peft.adapter import OWN, PointPEFT
from mmkit.pointcloud.point_peft.bank import FeatureMemoryBank
from mmkit.pointcloud.transforms import Augment
from mmkit.training import FitConfig, FitResult, fit
from mmkit.training.metrics import CrossEntropyLoss

Loss = Callable[[nn.Module, Any], Tensor]


class AugmentedLoss(CrossEntropyLoss):
    """`loss_fn` for `fit`: cross entropy of a batch (points (B, N, 3), labels (B,)), the clouds augmented each by itself.

    Logits (B, C) with labels (B,), or (B, C, N) with parts (B, N), which know no class weights.
    """

    acts_on = ("label_smoothing", "class_weights")

    def __init__(
        self, augment: Augment | None, label_smoothing: float = 0.0, weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(label_smoothing, weights=weights)
        self.augment = augment

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        points, labels = batch[0] if self.augment is None else self.augment(batch[0]), batch[1]
        if labels.ndim == 2:
            return F.cross_entropy(model(points), labels, label_smoothing=self.label_smoothing)
        return super().__call__(model, (points, labels))


def with_own_entry(loss: Loss) -> Loss:
    """`loss` for batches (points, labels, entry) of clouds that are themselves in Point-PEFT's bank: no cloud finds itself.

    At test time there is no such entry, and training should not have one either. The release trains without this.
    """

    def inner(model: nn.Module, batch: Any) -> Tensor:
        with forward_context(store={OWN: batch[2]}):
            return loss(model, batch[:2])

    return inner


@dataclass
class FewShot:
    """What `adapt_few_shot` made: the adapter on the model, the class names, and how the training went."""

    model: Any
    adapter: Adapter
    class_names: tuple[str, ...]
    result: FitResult

    @torch.no_grad()
    def predict(self, points: np.ndarray) -> np.ndarray:
        """Probabilities (B, C) of clouds (B, N, 3) in the unit sphere."""
        self.model.eval()
        return self.model(torch.from_numpy(np.asarray(points, np.float32))).softmax(-1).numpy()


def adapt_few_shot(
    encoder: Any,
    examples: Mapping[str, Sequence[np.ndarray]],
    *,
    method: str = "point_peft",
    steps: int = 60,
    lr: float = 5e-3,
    seed: int = 0,
    output_dir: str | os.PathLike[str] | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_step: Callable[[Any], None] | None = None,
    **settings: Any,
) -> FewShot:
    """Teach the classes of a few example clouds: a new head and an adapter on the frozen encoder.

    Args:
        encoder: a `PointMAE`; it is copied, its head replaced.
        examples: class name -> clouds (N, 3) of equal N, in the unit sphere.
        method: an adapter, or "linear_probe". Point-PEFT gets a bank of the examples.
        steps, lr, seed: of the training; batches of up to 32, turned about y and scaled.
        settings: of the adapter.

    Raises `InputError` for fewer than two classes, a class without examples, or clouds of unequal size.
    """
    names = tuple(examples)
    if len(names) < 2 or not all(len(v) for v in examples.values()):
        raise InputError("Give at least two classes, each with at least one example.")
    clouds = [np.asarray(c, np.float32) for n in names for c in examples[n]]
    if len({c.shape for c in clouds}) != 1 or clouds[0].ndim != 2:
        raise InputError(
            f"The examples must have equally many points (N, 3); found {sorted({c.shape for c in clouds})[:3]}."
        )
    points = torch.from_numpy(np.stack(clouds))
    labels = torch.tensor([i for i, n in enumerate(names) for _ in examples[n]])
    torch.manual_seed(seed)
    model = type(encoder)(**{**encoder.config, "num_classes": len(names), "class_names": list(names)})
    own = {k: v for k, v in encoder.state_dict().items() if not k.startswith("head.")}
    model.load_state_dict(own, strict=False)
    loss: Loss = AugmentedLoss(Augment("y", (0.8, 1.2), per_axis=False))
    data: tuple[Tensor, ...] = (points, labels)
    if method == "point_peft":
        prompts = min(10, len(points) + 1)
        settings = {"bank_size": len(points), "num_prompts": prompts, "adapter_dim": 8, "init": "zero", **settings}
        bank = FeatureMemoryBank.build(model, points.split(64))
        loss, data = with_own_entry(loss), (*data, torch.arange(len(points)))
    adapter = apply_adapter(model, method, **settings)
    if isinstance(adapter, PointPEFT) and adapter.config.bank_size:
        adapter.set_bank(bank)
    config = FitConfig(
        max_steps=steps, batch_size=min(32, len(points)), lr=lr, warmup_steps=steps // 10, weight_decay=0.05, seed=seed,
        progress=False, device="cpu", resume=False, drop_last=len(points) % 32 == 1,
    )  # fmt: skip
    result = fit(
        model, TensorDataset(*data), loss_fn=loss, config=config, adapter=adapter, output_dir=output_dir,
        should_stop=should_stop, on_step=on_step,
    )  # fmt: skip
    model.eval()
    return FewShot(model, adapter, names, result)
