"""Reading batches: the same examples with the same random numbers for any number of workers, processes and resumes."""

from __future__ import annotations

import signal
import traceback
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from mmkit.errors import InputError
from mmkit.training.randomness import Untouched, example_seeder, mix_seed, seed_everything
from mmkit.training.sampling import Key

_SMALL = 2**26  # bytes that may lie in memory twice
Collate = Callable[[list[Any]], Any]


class Batches(Dataset[Any]):
    """Collated batches of a data set, by `(epoch, indices)`; runs in the main process or in a worker.

    Every data set found in `data` that has a `set_epoch(epoch)` method is told the epoch before it is read. What its
    examples draw from the global generators of Python, numpy and torch depends on (seed, epoch, index) alone: a batch is
    read first as if it drew nothing; if that turns out wrong, it is read again with the generators it used seeded for
    each example, and so are all later ones.

    A data set that fails gives an `InputError` as the batch, which names the example: raising is left to the main process,
    since a traceback of a worker would arrive as text.
    """

    def __init__(self, data: Any, seed: int, collate_fn: Collate | None) -> None:
        self.data, self.seed, self.collate = data, seed, collate_fn or collate
        self.drawn: set[str] = set()
        self.columns = columns_of(data) if collate_fn is None else None
        self._tell: list[Callable[[int], None]] | None = None

    def __getitem__(self, key: Key) -> Any:
        try:
            return self._read(*key)
        except InputError as error:
            if get_worker_info() is not None:
                error.add_note("".join(traceback.format_exception(error)))
            return error

    def _read(self, epoch: int, indices: Sequence[int]) -> Any:
        if self.columns is not None:
            known = isinstance(indices, array)
            chosen = torch.frombuffer(indices, dtype=torch.int64) if known else torch.as_tensor(indices)
            return [column[chosen] for column in self.columns]
        found = self.examples(epoch, indices)
        if self.collate is not collate:  # the caller's may draw, as timm's mixing ones do
            seed_everything(mix_seed(self.seed, epoch, indices[0], len(indices)))
        return self.collate(found)

    def examples(self, epoch: int, indices: Sequence[int]) -> list[Any]:
        """The examples of one batch before they are collated."""
        if isinstance(self.data, Stream):
            return [self._example(i) for i in indices]
        if self._tell is None:
            self._tell = epoch_listeners(self.data)
        for tell in self._tell:
            tell(epoch)
        untouched = Untouched({"python", "numpy", "torch"} - self.drawn)
        seed = example_seeder(self.drawn, self.seed, epoch)
        found = []
        for index in indices:
            seed(index)
            found.append(self._example(index))
        drawn = untouched.drawn()
        if drawn:
            self.drawn |= drawn
            return self.examples(epoch, indices)
        return found

    def _example(self, index: int) -> Any:
        try:
            return self.data[index]
        except _StreamEndedError:
            raise
        except Exception as error:
            name = describe_examples(self.data, [index])[0]
            raise InputError(
                f"The data set failed at {name}: {type(error).__name__}: {str(error).rstrip('.')}. Mend or leave out this example."
            ) from error


def columns_of(data: Any) -> list[Tensor] | None:
    """The tensors of a `TensorDataset`, or of a small list of like tuples stacked: batches are then cut from whole tensors.

    None for other data sets, and for lists whose batches would not all be stacked alike.
    """
    if type(data) is TensorDataset:
        return list(data.tensors)
    if type(data) is not list or type(data[0]) is not tuple:
        return None
    kinds = [_kind(part) for part in data[0]]
    size = len(data) * sum(part.nbytes for part in data[0] if isinstance(part, Tensor))
    if None in kinds or size > _SMALL or any(type(e) is not tuple or [_kind(p) for p in e] != kinds for e in data):
        return None
    return [torch.stack(c) if isinstance(c[0], Tensor) else default_collate(list(c)) for c in zip(*data, strict=True)]


def _kind(part: Any) -> Any:
    if type(part) is Tensor:
        return part.dtype, part.shape, part.device, part.requires_grad
    return type(part) if type(part) in (int, float) else None


class _StreamEndedError(InputError):
    """There are no more examples, which is no fault of any one of them."""


