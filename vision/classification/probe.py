"""Where training starts: classifiers solved on the features of the network as it is, before anything else of it is trained.

Fine-tuning from a random classifier first pulls good features apart to suit it; from a solved one it does not
(linear probing, then fine-tuning: arXiv 2202.10054).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mmkit.adapters import Adapter
from mmkit.backbones import image_info
from mmkit.data import ImageDataset
from mmkit.errors import InputError

BATCH = 32
PRIOR = 0.1
"""Penalty on squared weights, per feature: logits are expected to spread by about 2, whatever the width and the number of pictures."""


def start_heads(model: nn.Module, adapter: Adapter | None, data: ImageDataset, num_classes: int) -> list[str]:
    """Solve the classifiers that are trained (in `model`, or its copies in `adapter`) on `data`; returns their paths.

    Only linear ones can be solved that get one vector per picture.
    """
    named = model.named_parameters() if adapter is None else adapter.trainable_parameters()
    trained = {name: p for name, p in named if p.requires_grad}
    heads = [head for head in image_info(model).heads if trained.get(f"{head}.weight", torch.empty(0)).ndim == 2]
    found = head_inputs(model, heads, (data[i][0] for i in range(len(data)))) if heads else {}
    for head, features in found.items():
        weight, bias = solve(features.cpu(), torch.tensor(data.labels), num_classes)
        with torch.no_grad():
            trained[f"{head}.weight"].copy_(weight)
            if f"{head}.bias" in trained:
                trained[f"{head}.bias"].copy_(bias)
    return list(found)


def head_inputs(model: nn.Module, heads: Iterable[str], pictures: Iterable[Tensor]) -> dict[str, Tensor]:
    """What each of the modules `heads` is given when `model` looks at `pictures` (each (C, H, W)): {path: (N, D)}.

    Heads whose input is not one vector per picture are left out.
    """
    modules = {path: model.get_submodule(path) for path in heads}
    seen: dict[str, list[Tensor]] = {path: [] for path in modules}
    handles = [
        module.register_forward_pre_hook(lambda _, args, path=path: seen[path].append(args[0].detach()))
        for path, module in modules.items()
    ]
    training, device = model.training, next(model.parameters()).device
    try:
        model.eval()
        with torch.no_grad():
            batch: list[Tensor] = []
            for picture in pictures:
                batch.append(picture)
                if len(batch) == BATCH:
                    model(torch.stack(batch).to(device))
                    batch = []
            if batch:
                model(torch.stack(batch).to(device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {path: torch.cat(parts) for path, parts in seen.items() if parts and parts[0].ndim == 2}


def probe_answers(model: nn.Module, train: ImageDataset, test: ImageDataset) -> Tensor:
    """Which pictures of `test` a classifier gets right that is solved on the features of `train`: bool (N,).

    The backbone stays as it is; its transform belongs to the data sets. Raises `InputError` for a model whose classifier is not given one
    vector per picture.
    """
    heads = image_info(model).heads[:1]
    seen = [head_inputs(model, heads, (data[i][0] for i in range(len(data)))) for data in (train, test)]
    if not all(seen):
        raise InputError(f"{type(model).__name__} has no classifier that is given one vector per picture.")
    known, asked = (found[heads[0]].cpu() for found in seen)
    weight, bias = solve(known, torch.tensor(train.labels), len(train.class_names))
    return (asked.double() @ weight.T + bias).argmax(-1) == torch.tensor(test.labels)


def solve(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Weight (num_classes, D) and bias of the logistic regression of `labels` (N,) on `features` (N, D), in float64.

    It is solved by L-BFGS on standardised features, with a Gaussian prior on the weights; mean and deviation are folded in at the end.
    """
    x, count = features.double(), len(features)
    mean, deviation = x.mean(0), x.std(0, unbiased=False)
    scale = 1 / torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.inf)  # a constant says nothing
    x = (x - mean) * scale
    weight = x.new_zeros(num_classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight.T + bias, labels)
        loss = loss + PRIOR * x.shape[1] / count * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weight = weight.detach() * scale
    return weight, bias.detach() - weight @ mean
