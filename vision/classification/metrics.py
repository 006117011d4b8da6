"""What a trained classifier answers, and whether folding its adapter changes that."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkit.data import ImageDataset
from mmkit.training.answers import Answers
from mmkit.training.digest import short_name
from mmkit.vision.classification.preparing import Prepared


def merge_error(prepared: Prepared) -> float | None:
    """Largest absolute difference of the validation logits between the attached and the merged adapter.

    The adapter is attached again afterwards. `None` when the method cannot be merged or there is no adapter.
    """
    adapter = prepared.adapter
    if adapter is None or not adapter.mergeable:
        return None
    data = prepared.val if len(prepared.val) else prepared.train.with_transform(prepared.val.transform)
    images = torch.stack([data[i][0] for i in range(min(len(data), 64))])
    images = images.to(next(prepared.model.parameters()).device)
    before = _logits(prepared.model, images)
    adapter.merge()
    try:
        after = _logits(prepared.model, images)
    finally:
        adapter.unmerge()
    return float((before - after).abs().max())


def answers_on(prepared: Prepared, data: ImageDataset) -> Answers:
    """What the model says about every picture of `data`, which prepares them as `prepared.val` does."""
    device, found = next(prepared.model.parameters()).device, []
    for first in range(0, len(data), 32):
        images = torch.stack([data[i][0] for i in range(first, min(first + 32, len(data)))])
        found.append(_logits(prepared.model, images.to(device)).float().softmax(-1).cpu())
    names = [short_name(data.describe(i)) for i in range(len(data))]
    return Answers(torch.cat(found), torch.tensor(data.labels), prepared.class_names, names)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    training = model.training
    try:
        with torch.no_grad():
            return model.eval()(images)
    finally:
        model.train(training)