class Stream:
    """An iterable data set as one whose examples are asked for by their position, counted from the run's beginning.

    Positions must rise; those that are left out are read and dropped. When the iterable ends it is started again. Before
    each example the global generators are seeded from (seed, position).

    Raises `InputError` when a pass gives no example, as the second one over a generator does.
    """

    def __init__(self, data: Iterable[Any], seed: int) -> None:
        self.source, self.seed, self.position, self.passes = data, seed, 0, 0
        self._iterator: Iterator[Any] | None = None

    def __getitem__(self, position: int) -> Any:
        while self.position < position:
            self._next()
        return self._next()

    def _next(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                for tell in epoch_listeners(self.source):
                    tell(self.passes)
                self._iterator, self.passes = iter(self.source), self.passes + 1
            seed_everything(mix_seed(self.seed, self.position))
            try:
                example = next(self._iterator)
            except StopIteration:
                self._iterator = None
                continue
            self.position += 1
            return example
        raise _StreamEndedError(
            f"The iterable data set gave {self.position} examples and none when it was started again. Let its __iter__ "
            "begin anew (a generator cannot), or lower max_steps."
        )


def is_map_style(data: Any) -> bool:
    """Whether examples can be asked for by index: an `IterableDataset` inherits a `__getitem__` that only raises."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset)


def epoch_listeners(data: Any) -> list[Callable[[int], None]]:
    """The `set_epoch` methods of `data` and of the data sets it holds, however deep (`Subset`, `ConcatDataset`, ...)."""
    found, todo, seen = [], [data], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if callable(getattr(item, "set_epoch", None)):
            found.append(item.set_epoch)
        for value in getattr(item, "__dict__", {}).values():
            held = value if type(value) in (list, tuple) and len(value) <= 1000 else [value]
            todo += [
                v for v in held if hasattr(v, "__dict__") and (hasattr(v, "__getitem__") or hasattr(v, "__iter__"))
            ]
    return found


def train_batches(
    batches: Batches, keys: Iterable[Key], num_workers: int = 0, pin_memory: bool = False
) -> Generator[Any, None, None]:
    """The batches of `keys` in order, on the CPU; raises what went wrong with one when its turn comes."""
    iterator = iter(_loader(batches, keys, num_workers, pin_memory))
    try:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (ConnectionError, EOFError) as error:  # torch notices a worker's death at the next look only
                raise RuntimeError(f"DataLoader worker died while it sent a batch: {error}") from error
            if isinstance(batch, InputError):
                raise batch
            yield batch
    finally:  # while torch knows of a dead worker, each child process that ends raises an error wherever the program is
        getattr(iterator, "_shutdown_workers", lambda: None)()


def _loader(batches: Batches, keys: Iterable[Key], num_workers: int, pin_memory: bool) -> Iterable[Any]:
    if num_workers == 0:
        return map(batches.__getitem__, keys)
    return DataLoader(
        batches,
        sampler=keys,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=1 if isinstance(batches.data, Stream) else num_workers,  # a stream has one reader
        worker_init_fn=_quiet_worker,
        generator=torch.Generator().manual_seed(0),  # otherwise it would draw from the training's own stream
        pin_memory=pin_memory,
    )


class EvalLoader:
    """Batches of `data` in order, moved to `device`; may be iterated many times. `shard` (rank, world) takes
    every world-th batch only; `check` is called before each batch and may raise. After each batch the global generators
    are seeded from (seed, batch), for a metric that draws."""

    def __init__(
        self,
        data: Any,
        batch_size: int,
        device: torch.device,
        *,
        num_workers: int = 0,
        collate_fn: Collate | None = None,
        shard: tuple[int, int] = (0, 1),
        seed: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        rank, world = shard
        starts = range(rank * batch_size, len(data), batch_size * world)
        self.keys = [(0, range(s, min(s + batch_size, len(data)))) for s in starts]
        self.batches = Batches(data, seed, collate_fn)
        self.device, self.num_workers, self.check, self.seed = device, num_workers, check, seed
        self.current: Sequence[int] = ()
        self.batch: Any = None

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Any]:
        from accelerate.utils import send_to_device

        pinned = self.device.type == "cuda"
        for (_, indices), batch in zip(
            self.keys, train_batches(self.batches, self.keys, self.num_workers, pinned), strict=True
        ):
            self.check()
            self.current, self.batch = indices, batch
            seed_everything(mix_seed(self.seed, indices[0]), device=self.device)
            yield send_to_device(batch, self.device, non_blocking=pinned)


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
    if isinstance(data, Subset):
        return describe_examples(data.dataset, [data.indices[i] for i in indices])
    if hasattr(data, "describe"):
        return [str(data.describe(i)) for i in indices]
    paths = getattr(data, "paths", None)
    return [str(paths[i]) if isinstance(paths, Sized) and i < len(paths) else f"example {i}" for i in indices]  # type: ignore[index]


def _as_it_is(batch: Any) -> Any:
    return batch


def _quiet_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    torch.set_num_threads(1)
