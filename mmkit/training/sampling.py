"""Which example goes where: a pure function of (seed, step), so that any run can be continued or split exactly."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmkit.training.randomness import mix_seed

Key = tuple[int, Sequence[int]]  # (epoch, indices) of one micro-batch


class StepSampler:
    """Split every epoch's shuffled order into optimiser steps, micro-batches and processes.

    One step takes `batch_size * grad_accum * world` examples, whatever the split: two processes with batch 8 see
    exactly what one process with batch 16 sees. Each micro-batch carries a weight so that the weighted sum of the mean
    losses, averaged over the processes, is the mean over the step's examples, also in the shorter last step.

    Args:
        length: examples per epoch.
        batch_size: examples per micro-batch and process.
        grad_accum: micro-batches per step.
        world, rank: number of processes and this one.
        seed: of the shuffle.
        drop_last: leave out the shorter last step of an epoch.
        stream: the indices count the examples of an endless stream from the run's beginning; nothing is shuffled.
        labels: class of each example: every class is taken equally often, see `balanced_order`.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        grad_accum: int = 1,
        world: int = 1,
        rank: int = 0,
        seed: int = 0,
        drop_last: bool = False,
        stream: bool = False,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.length, self.batch_size, self.grad_accum = length, batch_size, grad_accum
        self.world, self.rank, self.seed, self.stream, self.labels = world, rank, seed, stream, labels
        self.step_size = batch_size * grad_accum * world
        self.steps_per_epoch = length // self.step_size if drop_last else math.ceil(length / self.step_size)
        self._order: tuple[int, Sequence[int]] = (-1, [])

    def order(self, epoch: int) -> Sequence[int]:
        """The indices of `epoch` in the order they are used in."""
        if self.stream:
            return range(epoch * self.length, (epoch + 1) * self.length)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            shuffled = torch.randperm(self.length, generator=generator)
            if self.labels is not None:
                shuffled = balanced_order(self.labels, shuffled, epoch, generator)
            # an array, so that a batch of a tensor is indexed without a Python number for each example
            self._order = (epoch, array("q", shuffled.numpy().tobytes()))
        return self._order[1]

    def examples(self, step: int) -> Sequence[int]:
        """The indices of the run's 0-based optimiser step `step`, of all processes."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[position * self.step_size : (position + 1) * self.step_size]

    def micro_batches(self, step: int) -> list[tuple[Sequence[int], float]]:
        """This process's `(indices, weight)` pairs of the run's 0-based optimiser step `step`.

        A process that is left without examples gets one at weight 0, so that all make the same number of passes.
        """
        chosen = self.examples(step)
        size = self.batch_size * self.world
        result = []
        for start in range(0, len(chosen), size):
            chunk = chosen[start : start + size]
            edges = [round(len(chunk) * r / self.world) for r in range(self.world + 1)]
            part = chunk[edges[self.rank] : edges[self.rank + 1]]
            weight = len(part) * self.world / len(chosen)
            result.append((part or chunk[:1], weight))
        return result


def balanced_order(labels: Sequence[int], shuffled: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
    """As many indices as `labels`, of each class equally many (one more or less), of each of its examples as well.

    Which examples of a large class an epoch leaves out, and which of a small one it takes once more, `shuffled` decides.
    """
    by_class: dict[int, list[int]] = {}
    for index in shuffled.tolist():
        by_class.setdefault(int(labels[index]), []).append(index)
    share, rest = divmod(len(labels), len(by_class))
    chosen: list[int] = []
    for place, label in enumerate(sorted(by_class)):
        members = by_class[label]
        count = share + ((place + epoch) % len(by_class) < rest)
        chosen += (members * (count // len(members) + 1))[:count]
    return torch.tensor(chosen)[torch.randperm(len(chosen), generator=generator)]


class StepKeys:
    """The keys of this process's micro-batches of steps `first..last-1`, in order; may be iterated many times."""

    def __init__(self, sampler: StepSampler, first: int, last: int) -> None:
        self.sampler, self.first, self.last = sampler, first, last

    def __iter__(self) -> Iterator[Key]:
        for step in range(self.first, self.last):
            epoch = step // self.sampler.steps_per_epoch
            for indices, _ in self.sampler.micro_batches(step):
                yield epoch, indices
