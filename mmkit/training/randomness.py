"""Random numbers as a pure function of where a run is: nothing to save, and the same for any number of workers.

Before anything draws, Python's, numpy's and torch's global generators are seeded from (seed, place). Seeding costs some
microseconds, which is too much for every example of a data set that draws nothing: see `Untouched`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch

_SEED: dict[str, Callable[[int], object]] = {
    "python": random.seed,
    "numpy": lambda seed: np.random.seed(seed % 2**32),
    "torch": torch.default_generator.manual_seed,  # not torch.manual_seed: that would reseed the GPU as well
}
_DRAW: dict[str, Callable[[], float]] = {
    "python": random.random,
    "numpy": np.random.random,
    "torch": lambda: torch.rand(()).item(),
}
_MARK = 20261
_FIRST = {
    "python": random.Random(_MARK).random(),
    "numpy": np.random.RandomState(_MARK).random_sample(),
    "torch": torch.rand((), generator=torch.Generator().manual_seed(_MARK)).item(),
}


def mix_seed(*parts: int) -> int:
    """One well-mixed 63-bit seed from several integers (the splitmix64 finaliser over their chain)."""
    value = 0x9E3779B97F4A7C15
    for part in parts:
        value = (value ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        value = (value ^ (value >> 31)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 29
    return value >> 1


def seed_everything(seed: int, names: Collection[str] = tuple(_SEED), device: torch.device | None = None) -> None:
    """Seed the named global generators ("python", "numpy", "torch": the CPU's), and that of `device` if it is another."""
    for name in names:
        _SEED[name](seed)
    if device is not None and device.type != "cpu":
        torch.manual_seed(seed)


def example_seeder(names: Collection[str], seed: int, epoch: int) -> Callable[[int], None]:
    """A function of an example's index that seeds the named generators from (seed, epoch, index); made for many calls."""
    start, functions = mix_seed(seed, epoch), [_SEED[name] for name in names]
    if not functions:
        return lambda index: None

    def seed_example(index: int) -> None:
        value = mix_seed(start, index)
        for function in functions:
            function(value)

    return seed_example


class Untouched:
    """Tells which global generators a piece of code drew from, without copying their states.

    They are seeded with a mark; whoever has drawn nothing gives the mark's first number afterwards.
    """

    def __init__(self, names: Collection[str] = tuple(_SEED)) -> None:
        self.names = names
        seed_everything(_MARK, names)

    def drawn(self) -> set[str]:
        """The names of the generators that were used since; their states are spent."""
        return {name for name in self.names if _DRAW[name]() != _FIRST[name]}


@contextlib.contextmanager
def kept_rng() -> Iterator[None]:
    """Leave the caller's random states as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if gpu is not None:
            torch.cuda.set_rng_state_all(gpu)
