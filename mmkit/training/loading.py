"""Which example goes where: a pure function of (seed, step), so that any run can be continued or split exactly."""

from __future__ import annotations

import contextlib
import math
import random
import signal
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mmkit.errors import InputError


def mix_seed(*parts: int) -> int:
    """One well-mixed 63-bit seed from several integers (the splitmix64 finaliser over their chain)."""
    value = 0x9E3779B97F4A7C15
    for part in parts:
        value = (value ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        value = (value ^ (value >> 31)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 29
    return value >> 1


@contextlib.contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed Python, numpy and torch (CPU) for the block, and give back the random state as it was."""
    python, array, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would reseed the GPU as well
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(tensor)


class SeededExamples(Dataset[Any]):
    """Give each example its own random state, from (seed, epoch, index).

    Augmentation is then the same for any number of workers and processes, and after a resume in the middle of an epoch.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        with isolated_rng(mix_seed(self.seed, epoch, index)):
            return self.data[index]


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
    ) -> None:
        self.length, self.batch_size, self.grad_accum = length, batch_size, grad_accum
        self.world, self.rank, self.seed = world, rank, seed
        self.step_size = batch_size * grad_accum * world
        self.steps_per_epoch = length // self.step_size if drop_last else math.ceil(length / self.step_size)
        self._order: tuple[int, list[int]] = (-1, [])

    def order(self, epoch: int) -> list[int]:
        """The shuffled indices of `epoch`."""
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            self._order = (epoch, torch.randperm(self.length, generator=generator).tolist())
        return self._order[1]

    def examples(self, step: int) -> list[int]:
        """The indices of the run's 0-based optimiser step `step`, of all processes."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[position * self.step_size : (position + 1) * self.step_size]

    def micro_batches(self, step: int) -> list[tuple[list[int], float]]:
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


class _KeyStream:
    """The batch sampler of a whole run from `first` on: lists of (epoch, index) for `SeededExamples`."""

    def __init__(self, sampler: StepSampler, first: int, last: int) -> None:
        self.sampler, self.first, self.last = sampler, first, last

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first, self.last):
            epoch = step // self.sampler.steps_per_epoch
            for indices, _ in self.sampler.micro_batches(step):
                yield [(epoch, i) for i in indices]


def train_batches(
    data: Any,
    sampler: StepSampler,
    *,
    first: int,
    last: int,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """All micro-batches of steps `first..last-1` in order, collated on the CPU."""
    return iter(
        DataLoader(
            SeededExamples(data, sampler.seed),
            batch_sampler=_KeyStream(sampler, first, last),  # type: ignore[arg-type]
            num_workers=num_workers,
            collate_fn=collate_fn or collate,
            worker_init_fn=_quiet_worker,
            generator=torch.Generator().manual_seed(
                0
            ),  # otherwise the loader would draw from the training's own stream
            pin_memory=pin_memory,
        )
    )


class EvalLoader:
    """Batches of `data` in order, moved to `device`; may be iterated many times. `shard` (rank, world) takes
    every world-th batch only; `check` is called before each batch and may raise."""

    def __init__(
        self,
        data: Any,
        batch_size: int,
        device: torch.device,
        *,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        shard: tuple[int, int] = (0, 1),
        seed: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.check = check
        rank, world = shard
        starts = range(rank * batch_size, len(data), batch_size * world)
        self.device, self.shard = device, shard
        keys = [[(0, i) for i in range(s, min(s + batch_size, len(data)))] for s in starts]
        self.loader = DataLoader(
            SeededExamples(data, seed),
            batch_sampler=keys,  # type: ignore[arg-type]
            num_workers=num_workers,
            collate_fn=collate_fn or collate,
            worker_init_fn=_quiet_worker,
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        from accelerate.utils import send_to_device

        for batch in self.loader:
            self.check()
            yield send_to_device(batch, self.device)


def collate(examples: list[Any]) -> Any:
    """torch's `default_collate`; examples that do not stack are an `InputError` that shows their shapes or types."""
    try:
        return default_collate(examples)
    except (RuntimeError, TypeError) as error:
        shown = sorted({_shape(e) for e in examples})[:4]
        raise InputError(
            f"The examples of a batch cannot be stacked: {', '.join(shown)}. Resize and convert images to "
            f"tensors in the data set's transform, or pass collate_fn. ({str(error).splitlines()[0]})"
        ) from error


def _shape(example: Any) -> str:
    if isinstance(example, Tensor):
        return str(tuple(example.shape))
    if isinstance(example, (tuple, list)):
        return "(" + ", ".join(_shape(e) for e in example) + ")"
    return type(example).__name__


def describe_examples(data: Any, indices: Sequence[int]) -> list[str]:
    """What the user calls these examples: `data.describe(i)`, else `data.paths[i]`, else `example i`."""
    if hasattr(data, "describe"):
        return [str(data.describe(i)) for i in indices]
    paths = getattr(data, "paths", None)
    return [str(paths[i]) if isinstance(paths, Sized) and i < len(paths) else f"example {i}" for i in indices]  # type: ignore[index]


def _quiet_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    torch.set_num_threads(1)
