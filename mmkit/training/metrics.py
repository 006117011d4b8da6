"""Metrics of classification and the default loss and evaluation of `fit`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

from mmkit.errors import InputError
from mmkit.training.loading import describe_examples


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, an object or dict with `logits`, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        found = output[0]
    if found is None:
        raise InputError(
            f"The model returned {type(output).__name__} without logits; pass loss_fn and metrics_fn to fit."
        )
    return found


def _full_precision(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """`(inputs, targets)` of a batch; raises `InputError` for other layouts."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise InputError(
        "The default loss and metrics need batches (images, integer targets); pass loss_fn and metrics_fn to fit."
    )


_NO_LABEL = -(2**31)  # torch ignores -100 unless told otherwise


class TargetError(InputError):
    """Labels that do not fit the model. `wrong`: bool `(B,)`, which of the batch; None when it is about all of them."""

    def __init__(self, message: str, wrong: Tensor | None = None) -> None:
        super().__init__(message)
        self.wrong = wrong

    def named(self, data: Any, indices: Sequence[int]) -> InputError:
        """The same with the names of the examples, where the batch holds examples `indices` of `data`."""
        if self.wrong is None:
            return InputError(str(self))
        if len(self.wrong) == len(indices):  # otherwise collate_fn made more or fewer of them
            indices = [i for i, wrong in zip(indices, self.wrong.tolist(), strict=True) if wrong]
        names = describe_examples(data, indices)
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return InputError(f"{self} Found at: {', '.join(names[:4])}{more}.")


def check_targets(targets: Tensor, num_classes: int) -> Tensor:
    """`targets` as int64 `(B,)` in `0..num_classes-1`, or float probabilities `(B, num_classes)` as they are.

    Raises `TargetError` for anything else.
    """
    if targets.ndim == 2 and targets.is_floating_point() and targets.shape[1] == num_classes:
        return targets
    if targets.ndim != 1 or targets.is_floating_point():
        raise TargetError(
            f"The labels of a batch are {tuple(targets.shape)} {targets.dtype}; expected integers (B,), or "
            f"probabilities (B, {num_classes}). Return int(label) from the data set, or pass loss_fn and metrics_fn."
        )
    lowest, highest = targets.aminmax()
    if lowest < 0 or highest >= num_classes:
        outside = (targets < 0) | (targets >= num_classes)
        raise TargetError(
            f"Label {int(targets[outside][0])} is outside 0..{num_classes - 1}, the {num_classes} classes the model "
            "tells apart. Number the classes from 0, or build the model with more classes.",
            outside,
        )
    return targets.long()


class CrossEntropyLoss:
    """The default `loss_fn`: cross entropy of `model(images)` `(B, K)` against targets `(B,)` int or `(B, K)` soft.

    A CPU refuses a label outside 0..K-1 by itself; a GPU would end the process over it. There the first batch shows K, and
    from then on `check` looks at labels while they are still on the CPU.

    Args:
        label_smoothing: share of the target spread over all classes.
        mixup, cutmix: alpha of timm's `Mixup`; 0 is off. With both, each batch gets one or the other at random.
        mixup_prob: share of the batches that are mixed.
        weights: of the classes, (K,); the loss stays the mean over the examples, each by the weight of its class.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.label_smoothing, self.cutmix, self.mixup = label_smoothing, cutmix, None
        self.class_weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.num_classes: int | None = None
        if mixup or cutmix:
            from timm.data import Mixup

            self.mixup = Mixup(mixup, cutmix, prob=mixup_prob, label_smoothing=0.0)

    def check(self, batch: Any) -> None:
        """Raise `TargetError` when the labels of `batch` do not fit the model, as far as that is known."""
        if self.num_classes is not None:
            check_targets(split_batch(batch)[1], self.num_classes)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        images, targets = split_batch(batch)
        images, shares = self._mix(images) if self.mixup else (images, None)
        logits = _full_precision(logits_of(model(images)))
        if self.num_classes is None:
            self.num_classes = logits.shape[-1]
            check_targets(targets, self.num_classes)
        try:
            return self._loss(logits, targets, shares)
        except (IndexError, RuntimeError):
            check_targets(targets, self.num_classes)
            raise

    def _loss(self, logits: Tensor, targets: Tensor, shares: Tensor | None) -> Tensor:
        if not targets.is_floating_point():
            targets = targets.long() if shares is None else F.one_hot(targets.long(), logits.shape[-1]).to(logits.dtype)
        if shares is not None:
            targets = shares.to(targets.dtype) @ targets
        if self.class_weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing, ignore_index=_NO_LABEL)
        if len(self.class_weights) > logits.shape[-1]:
            raise InputError(
                f"There are {len(self.class_weights)} classes and the model tells {logits.shape[-1]} apart."
            )
        weights = logits.new_ones(logits.shape[-1])
        weights[: len(self.class_weights)] = self.class_weights.to(weights)
        each = F.cross_entropy(
            logits,
            targets,
            weight=weights,
            label_smoothing=self.label_smoothing,
            reduction="none",
            ignore_index=_NO_LABEL,
        )
        return each.mean()  # torch's own mean would divide by the batch's weights, so that its size would matter

    def _mix(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images, and how much of each target each of them holds `(B, B)`.

        timm mixes pairs, the first with the last and so on: the last image of an odd batch stays as it is. It is asked to
        mix the images' numbers in place of labels, so that the number of classes need not be known.
        """
        assert self.mixup is not None
        if self.cutmix and images.ndim != 4:
            raise InputError(f"cutmix needs images (B, C, H, W), not {tuple(images.shape)}; use mixup, or cutmix=0.")
        pairs = self.mixup.num_classes = len(images) // 2 * 2
        shares = torch.eye(len(images), device=images.device)
        if pairs:
            numbers = torch.arange(pairs, device=images.device)
            mixed, shares[:pairs, :pairs] = self.mixup(images[:pairs].clone(), numbers)
            images = torch.cat([mixed, images[pairs:]])
        return images, shares


def labels_of(data: Any) -> list[int]:
    """The class of every example of a data set, without reading examples where it says them (`labels`, `targets`, tensors).

    Raises `InputError` for a data set that does not.
    """
    if isinstance(data, Subset):
        known = labels_of(data.dataset)
        return [known[i] for i in data.indices]
    found = data.tensors[-1] if isinstance(data, TensorDataset) else getattr(data, "labels", None)
    found = getattr(data, "targets", None) if found is None else found
    if found is None and isinstance(data, (list, tuple)):
        found = [e[1] if isinstance(e, (list, tuple)) and len(e) == 2 else None for e in data]
    try:
        whole = torch.as_tensor(found)
        if whole.ndim == 1 and not whole.is_floating_point() and len(whole) == len(data) and int(whole.min()) >= 0:
            return whole.tolist()
    except (TypeError, ValueError, RuntimeError):
        pass
    raise InputError(
        f"Balancing needs the class of every example: let {type(data).__name__} have `labels`, a list of integers from 0."
    )


def balanced_weights(labels: Sequence[int]) -> list[float]:
    """A weight per class, n / (K n_k): rare classes count more, the mean over the examples is 1; 0 for a class without any."""
    return weights_of_counts(torch.bincount(torch.as_tensor(labels)).tolist())


def weights_of_counts(counts: Iterable[int]) -> list[float]:
    """`balanced_weights` of classes that occur so often."""
    found = [int(n) for n in counts]
    present = sum(n > 0 for n in found)
    return [sum(found) / (present * n) if n else 0.0 for n in found]


def accuracy_sums(model: nn.Module, loader: Iterable[Any]) -> Tensor:
    """`(correct, summed cross entropy, examples)` over `loader`, float64 on the CPU; the sums of processes add up."""
    total = torch.zeros(3, dtype=torch.float64)
    for batch in loader:
        images, targets = split_batch(batch)
        logits = _full_precision(logits_of(model(images)))
        if targets.ndim != 1 or targets.is_floating_point():
            raise TargetError("The default metrics need integer targets (B,); pass metrics_fn to fit.")
        targets = check_targets(targets, logits.shape[-1])
        loss = F.cross_entropy(logits, targets, reduction="sum")
        correct = (logits.argmax(1) == targets).sum()
        total += torch.tensor([correct.item(), loss.item(), len(targets)], dtype=torch.float64)
    return total


def accuracy(model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
    """Top-1 accuracy in 0..1 and mean cross entropy over `loader`: the default `metrics_fn`."""
    return metrics_from_sums(accuracy_sums(model, loader))


def metrics_from_sums(sums: Tensor) -> dict[str, float]:
    """`{"accuracy", "loss"}` from the result of `accuracy_sums`."""
    correct, loss, count = sums.tolist()
    return {"accuracy": correct / max(count, 1), "loss": loss / max(count, 1)}
